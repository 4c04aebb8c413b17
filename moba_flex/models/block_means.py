"""Block means beside a key cache.

They lie on the cache layer itself, whose class is extended so that whatever moves keys moves their means too. Three things make means that
are out of date impossible to miss: every `update` is noted, and two in a row without an attention that took the new keys in between
(another model, full attention for a while) mean that all are computed again; so does a key tensor that is not the one last seen (somebody
else replaced it); and so do other settings or other padding.

B rows, G key heads, N tokens, C blocks, D head dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, QuantizedLayer, StaticLayer

from ..core.upstream import mark_static_address
from ..ops.decoding import mean_dtype, means_for, write_means
from .state import means_beside, put_means
from .upstream import quantized_keys, reads_as_it_lies

if TYPE_CHECKING:
    from .upstream import AttentionLayer


class BlockMeans:
    """The means of one cache layer's key blocks: `means [B, G, C, D]`, see `moba_flex.decoding`."""

    def __init__(self) -> None:
        self.means: Tensor | None = None
        self.block_size = 0
        self.starts: tuple[int, ...] | None = None  # each row's first real token; None: 0 for all rows
        self.stale = True  # some keys were written or moved that the means do not know
        self._waiting = False  # keys were written and not taken in yet
        self._keys: weakref.ref[Tensor] | None = None
        self._quantized: tuple[object, int] | None = None  # of a quantized cache: what the keys were made of, and how many they were

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy or pickle of a cache computes its means again

    def __setstate__(self, state: dict[str, Any]) -> None:
        BlockMeans.__init__(self)

    def check(self, keys: Tensor | None) -> None:
        """Are the cache layer's keys still the ones last noted?"""
        if not torch.compiler.is_compiling() and (None if self._keys is None else self._keys()) is not keys:
            self.stale = True

    def note(self, keys: Tensor | None) -> None:
        """These are the cache layer's keys now."""
        if not torch.compiler.is_compiling():  # while compiling there is only a static cache, which writes its keys in place
            self._keys = None if keys is None else weakref.ref(keys)

    def check_quantized(self, quantized: object | None, length: int, n_new: int) -> None:
        """`length` keys, `n_new` of them new, were made of this; are the others still those that were seen last?"""
        self.stale = self._quantized is None or self._quantized[0] is not quantized or self._quantized[1] != length - n_new
        self._quantized = None if quantized is None else (quantized, length)

    def expect(self) -> None:
        """New keys are about to be written."""
        self.stale = self.stale or self._waiting
        self._waiting = True

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Rows of the batch change places."""
        if self.means is None:
            return
        with torch.inference_mode(False):
            means = self.means[rows.to(self.means.device)]
            self.means = self.means.copy_(means) if means.shape == self.means.shape else means
        if self.starts is not None:
            self.starts = tuple(self.starts[row] for row in rows.tolist())

    @torch.no_grad()
    def of_all_but_new(self, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None) -> Tensor | None:
        """The means of `key [B, G, N, D]`, right for all blocks but those that its newest tokens complete: the caller writes these.

        None if there is no room for them, which only happens while a graph is traced.
        """
        if not torch.compiler.is_compiling():
            self._make_room(key, block_size, starts)
        elif self.means is None or (self.block_size, self.means.shape[2]) != (block_size, _blocks(key, block_size)):
            return None
        assert self.means is not None
        if self.stale:
            write_means(self.means, key.detach(), start, block_size)
        self.stale = self._waiting = False
        return self.means

    @torch.no_grad()
    def take_in(self, new: int, length: int, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None) -> None:
        """Write the means of all blocks that the last `new` of `length` tokens complete, and of all others that are not right."""
        self._make_room(key, block_size, starts)
        assert self.means is not None
        first = 0 if self.stale else max(0, length - new - max(starts or (0,))) // block_size
        write_means(self.means, key.detach(), start, block_size, first, length // block_size)
        self.stale = self._waiting = False

    def _make_room(self, key: Tensor, block_size: int, starts: tuple[int, ...] | None) -> None:
        if (self.block_size, self.starts) != (block_size, starts):
            self.block_size, self.starts, self.stale = block_size, starts, True
        means, wanted = self.means, _blocks(key, block_size)
        like = mean_dtype(key), key.device, key.shape[:2], key.shape[3]
        if means is not None and (means.dtype, means.device, means.shape[:2], means.shape[3]) != like:
            means = None
        if means is not None and means.shape[2] >= wanted:
            return
        with torch.inference_mode(False):
            if means is None:
                self.means, self.stale = means_for(key, wanted), True
                mark_static_address(self.means)
            else:  # an eighth more than is needed, so that a growing cache seldom copies them
                self.means = torch.cat([means, means_for(key, wanted - means.shape[2] + wanted // 8)], 2)


def _blocks(key: Tensor, block_size: int) -> int:
    return max(1, key.shape[2] // block_size)


def decoder_cache(cache: Cache | None) -> Cache | None:
    """The cache with the keys of causal self-attention; None where there is no cache of transformers."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return cache if isinstance(cache, Cache) else None


