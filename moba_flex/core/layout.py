"""Where tokens lie once every sequence is cut into blocks.

All fast implementations work on one layout: a row (one batch element, or all packed sequences together) is a line of blocks, a
block is `width` slots, the first `block_size` of them for tokens. Each sequence starts a block of its own, at its first real token,
so padding on the left, padding on the right, packed sequences, odd lengths and odd block sizes all look alike from here on.
When tokens already lie like this, nothing is copied.

B rows, C key blocks a row, Q query blocks a row, P slots a block (`width`), N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .allocation import allocate_persistent
from .strides import tokens_first
from .upstream import is_under_dispatch_mode

T = TypeVar("T")


def slots_per_block(block_size: int) -> int:
    """The width a GPU tile can be cut from: a power of two from 16 to 64, then multiples of 64."""
    if block_size > 64:
        return -(-block_size // 64) * 64
    return max(16, 1 << (block_size - 1).bit_length())


def one_block(block_size: int, n_key: int) -> int:
    """A smaller block size that means the same when all keys lie in one block: the next power of two, from 128 on.

    A short prompt is then not padded to a long block, and prompts of many lengths share a few sizes.
    """
    size = 128
    while size < block_size and size < n_key:  # a length that is a symbol is asked only where it matters
        size *= 2
    return min(size, block_size)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The place of every token, and what each query block may read. All tensors are int32 unless said otherwise."""

    block_size: int
    width: int
    n_key: int
    n_query: int
    n_key_blocks: int
    own: Tensor  # [B, Q] the key block that is this query block's own
    first: Tensor  # [B, Q] the first block of its sequence
    end: Tensor  # [B, Q] one past the last block of its sequence
    query_start: Tensor  # [B, Q] real queries are the slots query_start <= slot < query_stop of their block
    query_stop: Tensor
    block_keys: Tensor  # [B, C] how many real keys a block has
    lead: int  # how many slots precede the first query, where that is the same for all rows
    token_of_key_slot: Tensor | None = None  # [B, C * P] int64, -1 where no token is; None: tokens lie in order from slot 0
    slot_of_key: Tensor | None = None  # [B, Nk] int64, -1 for padding
    token_of_query_slot: Tensor | None = None
    slot_of_query: Tensor | None = None
    outlives: bool = False  # whether it is kept for later calls, and so what it keeps
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def n_query_blocks(self) -> int:
        return self.own.shape[1]

    @property
    def whole(self) -> bool:
        """Whether every block that a causal query can be routed to fills all its slots (past blocks are full of tokens)."""
        return self.width == self.block_size

    @property
    def dense(self) -> bool:
        """Whether tokens lie in order, without padding and as one sequence a row."""
        return self.token_of_key_slot is None

    def cached(self, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What `make` returns, kept with the layout: it must follow from the layout and `name` alone."""
        if name not in self._cache:
            if self.outlives:
                self._cache[name] = allocate_persistent(make, self.own.device)
            else:
                with torch.inference_mode(False):
                    self._cache[name] = make()
        return self._cache[name]

    def key_slots(self, x: Tensor) -> Tensor:
        """`[B, G, Nk, D]` -> `[B, G, C * P, D]`, zeros where no token is."""
        if self.token_of_key_slot is not None:
            return _take(x, self.token_of_key_slot)
        return self._spread(x, 2, 0, self.n_key_blocks)

    def query_slots(self, x: Tensor, keep_strides: bool = False) -> Tensor:
        """`[B, H, Nq, ...]` -> `[B, H, Q * P, ...]`, zeros where no token is.

        If it has to be copied, its heads come apart, unless it shall lie as `x` does and there is no padding.
        """
        if self.token_of_query_slot is not None:
            return _take(x, self.token_of_query_slot)
        if keep_strides and tokens_first(x):
            return self._spread(x.transpose(1, 2), 1, self.lead, self.n_query_blocks).transpose(1, 2)
        return self._spread(x, 2, self.lead, self.n_query_blocks)

    def key_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `key_slots`; zeros at padding."""
        if self.slot_of_key is not None:
            return _take(x, self.slot_of_key)
        return self._collect(x, 2, 0, self.n_key)

    def query_tokens(self, x: Tensor, fill: float = 0) -> Tensor:
        """The inverse of `query_slots`; `fill` at padding."""
        if self.slot_of_query is not None:
            return _take(x, self.slot_of_query, fill)
        if tokens_first(x):
            return self._collect(x.transpose(1, 2), 1, self.lead, self.n_query).transpose(1, 2)
        return self._collect(x, 2, self.lead, self.n_query)

    def slots(self, blocks: slice) -> slice:
        """The query slots of some query blocks."""
        return slice(blocks.start * self.width, blocks.stop * self.width)

    def part(self, rows: slice, blocks: slice) -> BlockLayout:
        """The same for some of the rows and query blocks. Only what works on slots is kept: tokens have been moved by then."""
        if (rows.stop - rows.start, blocks.stop - blocks.start) == self.own.shape:
            return self
        of_query = ("own", "first", "end", "query_start", "query_stop")

        def make() -> BlockLayout:
            cut = {name: getattr(self, name)[rows, blocks].contiguous() for name in of_query}
            return replace(self, _cache={}, block_keys=self.block_keys[rows], **cut)

        return self.cached((rows.start, rows.stop, blocks.start, blocks.stop), make)

    def last_own(self, query_block: int) -> int:
        """A bound, known without reading data, of the own block of `query_block` in any row."""
        if self.token_of_query_slot is not None and self.n_query != self.n_key:
            return self.n_key_blocks - 1
        return self.n_key_blocks - self.n_query_blocks + query_block

    def max_pairs(self, count: int, causal: bool, blocks: slice | None = None) -> int:
        """A bound on the (query, block) pairs of one row and head when each query is routed to `count` blocks, or to all it may
        read where those are fewer; exact without padding. `blocks`: of these query blocks alone."""
        count, blocks = min(count, self.n_key_blocks), blocks or slice(0, self.n_query_blocks)
        if self.token_of_query_slot is not None:
            return min(self.n_query, (blocks.stop - blocks.start) * self.block_size) * count
        own, before = self.n_key_blocks - self.n_query_blocks, self.n_key - self.n_query
        first, last = own + blocks.start, own + blocks.stop
        pairs = (min(last * self.block_size, self.n_key) - max(first * self.block_size, before)) * count
        for block in range(first, min(last, count)) if causal else ():
            start = max(block * self.block_size, before)
            pairs -= (min((block + 1) * self.block_size, self.n_key) - start) * (count - block)
        return pairs

    def _spread(self, x: Tensor, dim: int, lead: int, n_blocks: int) -> Tensor:
        """Tokens, dimension `dim`, to slots."""
        tail = n_blocks * self.block_size - lead - x.shape[dim]
        flat = (0, 0) * (x.dim() - 1 - dim)
        if lead or tail:
            x = F.pad(x, (*flat, lead, tail))
        if self.width > self.block_size:
            x = F.pad(x.unflatten(dim, (n_blocks, self.block_size)), (*flat, 0, self.width - self.block_size)).flatten(dim, dim + 1)
        return x

    def _collect(self, x: Tensor, dim: int, lead: int, n_tokens: int) -> Tensor:
        """Slots, dimension `dim`, to tokens."""
        if self.width > self.block_size:
            x = x.unflatten(dim, (-1, self.width)).narrow(dim + 1, 0, self.block_size).flatten(dim, dim + 1)
        return x.narrow(dim, lead, n_tokens).contiguous()


def _take(x: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """`out[b, h, i] = x[b, h, index[b, i]]`, `fill` where the index is -1."""
    shape = (index.shape[0], 1, index.shape[1]) + (1,) * (x.dim() - 3)
    index = index.view(shape)
    if x.shape[2] == 0:
        return x.new_full((*x.shape[:2], index.shape[2], *x.shape[3:]), fill)
    out = x.gather(2, index.clamp(min=0).expand(*x.shape[:2], -1, *x.shape[3:]))
    return out.masked_fill_(index < 0, fill)


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
    """Rows of equal length without padding; the queries are the last `n_query` of `n_key` positions. Kept for the next call."""
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
    return replace(allocate_persistent(lambda: _dense_layout(*settings), settings[-1]), outlives=True)


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
