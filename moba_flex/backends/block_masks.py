"""Builds BlockMasks, which tell FlexAttention which key block each query tile reads, directly from index lists.

`create_block_mask` and `BlockMask.from_kv_blocks` build tensors of (query tiles x key tiles), many gigabytes at long lengths.
Here the tiles that a tile reads are contiguous, so lists of one index are enough: with `BLOCKS_ARE_CONTIGUOUS` the kernel
steps through the rest. The partial and the full list of a mask have the same width, because kernels of PyTorch 2.11 read both
with the strides of one.

On a GPU the lists decide: `rule`, the `mask_mod` without the tensors that it reads (`buffers`), is evaluated only on partial
tiles, and in causal calls says only what the lists leave open. On a CPU it is the complete mask, since uncompiled FlexAttention
reads nothing else.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, T tiles of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core.chunking import QUERY_TILE
from ..core.layout import BlockLayout
from ..ops.routing import Routes

# Counts and indices of: partial key tiles, full key tiles, partial query tiles, full query tiles. None if no tile is full,
# and for queries if there is no backward pass.
Lists: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Mask:
    """The parts of a BlockMask. `kernel_key` is everything that its kernels are compiled for; equal keys share one `rule`."""

    kernel_key: tuple[Hashable, ...]
    tiles: tuple[int, int]  # BLOCK_SIZE: slots of queries, slots of keys
    rule: Callable[..., Tensor]  # (b, h, q, kv, *buffers) -> whether query q sees key kv
    buffers: tuple[Tensor, ...]
    lists: Lists


def tile_lists(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `[b, n]` and first indices `[b, n]` in the shapes of a BlockMask."""
    return counts[:, None].contiguous(), indices[:, None, :, None].contiguous()


def block_mask(tiles: tuple[int, int], mask_mod: Callable[..., Tensor], lists: Lists, n_query: int, n_key: int) -> BlockMask:
    """The BlockMask of a `Mask` for `n_query` and `n_key` slots or tokens."""
    return BlockMask((n_query, n_key), *lists, BLOCK_SIZE=tiles, mask_mod=mask_mod)


def query_tile(width: int) -> int:
    """Number of queries per tile of the local call, for blocks of `width` slots."""
    return math.gcd(width, QUERY_TILE)


def block_at(slot: Tensor, width: int) -> Tensor:
    """`slot // width` of slots from 0 on, for a rule. Python's `//` and `%` round down: compiled kernels need 7 and 8 instructions."""
    return slot >> (width.bit_length() - 1) if width & (width - 1) == 0 else slot // width


def place_at(slot: Tensor, width: int) -> Tensor:
    """`slot % width`, see `block_at`."""
    return slot & (width - 1) if width & (width - 1) == 0 else slot % width


@cache
def own_tile_rule(tile: int) -> Callable[..., Tensor]:
    """What is left open where a tile of queries reads only the tile of its own tokens partially."""

    def rule(b, h, q, kv):  # type: ignore[no-untyped-def]  # with annotations the backward graph cannot be cached on disk
        return place_at(kv, tile) <= place_at(q, tile)

    return rule