def layer_of_cache(cache: Cache, layer: AttentionLayer) -> CacheLayerMixin | None:
    """What a cache holds for an attention layer; None where it has no such layer."""
    # what has no keys in a cache is there for layers of other kinds
    return None if layer.layer_idx >= len(cache.layers) else cast(CacheLayerMixin, cache.layers[layer.layer_idx])


def means_of(cache: Cache | None, layer: AttentionLayer, key: Tensor, n_new: int) -> BlockMeans | None:
    """The block means that lie beside the keys of an attention layer, all of which `key [B, G, N, D]` is, the last `n_new` of them new.

    None where there can be none: no cache or another kind of it, keys that the layer changed after it had read them from the cache.
    """
    cache = decoder_cache(cache)
    kept = None if cache is None else layer_of_cache(cache, layer)
    if cache is None or kept is None:
        return None
    if not torch.compiler.is_compiling():
        if isinstance(kept, QuantizedLayer):
            return _of_quantized(kept, key, n_new)
        if not reads_as_it_lies(cache, kept, key):
            return None
        if type(kept) in _EXTENDED:
            kept.__class__ = _EXTENDED[type(kept)]
            means = BlockMeans()
            means.note(kept.keys)
            put_means(kept, means)
    return means_beside(kept)


def _of_quantized(cache_layer: QuantizedLayer, key: Tensor, n_new: int) -> BlockMeans | None:
    """The means beside a quantized layer, which stay right for as long as it makes its older keys of the same."""
    if key.shape[2] != cache_layer.get_seq_length():
        return None
    means = means_beside(cache_layer)
    if means is None:
        means = BlockMeans()
        put_means(cache_layer, means)
    means.check_quantized(quantized_keys(cache_layer), key.shape[2], n_new)
    return means


def _means(cache_layer: CacheLayerMixin) -> BlockMeans:
    means = means_beside(cache_layer)
    assert means is not None  # the class of a cache layer changes when it gets its means
    return means


class _WithMeans(CacheLayerMixin):
    """Cache layers that move the means beside them as they move their keys.

    It goes before the class that it extends. As it has a base in common with that one, and nothing more in memory, an object of that one
    can change to both.
    """

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        means = _means(self)
        means.check(self.keys)
        means.expect()
        out = super().update(*args, **kwargs)  # type: ignore[safe-super]  # that of the class that comes next
        means.note(self.keys)
        return out

    def offload(self) -> None:
        self._moved(super().offload)

    def prefetch(self) -> None:
        self._moved(super().prefetch)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._moved(super().reorder_cache, beam_idx, rows=beam_idx)

    def _moved(self, move: Callable[..., None], *args: Any, rows: Tensor | None = None) -> None:
        means = _means(self)
        means.check(self.keys)
        move(*args)
        means.note(self.keys)
        if rows is not None and not means.stale:
            means.select(rows)


class DynamicLayerWithMeans(_WithMeans, DynamicLayer):
    """A growing cache layer with block means."""

    def crop(self, *args: Any) -> None:
        self._moved(super().crop, *args)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._moved(super().batch_select_indices, indices, rows=indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(0 if self.keys is None else self.keys.shape[0]).repeat_interleave(repeats)
        self._moved(super().batch_repeat_interleave, repeats, rows=rows)


class StaticLayerWithMeans(_WithMeans, StaticLayer):
    """A cache layer of fixed size with block means."""


_EXTENDED: dict[type[CacheLayerMixin], type[CacheLayerMixin]] = {DynamicLayer: DynamicLayerWithMeans, StaticLayer: StaticLayerWithMeans}
