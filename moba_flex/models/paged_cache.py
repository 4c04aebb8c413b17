"""The paged key cache of continuous batching, and the block means beside it.

transformers assigns cache pages to a request, for the keys of all layers. It shares full pages among requests with the same prefix, and
reclaims pages. Once per forward pass it says which requests take part; then each layer writes its new keys. Here layers with full attention
are given only their new keys, and read what they need from the pages.

Means are stored per page, not per request, so requests share them as they share pages. They are never stale:

- A request gets a page in one of two ways. A newly allocated page counts as unknown. A shared page is full and does not change.
- The content of a page changes in one of two ways. Layers write new keys: the means of the runs that they complete are then computed from
  the page. Keys are copied to newly allocated pages: these count as unknown, so their means are computed before they are first read.

G key heads, P tokens per block, C blocks, D head dimension, R requests.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MobaConfig
from ..ops.decoding import mean_dtype
from ..ops.gate import means_of
from ..ops.pages import Pages
from .paged_batch import PagedBatch, Part, Request
from .upstream import PagedAttentionCache, RequestState, pages_of_full_attention, pages_of_layer, prompt_length, window_of

PAGED = "moba_paged"  # the keyword argument that passes a layer's keys to the attention function
LEAST_RUN = 16  # means of shorter runs would take more than an eighth of the keys' memory


class PagedKeys(NamedTuple):
    """The keys and values that one layer reads in one forward pass."""

    batch: PagedBatch
    means: PageMeans | None  # None: layers with windows, or no means are stored
    layer_idx: int
    given: tuple[Tensor, Tensor]  # [1, G, T, D], [1, G, T, Dv]: what the layer got, new keys and values; with a window also older ones
    key: Tensor  # [slots, G, D]: the pages as tokens
    value: Tensor  # [slots, G, Dv]
    window: int  # the number of tokens that the layer sees; 1: all
    length: Callable[[int, int], int]  # past and new tokens of a request -> number of its keys that the layer reads

    def are_all_of(self, key: Tensor, value: Tensor) -> bool:
        """Whether the layer attends to all keys, and with the ones that it got."""
        return self.window == 1 and key is self.given[0] and value is self.given[1]

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        """`[1, G, Tk, D]`, `[1, G, Tk, Dv]`: all keys and values of a part, request by request."""
        if self.window != 1 or part.is_new:
            return self.given
        slots = part.slots()
        return self.key.index_select(0, slots).transpose(0, 1)[None], self.value.index_select(0, slots).transpose(0, 1)[None]


class PageMeans:
    """The mean key of each run of tokens within a page, and which of them are known.

    A run is the greatest common divisor of the block and page sizes: blocks and pages consist of whole runs.
    """

    def __init__(self, block_size: int, page_size: int, n_pages: int) -> None:
        self.run = gcd(block_size, page_size)
        self._page_size, self._n_runs = page_size, n_pages * (page_size // self.run)
        self._known: dict[int, int] = {}  # per page: how many of its tokens the means reflect
        self._means: dict[int, Tensor] = {}  # per layer: [runs, G, D]

    def forget(self, pages: list[int]) -> None:
        """Forget newly allocated pages, whose content is unknown."""
        for page in pages:
            self._known.pop(page, None)

    def to_compute(self, request: Request) -> list[int]:
        """The runs to compute once a request has written its new keys. They count as known from now on."""
        runs, per_page = list[int](), self._page_size // self.run
        for i, page in enumerate(request.pages):
            known = self._known.get(page, 0)
            if known == self._page_size and (i + 1) * known <= request.past:  # true of nearly all pages
                continue
            before = min(max(request.past - i * self._page_size, 0), self._page_size)
            after = min(max(request.past + request.new - i * self._page_size, 0), self._page_size)
            first = min(known, before) // self.run
            runs += range(page * per_page + first, page * per_page + after // self.run)
            self._known[page] = after
        return runs

    def update_means(self, keys: PagedKeys) -> None:
        """Compute the means that a layer's new keys complete. Most passes of generated tokens complete none."""
        runs, slots = keys.batch.runs(self.run)
        if not runs.numel():
            return
        with torch.no_grad():
            of_runs = keys.key[slots].transpose(1, 2)  # [runs, G, run, D]
            self._of_layer(keys).index_copy_(0, runs, means_of(of_runs, self.run))

    def _of_layer(self, keys: PagedKeys) -> Tensor:
        """`[runs, G, D]`: the means of a layer."""
        if keys.layer_idx not in self._means:
            with torch.inference_mode(False):
                shape = (self._n_runs, *keys.key.shape[1:])
                self._means[keys.layer_idx] = keys.key.new_zeros(shape, dtype=mean_dtype(keys.key))
        return self._means[keys.layer_idx]

    def pages_of(self, keys: PagedKeys, part: Part) -> Pages:
        """The keys, values and means of a part's requests, up to the last of its tokens."""
        place = self._page_size, keys.batch.stride, self.run
        return Pages(keys.key, keys.value, self._of_layer(keys), part.pages(), part.lengths(), max(part.n_key), *place)


