"""The requests of one forward pass of continuous batching: what each of their tokens reads, and where the keys are stored.

All of it is computed on the host. Tensors for the device are created once per forward pass and shared by all layers.

T tokens of all requests, R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..backends.paths import reads_all_keys
from ..config import MobaConfig
from .upstream import fill_paged_mask

if TYPE_CHECKING:
    from .repeated_call import OriginalCall

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One request in one forward pass."""

    name: str
    past: int  # tokens before this pass
    new: int  # tokens of this pass
    prompt: int  # tokens of the prompt; later ones were generated
    pages: list[int]  # the pages of its keys


@dataclass(frozen=True)
class Slice:
    """Consecutive tokens of one request, and the keys up to the last of them."""

    row: int
    first: int  # index among the tokens of all requests
    n_query: int
    n_key: int


class Part:
    """Tokens of some requests that one computation serves."""

    def __init__(self, slices: list[Slice], batch: PagedBatch) -> None:
        self.slices, self._batch = slices, batch
        self.rows = [one.row for one in slices]
        self.n_query, self.n_key = [one.n_query for one in slices], [one.n_key for one in slices]
        self.is_whole = sum(self.n_query) == batch.n_tokens  # it has all tokens of the pass
        self.is_new = self.is_whole and self.n_query == self.n_key  # it reads no cached keys
        self._made: dict[object, Tensor] = {}

    def queries(self) -> Tensor:
        """`[Tp]`: the indices of the part's tokens among those of the pass."""
        return self._once("queries", lambda: torch.cat([torch.arange(one.first, one.first + one.n_query) for one in self.slices]))

    def slots(self) -> Tensor:
        """`[Tk]`: the slots of the part's keys, request by request."""

        def make() -> Tensor:
            n, total = torch.tensor(self.n_key, device=self._batch.device), sum(self.n_key)
            row, first = (x.repeat_interleave(n, output_size=total) for x in (self.row_index(), n.cumsum(0) - n))
            return self._batch.slots(row, torch.arange(total, device=n.device) - first)

        return self._once("slots", make)

    def lengths(self) -> Tensor:
        """`[R]` int64: the number of keys per request."""
        return self._once("lengths", lambda: torch.tensor(self.n_key))

    def pages(self) -> Tensor:
        """`[R, pages of the longest]` int64: the pages of each request, padded with an arbitrary page."""
        return self._once("pages", lambda: self._batch.pages()[self.row_index()])

    def row_index(self) -> Tensor:
        """`[R]`: the indices of these requests among those of the pass."""
        return self._once("rows", lambda: torch.tensor(self.rows))

    def cu_seqlens(self, lengths: list[int]) -> Tensor:
        """`[R + 1]` int32: the boundaries of sequences of these lengths."""
        return self._once(tuple(lengths), lambda: torch.tensor(_bounds(lengths), dtype=torch.int32))

    def cu_seqlens_of_both(self) -> Tensor:
        """`[2, R + 1]` int32: the boundaries of each request's queries and keys. One tensor, so that layers share its layout."""
        return self._once("both", lambda: torch.tensor([_bounds(self.n_query), _bounds(self.n_key)], dtype=torch.int32))

    def mask(self, n_key: list[int], window: int, dtype: torch.dtype) -> Tensor:
        """`[1, 1, Tp, Tk]`: the mask that "sdpa" and "eager" add to the scores, as transformers builds it."""

        def make() -> Tensor:
            size = 1, 1, sum(self.n_query), sum(n_key)
            mask = torch.full(size, torch.finfo(dtype).min, dtype=dtype, device=self._batch.device)
            fill_paged_mask(mask, _bounds(self.n_query), _bounds(n_key), window)
            return mask

        return self._once(("mask", tuple(n_key), window, dtype), make)

    def _once(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made:
            with torch.inference_mode(False):  # inference tensors have no version counter, which layouts are cached by
                self._made[name] = make().to(self._batch.device)
        return self._made[name]


@dataclass(frozen=True)
class Parts:
    """The tokens of a pass, grouped by what a layer with MoBA does with them."""

    full: Part | None  # they read all keys
    decoding: Part | None  # one token per request, whose blocks are chosen by stored means
    sparse: Part | None  # MoBA

    def __iter__(self) -> Iterator[Part | None]:
        return iter((self.full, self.decoding, self.sparse))


class PagedBatch:
    """The requests of one forward pass, in order."""

    def __init__(self, requests: list[Request], runs: list[int], page_size: int, stride: int, device: torch.device) -> None:
        self.requests, self.device = requests, device
        self.n_tokens = sum(request.new for request in requests)
        self.stride = stride  # slots from the start of one page to the start of the next
        self._runs, self._page_size = runs, page_size
        firsts = _bounds([request.new for request in requests])
        every = [Slice(i, firsts[i], request.new, request.past + request.new) for i, request in enumerate(requests)]
        self.whole = Part(every, self)
        self.original_call: OriginalCall | None = None  # what later layers may repeat
        self._made: dict[object, object] = {}

    def parts(self, settings: MobaConfig, naive: bool, has_means: bool) -> Parts:
        """The tokens of a pass, grouped by what a layer with MoBA does with them. `has_means`: block means are stored."""
        read = settings.block_size, settings.top_k, settings.decode, settings.implementation  # hashing all settings takes ten times as long
        return self._once(("parts", *read, naive, has_means), lambda: self._parted(settings, naive, has_means))

    def _parted(self, settings: MobaConfig, naive: bool, has_means: bool) -> Parts:
        full, decoding, sparse = list[Slice](), list[Slice](), list[Slice]()
        for request, every in zip(self.requests, self.whole.slices):
            n_full = min(max(every.n_key - request.prompt, 0), request.new) if settings.decode == "full" else 0
            if not naive and settings.implementation != "eager" and reads_all_keys(every.n_key, settings.block_size, settings.top_k):
                n_full = request.new  # the original attention computes this faster
            n_moba = request.new - n_full
            if n_moba:
                one = Slice(every.row, every.first, n_moba, request.past + n_moba)
                (decoding if has_means and n_moba == 1 and not naive else sparse).append(one)
            if n_full:
                full.append(Slice(every.row, every.first + n_moba, n_full, every.n_key))
        return Parts(*(Part(slices, self) if slices else None for slices in (full, decoding, sparse)))

    def pages(self) -> Tensor:
        """`[R, pages of the longest]` int64, padded with 0, which is no request's page."""

        def make() -> Tensor:
            most = max(len(request.pages) for request in self.requests)
            return torch.tensor([request.pages + [0] * (most - len(request.pages)) for request in self.requests]).to(self.device)

        return self._once("pages", make)

    def slots(self, rows: Tensor, token: Tensor) -> Tensor:
        """The slots of the keys of tokens of requests."""
        return self.pages()[rows, token // self._page_size] * self.stride + token % self._page_size

    def runs(self, length: int) -> tuple[Tensor, Tensor]:
        """`[runs]` and `[runs, length]`: the runs of tokens whose means are to be computed, and the slots of their keys."""

        def make() -> tuple[Tensor, Tensor]:
            runs, per_page = torch.tensor(self._runs, dtype=torch.int64), self._page_size // length
            first = runs // per_page * self.stride + runs % per_page * length
            return runs.to(self.device), (first[:, None] + torch.arange(length)).to(self.device)

        return self._once("runs", make)

    def _once(self, name: object, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]  # type: ignore[return-value]


def _bounds(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]
