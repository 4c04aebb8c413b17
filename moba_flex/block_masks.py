"""BlockMasks from their constructor: what tells FlexAttention which key block each tile of queries meets.

`create_block_mask` and `BlockMask.from_kv_blocks` build tensors of (query tiles x key tiles), many gigabytes at long lengths. A tile of
routed rows meets one block and a tile of a local call meets its own block's tiles, so lists of that width are enough.

All heads and rows of the batch lie on one axis. The lists rule on the GPU; `mask_mod` is evaluated on partial tiles alone, yet says
the whole truth, since uncompiled FlexAttention asks nothing else. It comes apart from the tensors that it reads (`Mask.buffers`),
because the backward pass is traced from a function of indices and buffers.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, T tiles of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .blocks import BlockLayout
from .routing import Routes

QUERY_TILE = 128


@dataclass(frozen=True, eq=False)
class Mask:
    """A BlockMask, and its `mask_mod` as `rule(b, h, q, kv, *buffers)`; `key` tells rules apart, and equal ones are one object."""

    block_mask: BlockMask
    rule: Callable[..., Tensor]
    buffers: tuple[Tensor, ...]
    key: tuple
    lists: tuple[Tensor, ...]  # the eight lists of the BlockMask


def local_tile(width: int) -> int:
    """Tiles of the local call divide its blocks."""
    return math.gcd(width, QUERY_TILE)


def _mask(key: tuple, rule: Callable, buffers: tuple[Tensor, ...], lengths, tiles, kv, full_kv, q, full_q) -> Mask:
    """`kv`, `full_kv`, `q`, `full_q`: pairs of counts `[n]` and indices `[n, width]`."""

    def mask_mod(b, h, q, kv):
        return rule(b, h, q, kv, *buffers)

    lists = [x for count, index in (kv, full_kv, q, full_q) for x in (count[None, None], index[None, None])]
    block_mask = BlockMask(lengths, *lists, BLOCK_SIZE=tiles, mask_mod=mask_mod)
    return Mask(block_mask, rule, buffers, key, tuple(lists))


@lru_cache(maxsize=None)
def _local_rule(width: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv, block):
        return (block[q // width] == kv // width) & (kv % width <= q % width)

    return rule


@lru_cache(maxsize=None)
def _routed_rule(tile: int, width: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv, block, n_keys):
        return (block[q // tile] == kv // width) & (kv % width < n_keys[kv // width])

    return rule


def local_mask(layout: BlockLayout, heads: int, groups: int) -> Mask:
    """Causal attention within blocks, for `[1, 1, B * H * Q * P, D]` queries and `[1, 1, B * G * C * P, D]` keys."""
    own, width, n_blocks = layout.own, layout.width, layout.n_key_blocks
    rows, n_query_blocks = own.shape
    tile, device = local_tile(width), own.device
    per, repeats = width // tile, heads // groups
    step = torch.arange(per, device=device, dtype=torch.int32)

    group = torch.arange(rows * groups, device=device, dtype=torch.int32).view(rows, groups, 1, 1)
    block = (group * n_blocks + own[:, None, None]).expand(rows, groups, repeats, n_query_blocks).flatten()
    start = (block * per)[:, None, None].expand(-1, per, per)  # [B * H * Q, tile of queries, tile of keys]
    before = step.expand(block.numel(), per).flatten()
    diagonal = (start + step[:, None]).flatten(0, 1)
    earlier = (start + step).flatten(0, 1)

    # Backward: a key tile is met by the same tile of each head's query block and by the later tiles of it.
    head = torch.arange(rows * heads, device=device, dtype=torch.int32).view(rows, groups, 1, repeats)
    query_block = torch.arange(n_blocks, device=device, dtype=torch.int32) - own[:, :1]
    met = ((query_block >= 0) & (query_block < n_query_blocks))[:, None, :, None].expand(-1, groups, -1, per).flatten()
    first = (head * n_query_blocks + query_block.clamp(0, n_query_blocks - 1)[:, None, :, None]) * per  # [B, G, C, H / G]
    same = first[:, :, :, None] + step[:, None]  # [B, G, C, P / tile, H / G]
    later = (same[..., None] + 1 + step).clamp(max=rows * heads * n_query_blocks * per - 1)
    after = torch.arange(per - 1, -1, -1, device=device, dtype=torch.int32).repeat(rows * groups * n_blocks)
    # Of each head's `per` places only the first `after` are real: move the real ones of all heads to the front.
    real = step[None, None, :] < torch.arange(per - 1, -1, -1, device=device)[:, None, None]  # [per, 1, per]
    order = (~real.expand(per, repeats, per)).flatten(1).int().argsort(dim=1, stable=True)
    later = later.flatten(4).flatten(0, 2).gather(2, order.expand(rows * groups * n_blocks, -1, -1)).flatten(0, 1)

    lengths = (rows * heads * n_query_blocks * width, rows * groups * n_blocks * width)
    return _mask(
        ("local", width),
        _local_rule(width),
        (block,),
        lengths,
        (tile, tile),
        (torch.ones_like(before), diagonal.contiguous()),
        (before, earlier.contiguous()),
        (met.int() * repeats, same.flatten(0, 3).contiguous()),
        (met.int() * after * repeats, later.int().contiguous()),
    )


def routed_mask(routes: Routes, layout: BlockLayout, groups: int, causal: bool) -> Mask:
    """Each tile of routed rows `[1, 1, T * tile, D]` meets one whole block of the keys `[1, 1, B * G * C * P, D]`."""
    tile, width = routes.tile, layout.width
    tiles = routes.first_tile.diff()
    first = routes.first_tile[:-1].clamp(max=routes.block_of_tile.numel() - 1)
    used, block = routes.tile_in_use, routes.block_of_tile
    n_keys = layout.block_keys[:, None].expand(-1, groups, -1).flatten()
    lengths = (block.numel() * tile, n_keys.numel() * width)

    listed = ((used, block[:, None]), (tiles, first[:, None]))
    empty = ((torch.zeros_like(used), block[:, None]), (torch.zeros_like(tiles), first[:, None]))
    # Past blocks are full of keys, so that nothing of a tile is masked, unless a block has more slots than tokens.
    full = causal and layout.whole
    (kv, q), (full_kv, full_q) = (empty, listed) if full else (listed, empty)
    return _mask(("routed", tile, width), _routed_rule(tile, width), (block, n_keys), lengths, (tile, width), kv, full_kv, q, full_q)
