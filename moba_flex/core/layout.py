"""The position of every token after sequences are split into blocks.

All fast implementations use one layout. A row (one batch element, or all packed sequences together) consists of blocks. A block has
`width` slots, the first `block_size` of which are for tokens. Each sequence starts a new block at its first real token, so left padding,
right padding, packed sequences, odd lengths and odd block sizes are all handled alike.

The tokens of a block are contiguous. A kernel that gets the first token of each block (`key_token`, `query_token`) reads and writes tokens
in place. Other code needs a tensor of slots, which is a copy (`key_slots`, `query_slots`) unless tokens are already in this order;
`in_slots` is the layout of these tensors.

Queries have blocks of their own. If they are the last tokens of packed sequences, most of a block would often be empty. A query block is
then a tile of only `tile` slots, which still belongs to exactly one own block.

B batch rows, C key blocks per row, Q query blocks per row, P slots per block (`width`), N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .allocation import allocate_persistent
from .strides import empty_with_strides_of, keep_strides, tokens_first
from .take import take

T = TypeVar("T")
Form: TypeAlias = tuple[tuple[tuple[str, int], ...], tuple[Hashable, ...]]  # (name, tensor index) of tensor fields, and the other fields


def slots_per_block(block_size: int) -> int:
    """The block width on a GPU, which tiles divide: a power of two from 16 to 64, then a multiple of 64."""
    if block_size > 64:
        return -(-block_size // 64) * 64
    return max(16, 1 << (block_size - 1).bit_length())


def clamp_block_size(block_size: int, n_key: int) -> int:
    """An equivalent smaller block size if all keys fit into one block: the next power of two, at least 128.

    A short prompt is then not padded to a long block, and prompts of different lengths share a few sizes.
    """
    size = 128
    while size < block_size and size < n_key:  # `n_key` may be symbolic: compare it only if necessary
        size *= 2
    return min(size, block_size)


class IndexMaps(NamedTuple):
    """Index maps between tokens and slots. All are int64; -1 means none."""

    token_of_key_slot: Tensor  # [B, C * P]
    slot_of_key: Tensor  # [B, Nk]
    token_of_query_slot: Tensor
    slot_of_query: Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The position of every token, and the blocks that each query block may read. All tensors are int32."""

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
    block_keys: Tensor  # [B, C] number of real keys of each block
    query_token: Tensor  # [B, Q] query index of the first slot of each query block; negative if that slot precedes the first query
    key_token: Tensor  # [B, C] key index of the first slot of each block
    lead: int  # number of slots before the first query, if that is the same for all rows
    dense: bool = True  # whether tokens are in order, without padding and as one sequence per row
    covers: bool = True  # whether every token is in a block: padding is not
    persistent: bool = False  # whether later calls reuse it and its cached values
    tile: int | None = None  # slots of a query block; None: `width`
    offset: Tensor | None = None  # [B, Q] the slot of its own block at which a query block begins; None: 0
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def n_query_blocks(self) -> int:
        return self.own.shape[1]

    @property
    def query_width(self) -> int:
        """Slots of a query block."""
        return self.width if self.tile is None else self.tile

    @property
    def whole(self) -> bool:
        """Whether every block that a causal query can be routed to has no empty slot (past blocks are complete)."""
        return self.width == self.block_size

    @property
    def is_full(self) -> bool:
        """Whether queries are in order, and no slot of a query block is empty."""
        return self.dense and self.whole and self.lead == 0 and self.n_query % self.query_width == 0

    @property
    def index_maps(self) -> IndexMaps | None:
        """The index maps, or None if tokens are in order and blocks have no empty slots. Computed on first use."""
        if self.dense and self.whole:
            return None
        return self.cached(("index_maps",), self._index_maps)

    def _index_maps(self) -> IndexMaps:
        keys = _tokens_of_slots(self.key_token, torch.zeros_like(self.block_keys), self.block_keys, self.width)
        of_keys = keys, _inverse(keys, self.n_key)
        if self.query_token is self.key_token:  # all keys are queries too
            return IndexMaps(*of_keys, *of_keys)
        queries = _tokens_of_slots(self.query_token, self.query_start, self.query_stop, self.query_width)
        return IndexMaps(*of_keys, queries, _inverse(queries, self.n_query))

    def cached(self, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """The result of `make`, cached with the layout. It must depend on the layout and `name` only."""
        if name not in self._cache:
            if self.persistent:
                self._cache[name] = allocate_persistent(make, self.own.device)
            else:
                with torch.inference_mode(False):
                    self._cache[name] = make()
        return self._cache[name]

    def flatten(self) -> tuple[Form, tuple[Tensor, ...], BlockLayout]:
        """Flattens the layout: its form (names, other fields), its distinct tensors, and a copy without cached values."""
        tensors, numbers, places = list[Tensor](), list[Hashable](), list[tuple[str, int]]()
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                place = next((i for i, other in enumerate(tensors) if other is x), len(tensors))
                if place == len(tensors):
                    tensors.append(x)
                places.append((name, place))
            elif name not in ("_cache", "persistent"):
                numbers.append(x)
        form = tuple(places), tuple(numbers)
        return form, tuple(tensors), self.unflatten(form, tensors)

    def unflatten(self, form: Form, tensors: Sequence[Tensor]) -> BlockLayout:
        """The inverse of `flatten`, with other tensors. The result is not persistent."""
        fields: dict[str, Any] = {name: tensors[place] for name, place in form[0]}
        return replace(self, _cache={}, persistent=False, **fields)

    def key_slots(self, x: Tensor, like_tokens: bool = False) -> Tensor:
        """`[B, G, Nk, D]` -> `[B, G, C * P, D]`, zeros in slots without a token. Strides as in `query_slots`."""
        if (index_maps := self.index_maps) is not None:
            return take(x, index_maps.token_of_key_slot)
        return self._spread(x, 0, self.n_key_blocks, like_tokens)

    def query_slots(self, x: Tensor, like_tokens: bool = False) -> Tensor:
        """`[B, H, Nq, ...]` -> `[B, H, Q * P, ...]`, zeros in slots without a token.

        A copy is contiguous; with `like_tokens`, if tokens are in order, it has the stride order of `x`.
        """
        if (index_maps := self.index_maps) is not None:
            return take(x, index_maps.token_of_query_slot)
        return self._spread(x, self.lead, self.n_query_blocks, like_tokens)

    def key_tokens(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """The inverse of `key_slots`; zeros at padding. Strides as in `query_tokens`."""
        if (index_maps := self.index_maps) is not None:
            return take(x, index_maps.slot_of_key, into=None if like is None else empty_with_strides_of(like, self.n_key, x.shape[3]))
        return self._collect(x, 0, self.n_key)

    def query_tokens(self, x: Tensor, fill: float = 0, like: Tensor | None = None) -> Tensor:
        """The inverse of `query_slots`; `fill` at padding. A result gathered by index has the stride order of `like`, if given."""
        if (index_maps := self.index_maps) is not None:
            into = None if like is None else empty_with_strides_of(like, self.n_query, x.shape[3])
            return take(x, index_maps.slot_of_query, fill, into)
        return self._collect(x, self.lead, self.n_query)

    def in_slots(self) -> BlockLayout:
        """The layout of the tensors that `key_slots` and `query_slots` return."""

        def make() -> BlockLayout:
            query, key = (
                (torch.arange(n, device=self.own.device, dtype=torch.int32) * width).expand(self.own.shape[0], -1).contiguous()
                for n, width in ((self.n_query_blocks, self.query_width), (self.n_key_blocks, self.width))
            )
            return replace(self, _cache={}, query_token=query, key_token=key)

        return self.cached(("in slots",), make)

    def slots(self, blocks: slice) -> slice:
        """The query slots of the query blocks `blocks`."""
        return slice(blocks.start * self.query_width, blocks.stop * self.query_width)

    def part(self, rows: slice, blocks: slice) -> BlockLayout:
        """The layout of some rows and query blocks. It moves no data: tensors are already in place or in slots."""
        if (rows.stop - rows.start, blocks.stop - blocks.start) == self.own.shape:
            return self
        of_query = ("own", "first", "end", "query_start", "query_stop", "query_token", *(() if self.offset is None else ("offset",)))

        def make() -> BlockLayout:
            cut = {name: getattr(self, name)[rows, blocks].contiguous() for name in of_query}
            if blocks.start:  # only tensors in slots are split at blocks
                cut["query_token"] = cut["query_token"] - self.query_width * blocks.start
            return replace(self, _cache={}, block_keys=self.block_keys[rows], key_token=self.key_token[rows], **cut)

        return self.cached((rows.start, rows.stop, blocks.start, blocks.stop), make)

    def last_own(self, query_block: int) -> int:
        """An upper bound on the own block of `query_block` in any row, without reading data."""
        if self.tile is not None or (not self.dense and self.n_query != self.n_key):
            return self.n_key_blocks - 1
        return self.n_key_blocks - self.n_query_blocks + query_block

    def max_pairs(self, count: int, causal: bool, blocks: slice | None = None) -> int:
        """An upper bound on the (query, block) pairs of one row and head, exact for `dense` layouts. `blocks`: of these query blocks only.

        Each query is routed to `count` blocks, or to all that it may read if these are fewer.
        """
        count, blocks = min(count, self.n_key_blocks), blocks or slice(0, self.n_query_blocks)
        if not self.dense:
            return min(self.n_query, (blocks.stop - blocks.start) * min(self.block_size, self.query_width)) * count
        own, before = self.n_key_blocks - self.n_query_blocks, self.n_key - self.n_query
        first, last = own + blocks.start, own + blocks.stop
        pairs = (min(last * self.block_size, self.n_key) - max(first * self.block_size, before)) * count
        for block in range(first, min(last, count)) if causal else ():
            start = max(block * self.block_size, before)
            pairs -= (min((block + 1) * self.block_size, self.n_key) - start) * (count - block)
        return pairs

    def _spread(self, x: Tensor, lead: int, n_blocks: int, like_tokens: bool) -> Tensor:
        """Ordered tokens (dimension 2) -> slots of blocks without empty slots."""
        tail = n_blocks * self.block_size - lead - x.shape[2]
        if not lead and not tail:
            return x
        if like_tokens and tokens_first(x):
            return F.pad(x.transpose(1, 2), (*(0, 0) * (x.dim() - 2), lead, tail)).transpose(1, 2)
        return F.pad(x, (*(0, 0) * (x.dim() - 3), lead, tail))

    def _collect(self, x: Tensor, lead: int, n_tokens: int) -> Tensor:
        """Slots of blocks without empty slots (dimension 2) -> ordered tokens."""
        if n_tokens == x.shape[2]:
            return keep_strides(x)
        # A copy even if the slice is contiguous (one head of one row): torch.compile assumes the alignment of new memory.
        if tokens_first(x):
            return x.transpose(1, 2).narrow(1, lead, n_tokens).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        return x.narrow(2, lead, n_tokens).clone(memory_format=torch.contiguous_format)


def _tokens_of_slots(first: Tensor, start: Tensor, stop: Tensor, width: int) -> Tensor:
    """The token in each of the `width` slots of the blocks: `first [B, n]` in slot 0, -1 outside `start` to `stop`."""
    slot = torch.arange(width, device=first.device)
    token = first.long()[..., None] + slot
    return torch.where((slot >= start[..., None]) & (slot < stop[..., None]), token, -1).flatten(1)


def _inverse(token: Tensor, n: int) -> Tensor:
    """`[B, slots]` -> `[B, n]`: the slot of each token, -1 if it has none."""
    slot = torch.arange(token.shape[1], device=token.device).expand_as(token)
    none = torch.full((token.shape[0], n + 1), -1, device=token.device)  # the last one takes slots without a token
    return none.scatter_(1, torch.where(token < 0, n, token), slot)[:, :n].contiguous()
