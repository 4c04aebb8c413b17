"""The place of every token once sequences are cut into blocks.

All fast implementations work on one layout: a row (one batch element, or all packed sequences together) is a line of blocks, a
block is `width` slots, the first `block_size` of them for tokens. Each sequence starts a block of its own, at its first real token,
so padding on the left, padding on the right, packed sequences, odd lengths and odd block sizes all look alike from here on.

The tokens of a block are one run. So a kernel that is told where each run begins (`key_token`, `query_token`) reads and writes tokens
where they lie. What wants a tensor of slots gets a copy (`key_slots`, `query_slots`), unless tokens are in this order already, and
`in_slots` is the layout of such copies.

Queries lie in blocks of their own. Where they are the last tokens of packed sequences, most of a block would often be empty: a query
block then is a tile of fewer slots, `tile`, which has one own block all the same.

B rows, C key blocks per row, Q query blocks per row, P slots per block (`width`), N tokens.
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
Form: TypeAlias = tuple[tuple[tuple[str, int], ...], tuple[Hashable, ...]]  # which tensor each field is, and the other fields


def slots_per_block(block_size: int) -> int:
    """The width a GPU tile can be cut from: a power of two from 16 to 64, then multiples of 64."""
    if block_size > 64:
        return -(-block_size // 64) * 64
    return max(16, 1 << (block_size - 1).bit_length())


def one_block(block_size: int, n_key: int) -> int:
    """A smaller block size that means the same when all keys are in one block: the next power of two, from 128 on.

    A short prompt is then not padded to a long block, and prompts of many lengths share a few sizes.
    """
    size = 128
    while size < block_size and size < n_key:  # a length that is a symbol is asked only where it matters
        size *= 2
    return min(size, block_size)


class Moves(NamedTuple):
    """Between tokens and slots. All are int64, -1 where there is none."""

    token_of_key_slot: Tensor  # [B, C * P]
    slot_of_key: Tensor  # [B, Nk]
    token_of_query_slot: Tensor
    slot_of_query: Tensor


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
    query_token: Tensor  # [B, Q] the query in the first slot of each query block, or that would be in it: it can be below 0
    key_token: Tensor  # [B, C] the key in the first slot of each block
    lead: int  # how many slots precede the first query, where that is the same for all rows
    dense: bool = True  # whether tokens are in order, without padding and as one sequence per row
    covers: bool = True  # whether every token is in a block: padding is not
    persistent: bool = False  # whether later calls use it too, and so what it caches
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
        """Whether every block that a causal query can be routed to fills all its slots (past blocks are full of tokens)."""
        return self.width == self.block_size

    @property
    def moves(self) -> Moves | None:
        """How tokens go to slots; None where they are in order and blocks are full. Made when something is copied first."""
        if self.dense and self.whole:
            return None
        return self.cached(("moves",), self._moves)

    def _moves(self) -> Moves:
        keys = _tokens_of_slots(self.key_token, torch.zeros_like(self.block_keys), self.block_keys, self.width)
        of_keys = keys, _inverse(keys, self.n_key)
        if self.query_token is self.key_token:  # all keys are queries too
            return Moves(*of_keys, *of_keys)
        queries = _tokens_of_slots(self.query_token, self.query_start, self.query_stop, self.query_width)
        return Moves(*of_keys, queries, _inverse(queries, self.n_query))

    def cached(self, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What `make` returns, cached with the layout: it must follow from the layout and `name` alone."""
        if name not in self._cache:
            if self.persistent:
                self._cache[name] = allocate_persistent(make, self.own.device)
            else:
                with torch.inference_mode(False):
                    self._cache[name] = make()
        return self._cache[name]

    def taken_apart(self) -> tuple[Form, tuple[Tensor, ...], BlockLayout]:
        """All that makes the layout what it is: in numbers and names, and in tensors, each once; and itself without what it has cached."""
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
        return form, tuple(tensors), self.put_together(form, tensors)

    def put_together(self, form: Form, tensors: Sequence[Tensor]) -> BlockLayout:
        """A layout of this form of other tensors. What is worked out for it is not kept for later calls."""
        fields: dict[str, Any] = {name: tensors[place] for name, place in form[0]}
        return replace(self, _cache={}, persistent=False, **fields)

    def key_slots(self, x: Tensor, like_tokens: bool = False) -> Tensor:
        """`[B, G, Nk, D]` -> `[B, G, C * P, D]`, zeros where no token is. Strides as of `query_slots`."""
        if (moves := self.moves) is not None:
            return take(x, moves.token_of_key_slot)
        return self._spread(x, 0, self.n_key_blocks, like_tokens)

    def query_slots(self, x: Tensor, like_tokens: bool = False) -> Tensor:
        """`[B, H, Nq, ...]` -> `[B, H, Q * P, ...]`, zeros where no token is.

        A copy has its heads one after another; with `like_tokens`, where tokens are in order, it has the strides of `x`.
        """
        if (moves := self.moves) is not None:
            return take(x, moves.token_of_query_slot)
        return self._spread(x, self.lead, self.n_query_blocks, like_tokens)

    def key_tokens(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """The inverse of `key_slots`; zeros at padding. Strides as of `query_tokens`."""
        if (moves := self.moves) is not None:
            return take(x, moves.slot_of_key, into=None if like is None else empty_with_strides_of(like, self.n_key, x.shape[3]))
        return self._collect(x, 0, self.n_key)

    def query_tokens(self, x: Tensor, fill: float = 0, like: Tensor | None = None) -> Tensor:
        """The inverse of `query_slots`; `fill` at padding. A copy of what is out of order has the strides of `like`, if given."""
        if (moves := self.moves) is not None:
            into = None if like is None else empty_with_strides_of(like, self.n_query, x.shape[3])
            return take(x, moves.slot_of_query, fill, into)
        return self._collect(x, self.lead, self.n_query)

    def in_slots(self) -> BlockLayout:
        """The same for copies that `key_slots` and `query_slots` made."""

        def make() -> BlockLayout:
            query, key = (
                (torch.arange(n, device=self.own.device, dtype=torch.int32) * width).expand(self.own.shape[0], -1).contiguous()
                for n, width in ((self.n_query_blocks, self.query_width), (self.n_key_blocks, self.width))
            )
            return replace(self, _cache={}, query_token=query, key_token=key)

        return self.cached(("in slots",), make)

    def slots(self, blocks: slice) -> slice:
        """The query slots of some query blocks."""
        return slice(blocks.start * self.query_width, blocks.stop * self.query_width)

    def part(self, rows: slice, blocks: slice) -> BlockLayout:
        """The same for some of the rows and query blocks. It moves nothing: tokens, or copies in slots, are where they are by then."""
        if (rows.stop - rows.start, blocks.stop - blocks.start) == self.own.shape:
            return self
        of_query = ("own", "first", "end", "query_start", "query_stop", "query_token", *(() if self.offset is None else ("offset",)))

        def make() -> BlockLayout:
            cut = {name: getattr(self, name)[rows, blocks].contiguous() for name in of_query}
            if blocks.start:  # of copies in slots, since only these are cut at blocks
                cut["query_token"] = cut["query_token"] - self.query_width * blocks.start
            return replace(self, _cache={}, block_keys=self.block_keys[rows], key_token=self.key_token[rows], **cut)

        return self.cached((rows.start, rows.stop, blocks.start, blocks.stop), make)

    def last_own(self, query_block: int) -> int:
        """A bound, known without reading data, of the own block of `query_block` in any row."""
        if self.tile is not None or (not self.dense and self.n_query != self.n_key):
            return self.n_key_blocks - 1
        return self.n_key_blocks - self.n_query_blocks + query_block

    def max_pairs(self, count: int, causal: bool, blocks: slice | None = None) -> int:
        """A bound on the (query, block) pairs of one row and head when each query is routed to `count` blocks, or to all it may
        read where those are fewer; exact without padding. `blocks`: of these query blocks alone."""
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
        """Tokens in order, dimension 2, to slots of full blocks."""
        tail = n_blocks * self.block_size - lead - x.shape[2]
        if not lead and not tail:
            return x
        if like_tokens and tokens_first(x):
            return F.pad(x.transpose(1, 2), (*(0, 0) * (x.dim() - 2), lead, tail)).transpose(1, 2)
        return F.pad(x, (*(0, 0) * (x.dim() - 3), lead, tail))

    def _collect(self, x: Tensor, lead: int, n_tokens: int) -> Tensor:
        """Slots of full blocks, dimension 2, to tokens in order."""
        if n_tokens == x.shape[2]:
            return keep_strides(x)
        # A copy even of what lies together, one head of one row: torch.compile takes it for aligned as new memory is.
        if tokens_first(x):
            return x.transpose(1, 2).narrow(1, lead, n_tokens).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        return x.narrow(2, lead, n_tokens).clone(memory_format=torch.contiguous_format)


def _tokens_of_slots(first: Tensor, start: Tensor, stop: Tensor, width: int) -> Tensor:
    """The token at each of the `width` slots of blocks, `first [B, n]` in slot 0; -1 outside of `start` to `stop`."""
    slot = torch.arange(width, device=first.device)
    token = first.long()[..., None] + slot
    return torch.where((slot >= start[..., None]) & (slot < stop[..., None]), token, -1).flatten(1)


def _inverse(token: Tensor, n: int) -> Tensor:
    """`[B, slots]` -> `[B, n]`: the slot of each token, -1 where it has none."""
    slot = torch.arange(token.shape[1], device=token.device).expand_as(token)
    none = torch.full((token.shape[0], n + 1), -1, device=token.device)  # the last one takes slots without a token
    return none.scatter_(1, torch.where(token < 0, n, token), slot)[:, :n].contiguous()
