"""Builds a `BlockLayout` for rows of equal length, padded rows or packed sequences.

B batch rows, C key blocks per row, Q query blocks per row, P slots per block (`width`), N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allocation import allocate_persistent, may_be_kept, stream_of
from .layout import BlockLayout, clamp_block_size
from .memo import is_remembered, memo

if TYPE_CHECKING:
    from ..backends.protocol import Backend


def layout_of(
    query: Tensor, key: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, block_size: int, backend: Backend
) -> BlockLayout:
    """The layout of a call, with the backend's block widths and query tiles.

    `cu_seqlens` is `[n + 1]`, or `[2, n + 1]` for queries and keys.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    block_size, width = block_sizes(block_size, n_key, backend.slots_per_block)
    mask_or_bounds = padding_mask if cu_seqlens is None else cu_seqlens
    if mask_or_bounds is None:
        return dense_layout(query.shape[0], n_query, n_key, block_size, width, query.device)
    tile = None
    if cu_seqlens is not None and cu_seqlens.dim() == 2:
        tile = backend.slots_per_query_tile(width, n_query, cu_seqlens.shape[1] - 1)
    sizes = n_query, n_key, block_size, width, tile
    if not is_remembered(mask_or_bounds):
        return _layout_from(mask_or_bounds, *sizes)

    def make() -> BlockLayout:
        return replace(allocate_persistent(lambda: _layout_from(mask_or_bounds, *sizes), mask_or_bounds.device), persistent=True)

    return memo(mask_or_bounds, ("layout", *sizes, stream_of(mask_or_bounds.device)), make)


def _layout_from(mask_or_bounds: Tensor, n_query: int, n_key: int, block_size: int, width: int, tile: int | None) -> BlockLayout:
    """The layout given by `mask_or_bounds`: a padding mask `[B, Nk]` bool, or `cu_seqlens`."""
    if mask_or_bounds.dtype == torch.bool:
        return padded_layout(mask_or_bounds, n_query, block_size, width)
    if tile is None:
        return packed_layout(mask_or_bounds, n_key, block_size, width)
    return with_last_queries(packed_layout(mask_or_bounds[1], n_key, block_size, width), mask_or_bounds, n_query, tile)


def n_query_slots(
    query: Tensor, key: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, block_size: int, backend: Backend
) -> int:
    """The number of query slots per row in `layout_of`, from shapes alone."""
    n_query, n_key = query.shape[2], key.shape[2]
    block_size, width = block_sizes(block_size, n_key, backend.slots_per_block)
    if cu_seqlens is not None and cu_seqlens.dim() == 2:
        n_sequences = cu_seqlens.shape[1] - 1
        tile = backend.slots_per_query_tile(width, n_query, n_sequences)
        return n_query_tiles(n_query, n_sequences, block_size, tile) * tile
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return n_query_blocks(n_query, n_key, block_size, padding_mask is not None, sequences) * width


def block_sizes(block_size: int, n_key: int, slots: Callable[[int], int]) -> tuple[int, int]:
    """Tokens per block and slots per block."""
    block_size = clamp_block_size(block_size, n_key)
    return block_size, slots(block_size)