@cache
def _local_rule(width: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv, own):  # type: ignore[no-untyped-def]
        return (own[b, q // width] == kv // width) & (kv % width <= q % width)

    return rule


@cache
def _tiles_rule(width: int, tile: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv, own, offset):  # type: ignore[no-untyped-def]
        return (own[b, q // tile] == kv // width) & (kv % width <= offset[b, q // tile] + q % tile)

    return rule


def local_mask(layout: BlockLayout, heads: int, groups: int, batch_merged: bool = False) -> Mask:
    """Causal attention within blocks: queries `[B * G, H / G, Q * P, D]`, keys `[B * G, 1, C * P, D]`.

    A query tile reads the same tile of its own block partially, and the earlier tiles of that block fully. With `batch_merged`, batch rows
    are concatenated, `[G, H / G, B * Q * P, D]` and `[G, 1, B * C * P, D]`; not for layouts with query tiles, which have one batch row.
    """

    def build() -> Mask:
        mask = _local_mask(layout, heads, groups, batch_merged)
        return decided_by_lists(mask, heads // groups) if layout.own.is_cuda else mask

    return layout.cached(("local mask", heads, groups, batch_merged), build)


def decided_by_lists(mask: Mask, heads_per_group: int) -> Mask:
    """A local mask without what its lists imply, so that all of its tile size share a kernel."""
    tile = mask.tiles[0]
    return replace(mask, kernel_key=("local", tile, heads_per_group), rule=own_tile_rule(tile), buffers=())


def _local_mask(layout: BlockLayout, heads: int, groups: int, batch_merged: bool) -> Mask:
    if layout.offset is not None:
        return _local_mask_of_tiles(layout, layout.offset, heads, groups)
    own, tile = layout.own, query_tile(layout.width)
    per, (rows, n_query_blocks) = layout.width // tile, own.shape
    # Backward: the query block whose own block a key block is, if any.
    query_block = torch.arange(layout.n_key_blocks, device=own.device, dtype=torch.int32) - own[:, :1]
    met = ((query_block >= 0) & (query_block < n_query_blocks)).int()
    query_block = query_block.clamp(0, n_query_blocks - 1)
    if batch_merged:
        row = torch.arange(rows, device=own.device, dtype=torch.int32)[:, None]
        own, query_block = own + row * layout.n_key_blocks, query_block + row * n_query_blocks
        own, query_block, met, n_query_blocks = own.view(1, -1), query_block.view(1, -1), met.view(1, -1), rows * n_query_blocks
    own, query_block, met = (x.repeat_interleave(groups, 0) for x in (own, query_block, met))
    step = torch.arange(per, device=own.device, dtype=torch.int32)
    start = (own * per)[..., None].expand(-1, -1, per)
    # A key tile is read partially by the same tile of its query block, and fully by the later ones.
    same, met = query_block[..., None] * per + step, met[..., None]
    later = (same + 1).clamp(max=n_query_blocks * per - 1)

    counts = torch.ones_like(start), step.expand_as(start), met.expand_as(same), met * (per - 1 - step)
    indices = start + step, start, same, later
    in_part, in_full, back_in_part, back_in_full = (tile_lists(n.flatten(1), i.flatten(1)) for n, i in zip(counts, indices))
    lists = *in_part, *in_full, *back_in_part, *back_in_full
    return Mask(("local", layout.width, heads // groups), (tile, tile), _local_rule(layout.width), (own,), lists)


def _local_mask_of_tiles(layout: BlockLayout, offset: Tensor, heads: int, groups: int) -> Mask:
    """`_local_mask` for query blocks of one tile, where a block has only those tiles that hold queries."""
    tile, per = layout.query_width, layout.width // layout.query_width
    own, offset = (x.repeat_interleave(groups, 0) for x in (layout.own, offset))
    place = offset // tile  # index of the tile within its own block
    start = own * per

    # Backward: the tiles of a key block are contiguous query tiles, the first of which need not be the block's first.
    used = torch.where(layout.query_stop > layout.query_start, layout.own, layout.n_key_blocks).repeat_interleave(groups, 0)
    block = torch.arange(layout.n_key_blocks, device=own.device, dtype=torch.int32).expand(len(own), -1).contiguous()
    first, after = (torch.searchsorted(used, block, right=right, out_int32=True)[..., None] for right in (False, True))
    last_tile = own.shape[1] - 1
    step = torch.arange(per, device=own.device, dtype=torch.int32)
    same = first + step - place.gather(1, first.clamp(max=last_tile).flatten(1).long())[..., None]
    later = torch.maximum(same + 1, first)
    counts = torch.ones_like(start), place, (same >= first) & (same < after), (after - later).clamp(min=0)
    indices = start + place, start, same.clamp(0, last_tile), later.clamp(max=last_tile)
    listed = [tile_lists(n.int().flatten(1), i.flatten(1)) for n, i in zip(counts, indices)]
    lists = *listed[0], *listed[1], *listed[2], *listed[3]
    return Mask(("local tiles", layout.width, heads // groups), (tile, tile), _tiles_rule(layout.width, tile), (own, offset), lists)


@cache
def _routed_rule(tile: int, width: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv, block, n_keys):  # type: ignore[no-untyped-def]
        return (block[q // tile] == kv // width) & (kv % width < n_keys[kv // width])

    return rule


@cache
def _past_rule(width: int, block_size: int) -> Callable[..., Tensor]:
    def rule(b, h, q, kv):  # type: ignore[no-untyped-def]
        return place_at(kv, width) < block_size

    return rule


def _line(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_lists` for contiguous `[n]`: views only, since every call builds these."""
    return counts.view(1, 1, -1), indices.view(1, 1, -1, 1)


def _no_tiles(like: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros_like(like)
    return _line(nothing, nothing)


def routed_mask(routes: Routes, layout: BlockLayout, groups: int, causal: bool) -> Mask:
    """Each tile of routed rows `[1, 1, T * tile, D]` reads one whole block of the keys `[1, 1, B * G * C * P, D]`."""
    tile, width, block, first = routes.tile, layout.width, routes.block_of_tile, routes.first_tile
    n_keys = layout.cached(("block keys", groups), lambda: layout.block_keys.repeat_interleave(groups, 0).flatten())
    listed = _line(routes.tile_in_use, block), _line(routes.tiles_of_block, first)
    empty = layout.cached(("no tiles", len(block), len(first)), lambda: (_no_tiles(block), _no_tiles(first)))
    # Past blocks are full of keys, so nothing in a tile is masked unless a block has more slots than tokens.
    full = causal and layout.whole
    (kv, q), (full_kv, full_q) = (empty, listed) if full else (listed, empty)
    lists = *kv, *full_kv, *q, *full_q
    if causal and block.is_cuda:  # the lists decide, and past blocks are complete: kernels need no lookup
        key = ("routed", tile, width, full, layout.block_size)
        return Mask(key, (tile, width), _past_rule(width, layout.block_size), (), lists)
    return Mask(("routed", tile, width, full), (tile, width), _routed_rule(tile, width), (block, n_keys), lists)
