"""Block means stored beside a key cache.

They are stored on the cache layer, whose class is extended: operations that move keys also move their means. Three checks detect stale
means, which are then recomputed:

- Two calls of `update` without an attention call in between that took in the new keys (another model, full attention for a while).
- A key tensor other than the one last seen, or one that was written to since: other code has replaced or changed it.
- Other settings or other padding.

B rows, G key heads, N tokens, C blocks, D head dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, QuantizedLayer, StaticLayer

from ..core.upstream import mark_static_address, version_of
from ..ops.decoding import mean_dtype, means_for, write_means
from .state import means_beside, put_means
from .upstream import is_cached_tensor, quantized_keys

if TYPE_CHECKING:
    from .upstream import AttentionLayer


class BlockMeans:
    """The block means of one cache layer's keys: `means [B, G, C, D]`, see `moba_flex.decoding`."""

    def __init__(self) -> None:
        self.means: Tensor | None = None
        self.block_size = 0
        self.starts: tuple[int, ...] | None = None  # first real token of each row; None: 0 for all rows
        self.stale = True  # keys were written or moved that the means do not reflect
        self._waiting = False  # keys were written that the means have not taken in
        self._keys: weakref.ref[Tensor] | None = None
        self._version: int | None = None  # of these keys
        self._quantized: tuple[object, int] | None = None  # of a quantized cache: the source of the keys, and their number

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied or unpickled cache recomputes its means

    def __setstate__(self, state: dict[str, Any]) -> None:
        BlockMeans.__init__(self)

    def check(self, keys: Tensor | None) -> None:
        """Mark the means stale if the cache layer's keys are not the tensor last noted."""
        if torch.compiler.is_compiling():
            return
        if (None if self._keys is None else self._keys()) is not keys or self._version != _version_of(keys):
            self.stale = True

    def record_keys(self, keys: Tensor | None) -> None:
        """Record the cache layer's current key tensor."""
        if not torch.compiler.is_compiling():  # compiled graphs only see static caches, which write keys in place
            self._keys, self._version = None if keys is None else weakref.ref(keys), _version_of(keys)

    def check_quantized(self, quantized: object | None, length: int, n_new: int) -> None:
        """Mark the means stale unless the `length - n_new` older keys come from the same source as before."""
        self.stale = self._quantized is None or self._quantized[0] is not quantized or self._quantized[1] != length - n_new
        self._quantized = None if quantized is None else (quantized, length)

    def before_write(self) -> None:
        """To be called before new keys are written."""
        self.stale = self.stale or self._waiting
        self._waiting = True

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Reorder the rows of the batch."""
        if self.means is None:
            return
        with torch.inference_mode(False):
            means = self.means[rows.to(self.means.device)]
            self.means = self.means.copy_(means) if means.shape == self.means.shape else means
        if self.starts is not None:
            self.starts = tuple(self.starts[row] for row in rows.tolist())

    @torch.no_grad()
    def of_all_but_new(self, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None) -> Tensor | None:
        """The means of `key [B, G, N, D]`, valid for all blocks except those completed by the newest tokens: the caller writes these.

        None if they do not fit, which happens only while a graph is traced.
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
    def update_means(
        self, new: int, length: int, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None
    ) -> None:
        """Write the means of all blocks completed by the last `new` of `length` tokens, and all stale means."""
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
            else:  # an eighth more than needed, so that a growing cache rarely copies them
                self.means = torch.cat([means, means_for(key, wanted - means.shape[2] + wanted // 8)], 2)


def _version_of(keys: Tensor | None) -> int | None:
    """Changes with each in-place write; None for inference tensors, which do not count them."""
    return None if keys is None or keys.is_inference() else version_of(keys)


def _blocks(key: Tensor, block_size: int) -> int:
    return max(1, key.shape[2] // block_size)


def decoder_cache(cache: Cache | None) -> Cache | None:
    """The cache with the keys of causal self-attention; None if there is no transformers cache."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return cache if isinstance(cache, Cache) else None


def layer_of_cache(cache: Cache, layer: AttentionLayer) -> CacheLayerMixin | None:
    """The cache layer of an attention layer; None if there is none."""
    # Entries without keys belong to layers of other kinds.
    return None if layer.layer_idx >= len(cache.layers) else cast(CacheLayerMixin, cache.layers[layer.layer_idx])


def means_of(cache: Cache | None, layer: AttentionLayer, key: Tensor, n_new: int) -> BlockMeans | None:
    """The block means beside the cached keys `key [B, G, N, D]` of an attention layer, the last `n_new` of which are new.

    None if there can be none: no cache, an unsupported kind of cache, or keys that the layer changed after reading them from the cache.
    """
    cache = decoder_cache(cache)
    kept = None if cache is None else layer_of_cache(cache, layer)
    if cache is None or kept is None:
        return None
    if not torch.compiler.is_compiling():
        if isinstance(kept, QuantizedLayer):
            return _of_quantized(kept, key, n_new)
        if not is_cached_tensor(cache, kept, key):
            return None
        if type(kept) in _EXTENDED:
            kept.__class__ = _EXTENDED[type(kept)]
            means = BlockMeans()
            means.record_keys(kept.keys)
            put_means(kept, means)
    return means_beside(kept)


def _of_quantized(cache_layer: QuantizedLayer, key: Tensor, n_new: int) -> BlockMeans | None:
    """The means beside a quantized layer, which stay valid as long as the source of its older keys is unchanged."""
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
    assert means is not None  # a cache layer's class changes when it gets its means
    return means


class _WithMeans(CacheLayerMixin):
    """Mixin for cache layers that moves the means together with the keys.

    It precedes the class that it extends in the MRO. Both share a base and it adds no instance layout, so the `__class__` of an existing
    object can be assigned.
    """

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        means = _means(self)
        means.check(self.keys)
        means.before_write()
        out = super().update(*args, **kwargs)  # type: ignore[safe-super]  # the next class in the MRO
        means.record_keys(self.keys)
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
        means.record_keys(self.keys)
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
