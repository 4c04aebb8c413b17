"""A process's part of a key cache whose tokens are distributed over processes, see `placement`.

The class of a `DynamicCache` layer is changed to `SharedLayer` in place, as in `models/block_means.py`, so that references to the cache
stay valid. The layer counts the tokens of all processes, and holds the keys and values of its own. Block means are small, so every process
has all of them. Each is computed when it is first needed, by the process that holds the block.

B rows, G key heads, n new tokens, C blocks, P tokens per block, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..core.messages import kind_of, shown
from ..models.block_means import decoder_cache, layer_of_cache
from ..models.state import put_shared, shared_beside
from ..ops.decoding import mean_dtype
from ..ops.gate import means_of
from .collectives import all_reduce_sum
from .placement import Placement

if TYPE_CHECKING:
    from ..models.upstream import AttentionLayer


@dataclass(eq=False)
class Shared:
    """How the tokens of one cache layer are distributed over processes."""

    placement: Placement | None = None  # None: nothing is cached yet
    length: int = 0  # tokens of all processes
    announced: int = 0  # tokens of the current model call whose keys the layer has not received yet
    is_prompt: bool = False  # the last keys are this process's slice of a prompt, not new tokens
    returned: tuple[int, torch.Size] | None = None  # data pointer and shape of the keys that `update` returned
    means: Tensor | None = None  # [B, G, C, D]: the known means of complete blocks, of all processes

    def announce(self, n_tokens: int, placement: Placement | None) -> None:
        """A call of the model brings `n_tokens` tokens, which are a prompt if there is a `placement`."""
        self.announced, self.is_prompt = n_tokens, placement is not None
        self.placement = placement or self.placement


class SharedLayer(DynamicLayer):
    """A cache layer that holds the keys and values of this process's tokens, and counts those of all processes."""

    @property
    def shared(self) -> Shared:
        shared = shared_beside(self)
        assert shared is not None  # set together with the class
        return shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store this process's part of the new keys and values, and return all of them unchanged."""
        shared, placement = self.shared, self.shared.placement
        if placement is None or not shared.announced:
            raise ValueError(
                "this cache holds one process's share of the keys, from a context-parallel model: use it with that model, as long as that "
                "is context-parallel, or another cache"
            )
        shared.returned = key_states.data_ptr(), key_states.shape
        before, shared.length = shared.length, shared.length + shared.announced
        new, shared.announced = shared.announced, 0
        if shared.is_prompt:
            n_real = int(placement.held(torch.tensor(shared.length)))
            mine: slice | Tensor = slice(0, n_real)  # the rest is padding
        else:
            token = torch.arange(before, before + new)
            mine = placement.is_mine(token // placement.block_size).nonzero()[:, 0].to(key_states.device)
            if not mine.numel():
                return key_states, value_states
        super().update(key_states[:, :, mine], value_states[:, :, mine], *args, **kwargs)
        return key_states, value_states

    def has_keys_of_attention(self, key: Tensor) -> bool:
        """Whether attention got the keys `[B, G, n, D]` that `update` returned. DeepSeek-V3 caches what it computes its keys from."""
        return self.shared.returned == (key.data_ptr(), key.shape)

    def get_seq_length(self) -> int:
        return self.shared.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of all processes. Above 0, for older versions of transformers: keep the first ones."""
        shared = self.shared
        number = int(tokens_to_remove)  # older versions pass a tensor
        length = min(number, shared.length) if number > 0 else max(0, shared.length + number)
        if shared.placement is None or self.keys is None or self.values is None:
            return
        shared.length, held = length, int(shared.placement.held(torch.tensor(length)))
        self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        if shared.means is not None:
            shared.means = shared.means[:, :, : length // shared.placement.block_size]
        if length == 0:
            self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        put_shared(self, Shared())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _rows(self, moved: Any) -> None:
        """Reorder the rows of the batch, also in a process that holds no token."""
        if not self.is_initialized:
            return
        self.keys, self.values = moved(self.keys), moved(self.values)
        if self.shared.means is not None:
            self.shared.means = moved(self.shared.means)

    def block_means(self, group: dist.ProcessGroup) -> Tensor:
        """`[B, G, C, D]`: the means of all complete blocks, including those of other processes. A collective call."""
        shared, placement = self.shared, self.shared.placement
        assert placement is not None and self.keys is not None  # called after an update
        known, wanted = 0 if shared.means is None else shared.means.shape[2], shared.length // placement.block_size
        if shared.means is None:
            shared.means = self.keys.new_zeros(*self.keys.shape[:2], 0, self.keys.shape[3], dtype=mean_dtype(self.keys))
        if wanted > known:
            shared.means = torch.cat([shared.means, all_reduce_sum(self._own_means(known, wanted, placement), group)], 2)
        return shared.means

    def _own_means(self, first: int, stop: int, placement: Placement) -> Tensor:
        """`[B, G, stop - first, D]`: the means of this process's blocks among blocks `first` to `stop - 1`, else 0."""
        assert self.keys is not None
        block = torch.arange(first, stop)
        begin, end = placement.blocks_before(torch.tensor([first, stop])).tolist()
        key = self.keys[:, :, begin * placement.block_size : end * placement.block_size]
        out = key.new_zeros(*key.shape[:2], stop - first, key.shape[3], dtype=mean_dtype(key))
        if end > begin:
            mine = placement.is_mine(block).nonzero()[:, 0].to(key.device)
            out[:, :, mine] = means_of(key.unflatten(2, (end - begin, placement.block_size)), placement.block_size)
        return out


def share(cache: Cache, n_layers: int) -> list[SharedLayer]:
    """Change the first `n_layers` layers of a cache to `SharedLayer`, in place.

    Raises ValueError unless the cache is an empty `DynamicCache` or already changed.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded DynamicCache" if isinstance(cache, DynamicCache) else kind_of(cache)
        raise ValueError(f"a context-parallel model keeps its keys in a DynamicCache, but got {kind}: leave out cache_implementation")
    if cache.layer_class_to_replicate is not None:
        cache.layers += [cache.layer_class_to_replicate() for _ in range(n_layers - len(cache.layers))]
    for i, layer in enumerate(cache.layers[:n_layers]):
        if type(layer) not in (DynamicLayer, SharedLayer):
            raise ValueError(
                f"layer {i} of the cache is {kind_of(layer)}, but a context-parallel model needs one for the keys of all "
                "tokens: pass DynamicCache()"
            )
        if type(layer) is DynamicLayer and layer.get_seq_length():
            raise ValueError(
                f"the cache has {shown(layer.get_seq_length())} tokens from a model that was not context-parallel: a context-parallel "
                "model begins with an empty cache"
            )
    for layer in cache.layers[:n_layers]:
        if type(layer) is DynamicLayer:
            layer.__class__ = SharedLayer
            put_shared(layer, Shared())
    return cast(list[SharedLayer], cache.layers[:n_layers])


def shared_layer(cache: Cache | None, layer: AttentionLayer) -> SharedLayer | None:
    """The `SharedLayer` of an attention layer; None if there is no cache, or if it is not distributed."""
    cache = decoder_cache(cache)
    kept = None if cache is None else layer_of_cache(cache, layer)
    return kept if isinstance(kept, SharedLayer) else None
