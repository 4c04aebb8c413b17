"""How a `BlockLayout` is made: of rows of equal length, of padded rows, and of packed sequences.

B rows, C key blocks per row, Q query blocks per row, P slots per block (`width`), N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .allocation import allocate_persistent
from .layout import BlockLayout, one_block
from .upstream import is_under_dispatch_mode


def layout_of(
    query: Tensor, key: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, block_size: int, slots: Callable[[int], int]
) -> BlockLayout:
    """The layout of a call. `slots` gives the slots of a block: only tiles of a GPU need blocks of particular widths."""
    block_size, width = block_sizes(block_size, key.shape[2], slots)
    if cu_seqlens is not None:
        return packed_layout(cu_seqlens, key.shape[2], block_size, width)
    if padding_mask is not None:
        return padded_layout(padding_mask, query.shape[2], block_size, width)
    return dense_layout(query.shape[0], query.shape[2], key.shape[2], block_size, width, query.device)


def block_sizes(block_size: int, n_key: int, slots: Callable[[int], int]) -> tuple[int, int]:
    """Tokens and slots of a block."""
    block_size = one_block(block_size, n_key)
    return block_size, slots(block_size)


def n_query_blocks(n_query: int, n_key: int, block_size: int, padded: bool, sequences: int | None) -> int:
    """How many query blocks `layout_of` makes per row, from shapes alone."""
    if sequences is not None:
        return n_key // block_size + sequences
    if padded and n_query != n_key:
        return min(-(-n_key // block_size), (n_query + block_size - 2) // block_size + 1)
    return -(-n_key // block_size) - (n_key - n_query) // block_size


def dense_layout(rows: int, n_query: int, n_key: int, block_size: int, width: int, device: torch.device) -> BlockLayout:
    """Rows of equal length without padding; the queries are the last `n_query` of `n_key` positions. The next call uses it again."""
    settings = rows, n_query, n_key, block_size, width, device
    if is_under_dispatch_mode():
        return _dense_layout(*settings)
    if device.type != "cuda":
        return _persistent_layout(None, *settings)
    # Tensors made while a CUDA graph is captured have no contents before its replay: they are for that graph alone.
    if torch.cuda.is_current_stream_capturing():
        return _dense_layout(*settings)
    # Another stream may come to read them before this one has written them, or still read them when their memory has a new use on this.
    return _persistent_layout(torch.cuda.current_stream(device).cuda_stream, *settings)


@lru_cache(maxsize=64)
def _persistent_layout(stream: int | None, *settings: Any) -> BlockLayout:
    return replace(allocate_persistent(lambda: _dense_layout(*settings), settings[-1]), persistent=True)


def _dense_layout(rows: int, n_query: int, n_key: int, block_size: int, width: int, device: torch.device) -> BlockLayout:
    n_blocks, first_block = -(-n_key // block_size), (n_key - n_query) // block_size
    own = torch.arange(first_block, n_blocks, device=device, dtype=torch.int32).expand(rows, -1)
    return BlockLayout(
        block_size,
        width,
        n_key,
        n_query,
        n_blocks,
        own.contiguous(),
        torch.zeros_like(own).contiguous(),
        torch.full_like(own, n_blocks).contiguous(),
        *_query_range(own, n_key - n_query, n_key, block_size),
        _keys_in(torch.arange(n_blocks, device=device, dtype=torch.int32).expand(rows, -1), n_key, block_size),
        lead=(n_key - n_query) - first_block * block_size,
    )


def padded_layout(padding_mask: Tensor, n_query: int, block_size: int, width: int) -> BlockLayout:
    """Rows whose real tokens are one run each (`padding_mask [B, Nk]`), blocks counted from the first real token."""
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

    token, slot = _places(block, 0, length, start, n_key, block_size, width)
    query_token, query_slot = token, slot
    if skipped:
        query_token, query_slot = _places(own.long(), first_query, length, start, n_key, block_size, width, query_stop)
        query_token = torch.where(query_token >= 0, query_token - skipped, -1)
        position = torch.arange(skipped, n_key, device=padding_mask.device) - start
        shift = (first_query // block_size) * width
        query_slot = torch.where((position >= 0) & (position < length), position // block_size * width + position % block_size - shift, -1)
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
        0,
        token,
        slot,
        query_token,
        query_slot,
    )


def packed_layout(cu_seqlens: Tensor, n_tokens: int, block_size: int, width: int) -> BlockLayout:
    """One row that holds all packed sequences, each starting a block of its own. No value is read back to the host."""
    bounds = cu_seqlens.long()
    n_sequences = bounds.numel() - 1
    n_blocks = n_query_blocks(n_tokens, n_tokens, block_size, False, n_sequences)  # a bound: data decides how many of them are in use
    lengths, device = bounds.diff(), bounds.device
    after = (-(-lengths // block_size)).cumsum(0)  # one past each sequence's last block
    before = after - (-(-lengths // block_size))

    block = torch.arange(n_blocks, device=device)
    of_block = torch.searchsorted(after, block, right=True).clamp(max=n_sequences - 1)
    local = block - before[of_block]
    keys = (lengths[of_block] - local * block_size).clamp(0, block_size)
    offset = torch.arange(width, device=device)
    token = torch.where(offset < keys[:, None], (bounds[of_block] + local * block_size)[:, None] + offset, -1)

    position = torch.arange(n_tokens, device=device)
    of_token = torch.searchsorted(bounds[1:].contiguous(), position, right=True).clamp(max=n_sequences - 1)
    position = position - bounds[of_token]
    slot = (before[of_token] + position // block_size) * width + position % block_size

    token, slot, keys = token.view(1, -1), slot.view(1, -1), keys.int().view(1, -1)
    return BlockLayout(
        block_size,
        width,
        n_tokens,
        n_tokens,
        n_blocks,
        block.int().view(1, -1),
        before[of_block].int().view(1, -1),
        after[of_block].int().view(1, -1),
        torch.zeros_like(keys),
        keys,
        keys,
        0,
        token,
        slot,
        token,
        slot,
    )


def _query_range(block: Tensor, first: Tensor | int, end: Tensor | int, block_size: int) -> tuple[Tensor, Tensor]:
    """The slots of each block that hold positions from `first` to `end`."""
    start = (first - block * block_size).clamp(0, block_size)
    stop = torch.maximum((end - block * block_size).clamp(0, block_size), start)
    return start.int().contiguous(), stop.int().contiguous()


def _keys_in(block: Tensor, length: Tensor | int, block_size: int) -> Tensor:
    return (length - block * block_size).clamp(0, block_size).int().contiguous()


def _places(
    block: Tensor,
    first: Tensor | int,
    length: Tensor,
    start: Tensor,
    n_key: int,
    block_size: int,
    width: int,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The token at each slot of `block [B, *]` and the slot of each token, for rows that begin at token `start`."""
    offset = torch.arange(width, device=block.device)
    position = block[..., None] * block_size + offset
    real = (offset < block_size) & (position >= (first if isinstance(first, int) else first[..., None]))
    real = real & (position < length[..., None])
    if stop is not None:  # a block that the clamp repeated has no queries of its own
        real = real & (offset < stop[..., None])
    token = torch.where(real, position + start[..., None], -1).flatten(1)
    position = torch.arange(n_key, device=block.device) - start
    slot = torch.where((position >= 0) & (position < length), position // block_size * width + position % block_size, -1)
    return token, slot
