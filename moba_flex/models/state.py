"""What the package keeps on foreign objects: one `LayerState` per attention layer, one `CacheState` per layer of a cache.

Both are stored under one name and touched in this file only. Reads go through `__dict__`: PyTorch takes long to find that a module lacks
an attribute. A layer's `key_conv` is not here, since its weights belong to the model.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedConfig
    from transformers.cache_utils import CacheLayerMixin

    from ..analysis.trace import Watcher
    from ..distributed.cache import Shared
    from ..distributed.context_parallel import ContextParallel
    from .block_means import BlockMeans
    from .key_conv import KeyConvHooks, LastKeys
    from .upstream import AttentionLayer

_NAME = "_moba"


@dataclass(frozen=True)
class Choice:
    """Which attention a layer uses: what `patch` and `set_attention` decide."""

    original: str  # the implementation that the model had before
    attention: str | None = None  # "full", "moba" or "moba_naive"; None: what the model's configuration names
    keeps_full: bool = False  # whether `full_attention_layers` names the layer
    is_fixed: bool = False  # MoBA cannot replace the layer


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer belongs, for those who meet its state alone."""

    config: PreTrainedConfig
    index: int | None

    def __eq__(self, other: object) -> bool:  # configurations of the same values may be of different models
        return isinstance(other, Place) and self.config is other.config and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self.config), self.index))


@dataclass(eq=False)
class LayerState:
    """All that the package keeps on one attention layer. Of other modules only `call_hook` and `save_hook` are set."""

    choice: Choice | None = None  # None: not patched, though its configuration may name "moba"
    place: Place | None = None  # of a layer that is patched
    context: ContextParallel | None = None  # the processes that share its sequences
    watcher: Watcher | None = None  # gets to see queries and keys
    key_conv: KeyConvHooks | None = None  # what calls its `key_conv`
    call_hook: RemovableHandle | None = None  # of the hook that tells the attention function more about a call
    save_hook: RemovableHandle | None = None  # of the hook that lets adapters be saved with the model's settings

    def __post_init__(self) -> None:
        _STATES.add(self)

    def __setstate__(self, entries: dict[str, Any]) -> None:  # of a copy, or one that was pickled
        self.__dict__.update(entries)
        _STATES.add(self)

    def is_empty(self) -> bool:
        return all(value is None for value in vars(self).values())


_STATES: weakref.WeakSet[LayerState] = weakref.WeakSet()  # those of this process


def patched_layers() -> list[tuple[Place, Choice]]:
    """What all patched layers of this process use, those of copied models too."""
    return [(state.place, state.choice) for state in list(_STATES) if state.place is not None and state.choice is not None]


def state_of(module: nn.Module) -> LayerState | None:
    """A module's state, or None if the package keeps nothing on it."""
    return module.__dict__.get(_NAME)


def choice_of(layer: nn.Module) -> Choice | None:
    """What `patch` and `set_attention` decided for a layer, or None if it is not patched."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.choice


def context_of(layer: nn.Module) -> ContextParallel | None:
    """The context-parallel context of a layer, or None."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.context


def watcher_of(layer: nn.Module) -> Watcher | None:
    """What wants to see a layer's queries and keys, or None."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.watcher


def key_conv_hooks_of(layer: nn.Module) -> KeyConvHooks | None:
    """What calls a layer's convolution of keys, or None if it has none."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.key_conv


def call_hook_of(module: nn.Module) -> RemovableHandle | None:
    """The handle of a module's hook that passes on more about a call, or None."""
    state = module.__dict__.get(_NAME)
    return None if state is None else state.call_hook


def save_hook_of(module: nn.Module) -> RemovableHandle | None:
    """The handle of a module's hook that lets adapters be saved with the model's settings, or None."""
    state = module.__dict__.get(_NAME)
    return None if state is None else state.save_hook


def set_choice(layer: AttentionLayer, choice: Choice | None) -> None:
    """Set what a layer uses; None: it is not patched."""
    place = None if choice is None else Place(layer.config, getattr(layer, "layer_idx", None))
    _set(layer, choice=choice, place=place)


def set_context(layer: nn.Module, context: ContextParallel | None) -> None:
    """Set the processes that share a layer's sequences."""
    _set(layer, context=context)


def set_watcher(layer: nn.Module, watcher: Watcher | None) -> None:
    """Set what sees a layer's queries and keys."""
    _set(layer, watcher=watcher)


def set_key_conv_hooks(layer: nn.Module, hooks: KeyConvHooks | None) -> None:
    """Set what calls a layer's convolution of keys."""
    _set(layer, key_conv=hooks)


def set_call_hook(module: nn.Module, handle: RemovableHandle | None) -> None:
    """Set the handle of a module's hook that passes on more about a call."""
    _set(module, call_hook=handle)


def set_save_hook(module: nn.Module, handle: RemovableHandle | None) -> None:
    """Set the handle of a module's hook that lets adapters be saved with the model's settings."""
    _set(module, save_hook=handle)


def _set(module: nn.Module, **entry: object) -> None:
    """Set one entry. A module about which nothing is left to say is as if it had never been touched."""
    state = state_of(module) or LayerState()
    for name, value in entry.items():
        setattr(state, name, value)
    if state.is_empty():
        module.__dict__.pop(_NAME, None)
    else:
        module.__dict__[_NAME] = state


@dataclass(eq=False)
class CacheState:
    """All that the package keeps beside the keys of one layer of a cache."""

    means: BlockMeans | None = None  # of the keys' blocks, for sparse decoding
    last_keys: LastKeys | None = None  # as they were before the convolution of keys
    shared: Shared | None = None  # how the tokens are shared out among processes


def cache_state_of(cache_layer: CacheLayerMixin) -> CacheState | None:
    """What lies beside the keys of a cache layer, or None."""
    return cache_layer.__dict__.get(_NAME)


def means_beside(cache_layer: CacheLayerMixin) -> BlockMeans | None:
    """The block means beside the keys of a cache layer, or None."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.means


def last_keys_beside(cache_layer: CacheLayerMixin) -> LastKeys | None:
    """The last keys before the convolution, beside those of a cache layer, or None."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.last_keys


def shared_beside(cache_layer: CacheLayerMixin) -> Shared | None:
    """How the tokens of a cache layer are shared out among processes; None: they are not."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.shared


def put_means(cache_layer: CacheLayerMixin, means: BlockMeans) -> None:
    """Put block means beside the keys of a cache layer."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).means = means


def put_last_keys(cache_layer: CacheLayerMixin, last_keys: LastKeys) -> None:
    """Put the last keys before the convolution beside those of a cache layer."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).last_keys = last_keys


def put_shared(cache_layer: CacheLayerMixin, shared: Shared) -> None:
    """Put beside the keys of a cache layer how its tokens are shared out."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).shared = shared