class MobaPagedCache(PagedAttentionCache):
    """transformers' paged cache, for models with MoBA. `adopt` changes the class of an existing object to this one."""

    _find: Callable[[str], RequestState]
    _check: Callable[[], None]
    _settings: MobaConfig
    _means: PageMeans | None
    _requests: list[Request]
    _batch: PagedBatch | None

    def serve(self, settings: MobaConfig, find: Callable[[str], RequestState], check: Callable[[], None]) -> None:
        """Set what the cache serves.

        `find` returns a request by its name. `check` raises if the model's attention was switched.
        """
        self._find, self._check, self._settings = find, check, settings
        self._requests, self._batch, self._means = [], None, None
        allocator = pages_of_full_attention(self)
        page_size = allocator.tokens_per_page
        if settings.decode == "sparse" and gcd(settings.block_size, page_size) >= LEAST_RUN:
            n_pages = allocator.cache_tensor.shape[0] // page_size  # an upper bound
            self._means = PageMeans(settings.block_size, page_size, n_pages // allocator.pages_per_block)

    @property
    def last_batch(self) -> PagedBatch:
        """The requests of the forward pass that was prepared last."""
        if self._batch is None:
            allocator = pages_of_full_attention(self)
            runs = [run for request in self._requests for run in self._means.to_compute(request)] if self._means is not None else []
            place = allocator.tokens_per_page, allocator.block_physical_stride, torch.device(self.device)
            self._batch = PagedBatch(self._requests, runs, *place)
        return self._batch

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        table = pages_of_full_attention(self).block_table
        before = len(table.get(state.request_id, ()))
        stored = super().can_store_request_tokens(state, request_len, dry_run)
        if self._means is not None and not dry_run:
            self._means.forget(table.get(state.request_id, [])[before:])
        return stored

    def prepare_fork_request(self, src_state: RequestState, dst_req_ids: list[str], copy_src_and_dst: Any) -> list[str]:
        forked = super().prepare_fork_request(src_state, dst_req_ids, copy_src_and_dst)
        table = pages_of_full_attention(self).block_table
        if self._means is not None:
            shared = set(table[src_state.request_id])
            for name in forked:
                self._means.forget([page for page in table[name] if page not in shared])
        return forked

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        return super().search_prefix_match(request_id, prompt_ids[: self._n_shareable(self._find(request_id))])

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        n = self._n_shareable(state)
        super().mark_complete_blocks(state if n is None else _Beginning(state, n), complete_blocks)  # type: ignore[arg-type]

    def _n_shareable(self, state: RequestState) -> int | None:
        """The number of a request's first tokens whose keys any request with these tokens has; None: all.

        With `decode="full"` generated tokens read all keys. The same tokens in a later prompt use MoBA.
        """
        return prompt_length(state) if self._settings.decode == "full" else None

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: list[list[int]] | None, write_index: list[list[int]]
    ) -> None:
        if not any(write_index):  # the first request of a forward pass
            self._check()
            self._requests, self._batch = [], None
        full = pages_of_full_attention(self)
        pages = full.block_table[request_id][: -(-(past_length + query_length) // full.tokens_per_page)]
        self._requests.append(Request(request_id, past_length, query_length, prompt_length(self._find(request_id)), pages))
        for allocator, writes in zip(self.cache_allocators.values(), write_index):
            writes.extend(allocator.get_write_indices(request_id, past_length, query_length))
        if read_index is not None:
            for allocator, reads in zip(self.cache_allocators.values(), read_index):
                if allocator is not full:  # its layers read what they need from the pages
                    reads.extend(allocator.get_read_indices(request_id, past_length, query_length))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, layer_idx, kwargs)
        window, length = window_of(self, layer_idx), self.layer_to_allocator[layer_idx].get_seqlen_k
        means = self._means if window == 1 else None
        kwargs[PAGED] = PagedKeys(self.last_batch, means, layer_idx, (key, value), *pages_of_layer(self, layer_idx), window, length)
        return key, value


class _Beginning:
    """The first tokens of a request, for the code that determines which of its pages are full."""

    def __init__(self, state: RequestState, n_tokens: int) -> None:
        self.request_id, self.status = state.request_id, state.status
        self.initial_tokens, self.generated_tokens = state.initial_tokens[:n_tokens], list[int]()


def adopt(cache: PagedAttentionCache, settings: MobaConfig, find: Callable[[str], RequestState], check: Callable[[], None]) -> None:
    """Let a new paged cache serve a model with MoBA."""
    cache.__class__ = MobaPagedCache
    assert isinstance(cache, MobaPagedCache)
    cache.serve(settings, find, check)