def n_query_blocks(n_query: int, n_key: int, block_size: int, padded: bool, sequences: int | None) -> int:
    """The number of query blocks per row in `layout_of`, if they are as wide as key blocks, from shapes alone."""
    if sequences is not None:
        return n_key // block_size + sequences
    if padded and n_query != n_key:
        return min(-(-n_key // block_size), (n_query + block_size - 2) // block_size + 1)
    return -(-n_key // block_size) - (n_key - n_query) // block_size


def n_query_tiles(n_query: int, sequences: int, block_size: int, tile: int) -> int:
    """An upper bound on the query tiles if `n_query` queries are the last tokens of `sequences` packed sequences, from shapes alone.

    A sequence's queries have one tile, and one more for each tile or block boundary that they cross: at most one in `tile` steps from
    one query to the next, and one in `block_size` steps if tiles do not divide blocks. No tile is empty.
    """

    def crossed(size: int) -> int:
        return (n_query + sequences * (size - 2)) // size

    borders = crossed(tile) + (crossed(block_size) if block_size % tile else 0)
    return torch.sym_min(n_query, sequences + borders)


def dense_layout(rows: int, n_query: int, n_key: int, block_size: int, width: int, device: torch.device) -> BlockLayout:
    """Rows of equal length without padding; the queries are the last `n_query` of `n_key` positions. Cached for later calls."""
    settings = rows, n_query, n_key, block_size, width, device
    if not may_be_kept(device):
        return _dense_layout(*settings)
    return _persistent_layout(stream_of(device), *settings)


@lru_cache(maxsize=64)
def _persistent_layout(stream: int | None, *settings: Any) -> BlockLayout:
    return replace(allocate_persistent(lambda: _dense_layout(*settings), settings[-1]), persistent=True)


def _dense_layout(rows: int, n_query: int, n_key: int, block_size: int, width: int, device: torch.device) -> BlockLayout:
    n_blocks, first_block = -(-n_key // block_size), (n_key - n_query) // block_size
    own = torch.arange(first_block, n_blocks, device=device, dtype=torch.int32).repeat(rows, 1)
    block = torch.arange(n_blocks, device=device, dtype=torch.int32).repeat(rows, 1)
    key_token = block * block_size
    return BlockLayout(
        block_size,
        width,
        n_key,
        n_query,
        n_blocks,
        own,
        torch.zeros_like(own),
        torch.full_like(own, n_blocks),
        *_query_range(own, n_key - n_query, n_key, block_size),
        _keys_in(block, n_key, block_size),
        key_token if n_query == n_key else own * block_size - (n_key - n_query),
        key_token,
        lead=(n_key - n_query) - first_block * block_size,
    )


def padded_layout(padding_mask: Tensor, n_query: int, block_size: int, width: int) -> BlockLayout:
    """Rows with padding (`padding_mask [B, Nk]`) around contiguous real tokens. Blocks are counted from the first real token."""
    rows, n_key = padding_mask.shape
    length = padding_mask.sum(1, keepdim=True)
    start = padding_mask.int().argmax(1, keepdim=True)
    skipped = n_key - n_query
    n_blocks = -(-n_key // block_size)
    query_blocks = n_query_blocks(n_query, n_key, block_size, True, None)
    first_query = (skipped - start).clamp(min=0)

    step = torch.arange(query_blocks, device=padding_mask.device)
    unclamped = first_query // block_size + step
    query_start, query_stop = _query_range(unclamped, first_query, length, block_size)
    own = unclamped.clamp(max=n_blocks - 1).int()
    block = torch.arange(n_blocks, device=padding_mask.device).expand(rows, -1)
    return BlockLayout(
        block_size,
        width,
        n_key,
        n_query,
        n_blocks,
        own.contiguous(),
        torch.zeros_like(own),
        (-(-length // block_size)).int().expand(-1, query_blocks).contiguous(),
        query_start,
        query_stop,
        _keys_in(block, length, block_size),
        (own * block_size + (start - skipped)).int(),
        (block * block_size + start).int(),
        0,
        dense=False,
        covers=False,
    )


def packed_layout(cu_seqlens: Tensor, n_tokens: int, block_size: int, width: int) -> BlockLayout:
    """One row with all packed sequences, each of which starts a new block. No value is read back to the host."""
    bounds, n_sequences, device = cu_seqlens.int(), cu_seqlens.numel() - 1, cu_seqlens.device
    n_blocks = n_query_blocks(n_tokens, n_tokens, block_size, False, n_sequences)  # an upper bound: how many are in use depends on data
    lengths = bounds.diff()
    blocks = (lengths + (block_size - 1)) // block_size
    after = blocks.cumsum(0, dtype=torch.int32)  # one past each sequence's last block

    block = torch.arange(n_blocks, device=device, dtype=torch.int32)
    sequence = torch.searchsorted(after, block, right=True).clamp_(max=n_sequences - 1)
    first, end, length, token = torch.stack([after - blocks, after, lengths, bounds[:-1]])[:, sequence].unsqueeze(1)
    before = (block - first) * block_size  # keys of the sequence before the block
    keys, token = (length - before).clamp_(0, block_size), token + before
    return BlockLayout(
        block_size,
        width,
        n_tokens,
        n_tokens,
        n_blocks,
        block[None],
        first,
        end,
        torch.zeros_like(keys),
        keys,
        keys,
        token,
        token,
        0,
        dense=False,
    )


def with_last_queries(layout: BlockLayout, cu_seqlens: Tensor, n_query: int, tile: int) -> BlockLayout:
    """`layout` of packed keys, for queries that are each sequence's last tokens: `cu_seqlens [2, n + 1]` for queries and keys.

    Tiles begin at multiples of `tile` slots of a block. Tiles without queries are left out; spare ones follow at the end. No value is
    read back to the host.
    """
    size, per_block, n_sequences = layout.block_size, -(-layout.block_size // tile), cu_seqlens.shape[1] - 1
    n_tiles = n_query_tiles(n_query, n_sequences, size, tile)
    bounds, device = cu_seqlens[0].long(), cu_seqlens.device
    queries, keys = cu_seqlens.long().diff()
    skipped = keys - queries  # keys before the first query

    def tile_at(position: Tensor) -> Tensor:  # counted from its sequence's first key
        return position // size * per_block + position % size // tile

    first_tile = tile_at(skipped)
    tiles = torch.where(queries > 0, tile_at(keys - 1) - first_tile + 1, 0)
    after = tiles.cumsum(0)
    before, block_before = after - tiles, (-(-keys // size)).cumsum(0) - -(-keys // size)

    number = torch.arange(n_tiles, device=device)
    of_tile = torch.searchsorted(after, number, right=True).clamp(max=n_sequences - 1)
    number = number - before[of_tile] + first_tile[of_tile]  # spare tiles are beyond the last sequence's keys
    offset = number % per_block * tile
    begin = number // per_block * size + offset
    room = (size - offset).clamp(max=tile)
    stop = torch.minimum(keys[of_tile] - begin, room).clamp(min=0)
    start = torch.minimum((skipped[of_tile] - begin).clamp(min=0), stop)
    first_query = bounds[:-1][of_tile] + begin - skipped[of_tile]
    own = (block_before[of_tile] + number // per_block).clamp(max=layout.n_key_blocks - 1)
    end = block_before + -(-keys // size)
    of_tiles = own, block_before[of_tile], end[of_tile], start, stop, offset, first_query
    own, first, end, start, stop, offset, first_query = (x.int().view(1, -1) for x in of_tiles)
    return replace(
        layout,
        _cache={},
        n_query=n_query,
        own=own,
        first=first,
        end=end,
        query_start=start,
        query_stop=stop,
        query_token=first_query,
        tile=tile,
        offset=offset,
    )


def _query_range(block: Tensor, first: Tensor | int, end: Tensor | int, block_size: int) -> tuple[Tensor, Tensor]:
    """The first slot of each block and one past the last that hold positions from `first` to before `end`."""
    start = (first - block * block_size).clamp(0, block_size)
    stop = torch.maximum((end - block * block_size).clamp(0, block_size), start)
    return start.int().contiguous(), stop.int().contiguous()


def _keys_in(block: Tensor, length: Tensor | int, block_size: int) -> Tensor:
    return (length - block * block_size).clamp(0, block_size).int().contiguous()
