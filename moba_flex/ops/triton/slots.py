"""Tokens to block slots, and slots to tokens: what is copied is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

_TILE = 4096  # elements that one program copies, or one row of more


@triton.jit(do_not_specialize=["N", "PARTS"])
def _take_kernel(
    X, INDEX, OUT, stride_b, stride_h, stride_n, stride_d, H, N, PARTS, fill, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr
):
    # One program: M places of one head.
    head, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    i, d = part * M + tl.arange(0, M), tl.arange(0, DP)[None, :]
    at = tl.load(INDEX + head // H * N + i, mask=i < N, other=-1)
    place = (head // H) * stride_b + (head % H) * stride_h + at * stride_n
    x = tl.load(X + place[:, None] + d * stride_d, mask=(at >= 0)[:, None] & (d < D), other=fill)
    tl.store(OUT + (head * N + i)[:, None] * D + d, x, mask=(i < N)[:, None] & (d < D))


def take(x: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """`x [B, H, N, D]` or `[B, H, N]`, `index [B, M]` int64 -> `out[b, h, i] = x[b, h, index[b, i]]`, `fill` where the index is -1."""
    (rows, heads), places, width = x.shape[:2], index.shape[1], x.shape[3] if x.dim() == 4 else 1
    out, index = x.new_empty(rows, heads, places, *x.shape[3:]), index.contiguous()
    padded = next_power_of_2(max(1, width))
    tile = max(1, min(1024, _TILE // padded))
    parts = cdiv(places, tile)
    if out.numel():
        with torch.cuda.device_of(x):
            strides = (*x.stride(), 1)[:4]
            _take_kernel[(rows * heads * parts,)](x, index, out, *strides, heads, places, parts, fill, width, padded, tile, num_warps=4)
    return out
