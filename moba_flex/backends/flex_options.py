"""Kernel options of FlexAttention calls: tile sizes by block size, head dimension and dtype."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from ..core.chunking import QUERY_TILE

Options: TypeAlias = dict[str, int | bool | str]

# What flex_attention adds to kernel options before it calls its operator.
OPERATOR_OPTIONS: Options = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


COMMON_OPTIONS: Options = {"BACKEND": "TRITON", "IS_DIVISIBLE": True, "BLOCKS_ARE_CONTIGUOUS": True}


def kernel_options(routed: bool, tiles: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype) -> Options:
    """PyTorch's defaults if its tile sizes, which divide 128, divide ours. Smaller blocks need smaller tiles."""
    options = dict(COMMON_OPTIONS)
    if dtype == torch.float32 and torch.version.hip is None:
        # Three TF32 products are as exact as a float32 product, which tensor cores do not have. On an H200, forward passes of 32,768
        # tokens are 12 times as fast, with an error of 5e-7 against float64, like PyTorch's dense attention.
        options["FLOAT32_PRECISION"] = "'tf32x3'"
    q, kv = (math.gcd(tile, QUERY_TILE) for tile in tiles)
    half, narrow = dtype != torch.float32, max(widths) <= 64
    # A tile of rows reads so few keys that loading dominates: with four warps, two tiles share a multiprocessor. Gains on an H100 over the
    # default of eight warps: 23 % at block size 128, 13 % at 512; with head dimension 64, 14 % at block size 128 (larger ones were not
    # tried), and at block size 64, 20 % over tiles of 64 rows.
    few_keys = routed and half and max(widths) <= 128 and tiles[1] <= (128 if narrow else 1024)
    if min(q, kv) < QUERY_TILE:
        most = (64 if half else 32) // (1 if max(widths) <= 128 else 2)
        rows = QUERY_TILE if few_keys and narrow and kv == 64 else most
        q, kv = min(q, rows), min(kv, most)
        options |= {"fwd_BLOCK_M": q, "fwd_BLOCK_N": kv, "num_warps": 4, "num_stages": 2}
        if not half:
            q, kv = 16, 16
        less = min(q, kv)  # the kernel requires N1 to be a multiple of M1, and M2 of N2
        options |= {"bwd_BLOCK_M1": less, "bwd_BLOCK_N1": kv, "bwd_BLOCK_M2": q, "bwd_BLOCK_N2": less}
    elif widths[1] > max(widths[0], QUERY_TILE):
        # PyTorch chooses by the head dimension of keys alone; with values this wide its tiles would not fit into shared memory.
        options |= {"fwd_BLOCK_M": 64 if half else 32, "fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 2}
        options |= _square_backward(64 if half else 16, 2 if half else 1)
    elif few_keys:
        options |= {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 2}
        if narrow:  # 7 % faster than the default at block size 128; equal at head dimension 128
            options |= _square_backward(64, 2)
    return options


def _square_backward(tile: int, stages: int) -> Options:
    sizes: Options = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), tile)
    return sizes | {"bwd_num_warps": 4, "bwd_num_stages": stages}
