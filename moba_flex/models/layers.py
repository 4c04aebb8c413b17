"""Which modules of a model are attention layers, and which attention each of them uses.

transformers looks an attention layer's function up by one name in the configuration that all layers share. Here that
name is "moba" or "moba_naive" for all of them, and the `Choice` in a layer's state says what it does otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

from ..config import MobaConfig
from .state import choice_of
from .upstream import FULL_LAYER_TYPES, attention_by_name, implementation_of, looks_up_attention, supports_sdpa

MOBA = ("moba", "moba_naive")
T = TypeVar("T")


def _of_a_class(find: Callable[[type], T]) -> Callable[[type], T]:
    """Look a class of layers up once. torch.compile takes the answer as a constant, without tracing how it is found."""
    once = lru_cache(maxsize=256)(find)

    @torch.compiler.assume_constant_result
    @wraps(find)
    def found(layer_class: type) -> T:
        return once(layer_class)

    return found


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """All modules of a model that look their attention up in transformers' registry, of whatever kind."""
    return [m for m in model.modules() if hasattr(m, "config") and _source(type(m)) is not None]


def takes_moba(layer: nn.Module) -> bool:
    """Whether a layer is causal self-attention over all keys: what MoBA can replace."""
    index, config = getattr(layer, "layer_idx", None), layer.config
    if index is None or getattr(layer, "is_cross_attention", False) or not getattr(layer, "is_causal", True):
        return False
    if _is_foreign(type(layer)):
        return False
    types = getattr(config, "layer_types", None)
    if types is not None and index < len(types):
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", True) else None  # EXAONE 4 has it in all layers
        return types[index] in FULL_LAYER_TYPES and window is None
    return getattr(layer, "sliding_window", getattr(config, "sliding_window", None)) is None


def attention_of(layer: nn.Module, settings: MobaConfig, named: str | None = None) -> str:
    """ "full", "moba" or "moba_naive": what a layer uses now, `named` being the one of these that its configuration names."""
    choice = choice_of(layer)
    if choice is not None and choice.attention is not None:
        return choice.attention
    if (choice is None and not takes_moba(layer)) or keeps_full(layer, settings):
        return "full"
    return named or implementation_of(layer.config)


def keeps_full(layer: nn.Module, settings: MobaConfig) -> bool:
    """Whether `full_attention_layers` names a layer.

    What patching found stays true: while it drafts with `assistant_early_exit`, transformers sets the configuration's number of layers to
    those that it runs.
    """
    choice = choice_of(layer)
    return choice.keeps_full if choice is not None else named_full(layer, settings)


def named_full(layer: nn.Module, settings: MobaConfig) -> bool:
    """The same, by the configuration's number of layers. Raises ValueError if `full_attention_layers` names one that is not there."""
    named, index = full_layers(settings, n_layers(layer), layer), getattr(layer, "layer_idx", None)
    if named and index is not None and index < 0:  # Zamba2's, which are told their place with each call
        raise ValueError(f"full_attention_layers={named}, but no {type(layer).__name__} says which layer it is: leave it out")
    return index in named


def n_layers(layer: nn.Module) -> int:
    """How many layers there are in a causal layer's stack: `num_hidden_layers` may be an encoder's, where the configuration is of both."""
    return getattr(layer.config, "decoder_layers", None) or layer.config.num_hidden_layers


def full_layers(settings: MobaConfig, n_layers: int, model: nn.Module) -> list[int]:
    """`full_attention_layers` counted from 0; ValueError, naming the model's class, if one is not there."""
    if not settings.full_attention_layers:
        return []
    return resolve_layers("full_attention_layers", settings.full_attention_layers, n_layers, range(n_layers), model)


def resolve_layers(name: str, layers: tuple[int, ...], n_layers: int, found: range | list[int], model: nn.Module) -> list[int]:
    """Layer indices counted from 0, where negative ones count from the last of `n_layers`.

    Raises ValueError, naming the model's class and the layers that were found, for an index that is not among them.
    """
    resolved = [layer if layer >= 0 else n_layers + layer for layer in layers]
    for given, layer in zip(layers, resolved):
        if layer not in found:
            raise ValueError(f"{name} has {given}, but {type(model).__name__} has the layers {show(found)}")
    return resolved


def show(layers: range | list[int]) -> str:
    """For messages: "0 to 3", "1, 3, 5"."""
    layers = list(layers)
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "(none)"


def original_implementation(layer: nn.Module) -> str:
    """The name of the attention that a layer uses when it does not use MoBA."""
    choice = choice_of(layer)
    return choice.original if choice is not None else default_implementation(type(layer))


def original_attention(layer: nn.Module, implementation: str) -> Callable:
    """The function behind the name, found where the layer itself would find it.

    Raises ValueError if the model's source has no eager attention and that is what is wanted.
    """
    attention = attention_by_name(_source(type(layer)), implementation)
    if attention is None:
        raise ValueError(
            f"{type(layer).__name__} has no eager_attention_forward, so full attention needs another implementation: "
            'load the model with attn_implementation="sdpa"'
        )
    return attention


@_of_a_class
def default_implementation(layer_class: type) -> str:
    """What transformers gives a model that asks for nothing: "sdpa" where its source says so, else "eager"."""
    return "sdpa" if supports_sdpa(_source(layer_class)) else "eager"


@_of_a_class
def _is_foreign(layer_class: type) -> bool:
    """Whether a number for each query and key is added to the scores, as in T5 and its kin, or keys are those of other states (Mllama)."""
    names = {*inspect.signature(layer_class.forward).parameters, *inspect.signature(layer_class.__init__).parameters}
    return not names.isdisjoint({"position_bias", "has_relative_attention_bias", "cross_attention_states"})


@_of_a_class
def _source(layer_class: type) -> ModuleType | None:
    """The Python module whose forward looks attention up in transformers' registry, for this class or a base of it."""
    return looks_up_attention(layer_class)
