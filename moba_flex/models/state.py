"""State that the package stores on objects of other libraries: one `LayerState` per attention layer, one `CacheState` per cache layer.

Both are stored under one name, which only this file accesses. Reads go through `__dict__`, because `nn.Module.__getattr__` is slow for
missing attributes. A layer's `key_conv` is not stored here, since its weights belong to the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.weak_set import SharedWeakSet

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
    """Which attention a layer uses, as set by `patch` and `set_attention`."""

    original: str  # the implementation before the patch
    attention: str | None = None  # "full", "moba" or "moba_naive"; None: as the model's configuration names
    keeps_full: bool = False  # whether `full_attention_layers` names the layer
    is_fixed: bool = False  # MoBA cannot replace the layer
    full_blocks: FullBlocks | None = None  # the `full_attention` blocks that made it "full"


@dataclass(frozen=True)
class FullBlocks:
    """The `full_attention` blocks that a layer is in. Those of tasks and threads overlap: the last one that is left restores the layer."""

    blocks: frozenset[object]
    after: Choice  # the layer's choice when no block is left
    named: str  # the attention name in its configuration then, if any layer uses MoBA


@dataclass(frozen=True, eq=False)
class Place:
    """The configuration and index of a layer, for code that has only its state."""

    config: PreTrainedConfig
    index: int | None

    def __eq__(self, other: object) -> bool:  # equal configurations may belong to different models
        return isinstance(other, Place) and self.config is other.config and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self.config), self.index))


@dataclass(eq=False)
class LayerState:
    """All state of one attention layer. Other modules have only `call_hooks` and `save_hook`."""

    choice: Choice | None = None  # None: not patched, though its configuration may name "moba"
    place: Place | None = None  # of a patched layer
    context: ContextParallel | None = None  # the processes that share its sequences
    watcher: Watcher | None = None  # sees queries and keys
    key_conv: KeyConvHooks | None = None  # the hooks that call its `key_conv`
    call_hooks: tuple[RemovableHandle, ...] | None = None  # of the hooks that pass extra information to the attention function
    save_hook: RemovableHandle | None = None  # of the hook that saves the model's settings with its adapters

    def __post_init__(self) -> None:
        _STATES.add(self)

    def __setstate__(self, entries: dict[str, Any]) -> None:  # of a copied or unpickled state
        self.__dict__.update(entries)
        _STATES.add(self)

    def is_empty(self) -> bool:
        return all(value is None for value in vars(self).values())


_STATES = SharedWeakSet[LayerState]()  # all states of this process


def patched_layers() -> list[tuple[Place, Choice]]:
    """The place and choice of all patched layers of this process, including those of copied models."""
    return [(state.place, state.choice) for state in _STATES.all() if state.place is not None and state.choice is not None]


def state_of(module: nn.Module) -> LayerState | None:
    """A module's state, or None if the package keeps nothing on it."""
    return module.__dict__.get(_NAME)


def choice_of(layer: nn.Module) -> Choice | None:
    """What `patch` and `set_attention` decided for a layer, or None if it is not patched."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.choice


def choice_of_plain(layer: nn.Module) -> Choice | None:
    """`choice_of` a layer that is neither watched nor context-parallel; None of others."""
    state = layer.__dict__.get(_NAME)
    return None if state is None or state.watcher is not None or state.context is not None else state.choice


def context_of(layer: nn.Module) -> ContextParallel | None:
    """The context-parallel context of a layer, or None."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.context


def watcher_of(layer: nn.Module) -> Watcher | None:
    """The function that sees a layer's queries and keys, or None."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.watcher


def key_conv_hooks_of(layer: nn.Module) -> KeyConvHooks | None:
    """The hooks that call a layer's key convolution, or None if it has none."""
    state = layer.__dict__.get(_NAME)
    return None if state is None else state.key_conv


def call_hooks_of(module: nn.Module) -> tuple[RemovableHandle, ...] | None:
    """The handles of a module's hooks that pass extra information to attention functions, or None."""
    state = module.__dict__.get(_NAME)
    return None if state is None else state.call_hooks


def save_hook_of(module: nn.Module) -> RemovableHandle | None:
    """The handle of a module's hook that saves the model's settings with its adapters, or None."""
    state = module.__dict__.get(_NAME)
    return None if state is None else state.save_hook


def set_choice(layer: AttentionLayer, choice: Choice | None) -> None:
    """Set which attention a layer uses; None: it is not patched."""
    place = None if choice is None else Place(layer.config, getattr(layer, "layer_idx", None))
    _set(layer, choice=choice, place=place)


def set_context(layer: nn.Module, context: ContextParallel | None) -> None:
    """Set the processes that share a layer's sequences."""
    _set(layer, context=context)


def set_watcher(layer: nn.Module, watcher: Watcher | None) -> None:
    """Set the function that sees a layer's queries and keys."""
    _set(layer, watcher=watcher)


def set_key_conv_hooks(layer: nn.Module, hooks: KeyConvHooks | None) -> None:
    """Set the hooks that call a layer's key convolution."""
    _set(layer, key_conv=hooks)


def set_call_hooks(module: nn.Module, handles: tuple[RemovableHandle, ...] | None) -> None:
    """Set the handles of a module's hooks that pass extra information to attention functions."""
    _set(module, call_hooks=handles)


def set_save_hook(module: nn.Module, handle: RemovableHandle | None) -> None:
    """Set the handle of a module's hook that saves the model's settings with its adapters."""
    _set(module, save_hook=handle)


def _set(module: nn.Module, **entry: object) -> None:
    """Set entries. An empty state is removed from the module."""
    state = state_of(module) or LayerState()
    for name, value in entry.items():
        setattr(state, name, value)
    if state.is_empty():
        module.__dict__.pop(_NAME, None)
    else:
        module.__dict__[_NAME] = state


@dataclass(eq=False)
class CacheState:
    """All state of one cache layer."""

    means: BlockMeans | None = None  # of the keys' blocks, for sparse decoding
    last_keys: LastKeys | None = None  # before the key convolution
    shared: Shared | None = None  # how the tokens are distributed over processes


def cache_state_of(cache_layer: CacheLayerMixin) -> CacheState | None:
    """The state of a cache layer, or None."""
    return cache_layer.__dict__.get(_NAME)


def means_beside(cache_layer: CacheLayerMixin) -> BlockMeans | None:
    """The block means beside the keys of a cache layer, or None."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.means


def last_keys_beside(cache_layer: CacheLayerMixin) -> LastKeys | None:
    """The last keys of a cache layer before the key convolution, or None."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.last_keys


def shared_beside(cache_layer: CacheLayerMixin) -> Shared | None:
    """How the tokens of a cache layer are distributed over processes; None: they are not."""
    state = cache_state_of(cache_layer)
    return None if state is None else state.shared


def put_means(cache_layer: CacheLayerMixin, means: BlockMeans) -> None:
    """Store block means beside the keys of a cache layer."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).means = means


def put_last_keys(cache_layer: CacheLayerMixin, last_keys: LastKeys) -> None:
    """Store the last keys before the key convolution beside those of a cache layer."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).last_keys = last_keys


def put_shared(cache_layer: CacheLayerMixin, shared: Shared) -> None:
    """Store how the tokens of a cache layer are distributed over processes."""
    cache_layer.__dict__.setdefault(_NAME, CacheState()).shared = shared
