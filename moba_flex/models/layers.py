"""Which modules of a model are attention layers, and which attention each of them uses.

transformers looks up a layer's attention function by one name in the configuration, which all layers share. Here that name is "moba" or
"moba_naive", and the `Choice` in a layer's state can override it for that layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from ..config import MobaConfig
from ..core.compiling import constant_in_graphs
from ..core.messages import shown
from .state import choice_of, state_of
from .upstream import (
    FULL_LAYER_TYPES,
    OPTIONAL_CODE,
    MaskUse,
    attention_by_name,
    implementation_of,
    looks_up_attention,
    mask_use,
    passes_to_attention,
    set_implementation,
    supports_sdpa,
)

if TYPE_CHECKING:
    from .upstream import AttentionLayer, Configured

MOBA = ("moba", "moba_naive")
# Arguments of attention that change visibility or scores in ways that MoBA does not support.
UNKNOWN_TO_MOBA = ("position_bias", "cache", "indices", "block_indices", "sinks")
T = TypeVar("T")


def _of_a_class(find: Callable[[type[nn.Module]], T]) -> Callable[[type[nn.Module]], T]:
    """Cache an answer per layer class. torch.compile treats it as a constant and does not trace the function."""
    once = lru_cache(maxsize=256)(find)

    @constant_in_graphs
    @wraps(find)
    def found(layer_class: type) -> T:
        return once(layer_class)

    return found


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """All modules of a model that look up their attention in transformers' registry, of any kind."""
    return [module for module in model.modules() if _is_attention(module)]


def _is_attention(module: nn.Module) -> TypeGuard[AttentionLayer]:
    return hasattr(module, "config") and _source(type(module)) is not None


def configs_of(modules: Iterable[Configured]) -> list[PreTrainedConfig]:
    """The distinct configurations of modules: layers share them."""
    return list({id(module.config): module.config for module in modules}.values())


def is_replaceable(layer: AttentionLayer) -> bool:
    """Whether a layer is causal self-attention over all keys, which MoBA can replace."""
    index, config = getattr(layer, "layer_idx", None), layer.config
    if index is None or getattr(layer, "is_cross_attention", False) or not getattr(layer, "is_causal", True):
        return False
    if is_foreign(type(layer)) or not _is_served(layer):
        return False
    types = getattr(config, "layer_types", None)
    if types is not None and index < len(types):
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", True) else None  # EXAONE 4 has it in all layers
        return types[index] in FULL_LAYER_TYPES and window is None
    return window_of_layer(layer) is None


def window_of_layer(layer: AttentionLayer) -> int | None:
    """The sliding window of a layer whose configuration has no `layer_types`; None: it has none."""
    holder: Any = layer if hasattr(layer, "sliding_window") else config_of_layer(layer)
    return getattr(holder, "sliding_window", None)


def config_of_layer(layer: AttentionLayer) -> PreTrainedConfig:
    """The configuration with a layer's own values: reading one that differs between layers raises RuntimeError in the one they share."""
    config, index = layer.config, getattr(layer, "layer_idx", None)
    return config.per_layer_config[index] if index is not None and config.is_heterogeneous else config


def asks_for_weights(config: PreTrainedConfig) -> bool:
    """Whether a configuration asks all layers for attention weights."""
    return bool(getattr(config, "output_attentions", False))


def is_unmodified(layer: AttentionLayer) -> bool:
    """Whether a patched layer computes exactly what it did before the patch, so that it needs nothing of the package."""
    state = state_of(layer)
    if state is None or state.choice is None or state.context is not None or state.key_conv is not None:
        return False
    return state.choice.attention == "full" or (state.choice.attention is None and state.choice.keeps_full)


def is_patched(layers: list[AttentionLayer]) -> bool:
    """Whether layers use MoBA, or would if they had not been switched to full attention."""
    return all(implementation_of(layer.config) in MOBA or _has_original_name(layer) for layer in layers)


def _has_original_name(layer: AttentionLayer) -> bool:
    return is_unmodified(layer) and implementation_of(layer.config) == original_implementation(layer)


def name_attention(layers: list[AttentionLayer], moba: str | None = None) -> None:
    """Set the attention name in the configurations, which the model's code and its masks depend on.

    If all layers use full attention, it is the original name. Otherwise it is one of MoBA's names: the current one, or else `moba`, or what
    it will be after a `full_attention` block, or "moba". A name that is neither was set with `set_attn_implementation`, and stays.
    """
    for config in configs_of(layers):
        own = [layer for layer in layers if layer.config is config]
        name, original = implementation_of(config), original_implementation(own[0])
        if name not in (*MOBA, original):
            continue
        if all(map(is_unmodified, own)):
            set_implementation(config, original)
        elif all(choice_of(layer) is not None for layer in own) and name not in MOBA:
            blocks = [choice.full_blocks for layer in own if (choice := choice_of(layer)) is not None]
            set_implementation(config, moba or next((full.named for full in blocks if full is not None), "moba"))


def attention_of(layer: AttentionLayer, settings: MobaConfig, named: str | None = None) -> str:
    """The attention that a layer uses now, "full", "moba" or "moba_naive"; `named` is the name in its configuration."""
    choice = choice_of(layer)
    if choice is not None and choice.attention is not None:
        return choice.attention
    if (choice is None and not is_replaceable(layer)) or keeps_full(layer, settings):
        return "full"
    return named or implementation_of(layer.config)


def keeps_full(layer: AttentionLayer, settings: MobaConfig) -> bool:
    """Whether `full_attention_layers` names a layer.

    The result found when patching is kept: while transformers drafts with `assistant_early_exit`, it sets the configuration's number of
    layers to the number that it runs.
    """
    choice = choice_of(layer)
    return choice.keeps_full if choice is not None else keeps_full_by_config(layer, settings)


def keeps_full_by_config(layer: AttentionLayer, settings: MobaConfig) -> bool:
    """As `keeps_full`, by the configuration's number of layers. Raises ValueError if `full_attention_layers` names a missing layer."""
    named, index = full_layers(settings, n_layers(layer), layer), getattr(layer, "layer_idx", None)
    if named and index is not None and index < 0:  # Zamba2 layers get their index with each call
        raise ValueError(f"full_attention_layers={named}, but no {type(layer).__name__} says which layer it is: leave it out")
    return index in named


def n_layers(layer: AttentionLayer) -> int:
    """The number of layers in a causal layer's stack: in an encoder-decoder configuration `num_hidden_layers` may be the encoder's."""
    return n_layers_of(layer.config)


def n_layers_of(config: PreTrainedConfig) -> int:
    """`n_layers` of a configuration."""
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def full_layers(settings: MobaConfig, n_layers: int, model: nn.Module | type) -> list[int]:
    """`full_attention_layers` counted from 0. Raises ValueError, naming the model's class, if a layer does not exist."""
    if not settings.full_attention_layers:
        return []
    return resolve_layers("full_attention_layers", settings.full_attention_layers, n_layers, range(n_layers), model)


def resolve_layers(name: str, layers: tuple[int, ...], n_layers: int, found: range | list[int], model: nn.Module | type) -> list[int]:
    """Layer indices counted from 0; negative ones count from the last of `n_layers`.

    Raises ValueError for an index that is not in `found`. It names the class of `model`, which may itself be a class, and the layers in
    `found`.
    """
    model_class = model if isinstance(model, type) else type(model)
    resolved = [layer if layer >= 0 else n_layers + layer for layer in layers]
    for given, layer in zip(layers, resolved):
        if layer not in found:
            raise ValueError(f"{name} has {shown(given)}, but {model_class.__name__} has the layers {format_layers(found)}")
    return resolved


def format_layers(layers: range | list[int]) -> str:
    """Layer indices for messages: "0 to 3", "1, 3, 5"."""
    layers = list(layers)
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "(none)"


def original_implementation(layer: AttentionLayer) -> str:
    """The name of the attention that a layer uses when it does not use MoBA."""
    choice = choice_of(layer)
    return choice.original if choice is not None else default_implementation(type(layer))


def original_attention(layer: AttentionLayer, implementation: str) -> Callable[..., Any]:
    """The function behind the name, found where the layer itself would find it.

    Raises ValueError for "eager" if the model's source has no eager attention.
    """
    attention = attention_by_name(_source(type(layer)), implementation)
    if attention is None:
        raise ValueError(
            f"{type(layer).__name__} has no eager_attention_forward, so full attention needs another implementation: "
            'load the model with attn_implementation="sdpa"'
        )
    return attention


@_of_a_class
def default_implementation(layer_class: type[nn.Module]) -> str:
    """The implementation that transformers chooses by default: "sdpa" if the model's source supports it, else "eager"."""
    return "sdpa" if supports_sdpa(_source(layer_class)) else "eager"


def _is_served(layer: AttentionLayer) -> bool:
    """Whether a layer works with MoBA's masks. A layer that only inspects its mask can be given the original one."""
    if _runs_optional_code(layer):
        return False
    return _ignores_mask(type(layer)) or (_only_looks(type(layer)) and accepts_kwargs(type(layer)))


def _runs_optional_code(layer: AttentionLayer) -> bool:
    return any(getattr(layer, name, False) is True for name in OPTIONAL_CODE)


def check_served(layer: AttentionLayer) -> None:
    """Raise ValueError if the code of an unpatched layer would behave differently under MoBA's name and masks."""
    if _ignores_mask(type(layer)) and not _runs_optional_code(layer):
        return
    remedy = "call moba_flex.patch(model, ...)" if _is_served(layer) else "the model cannot use MoBA"
    raise ValueError(f"the code of {type(layer).__name__} depends on its mask or on the name of its attention, which are MoBA's: {remedy}")


def mask_use_of(layer: AttentionLayer) -> MaskUse:
    """What a layer's code does with its mask, besides passing it to the attention function."""
    if _runs_optional_code(layer):
        return MaskUse.NAMES
    return _mask_use(type(layer))


_mask_use = _of_a_class(mask_use)


# For compiled graphs: torch.compile does not preserve the identity of enumeration members.


@_of_a_class
def _ignores_mask(layer_class: type[nn.Module]) -> bool:
    """Whether a layer only passes its mask on, and does not read the implementation's name."""
    return mask_use(layer_class) is MaskUse.NOTHING


@_of_a_class
def _only_looks(layer_class: type[nn.Module]) -> bool:
    """Whether a layer inspects its mask, and does nothing else with it."""
    return mask_use(layer_class) is MaskUse.LOOKS


@_of_a_class
def mask_argument_index(layer_class: type[nn.Module]) -> int:
    """The position of the mask among the positional arguments of a layer."""
    return list(inspect.signature(layer_class.forward).parameters).index("attention_mask") - 1  # without self


@_of_a_class
def accepts_kwargs(module_class: type[nn.Module]) -> bool:
    """Whether a module's `forward` takes extra keyword arguments."""
    return takes_any_keyword(module_class.forward)


def takes_any_keyword(function: Callable[..., Any]) -> bool:
    """Whether a function takes keyword arguments that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


@_of_a_class
def is_foreign(layer_class: type[nn.Module]) -> bool:
    """Whether scores get a bias per query and key (T5 and similar), or keys come from other states (Mllama)."""
    names = {name for method in ("forward", "__init__") for name in inspect.signature(getattr(layer_class, method)).parameters}
    foreign = {"position_bias", "has_relative_attention_bias", "cross_attention_states"}
    return not names.isdisjoint(foreign) or not passes_to_attention(layer_class).isdisjoint(UNKNOWN_TO_MOBA)


@_of_a_class
def _source(layer_class: type[nn.Module]) -> ModuleType | None:
    """The Python module in which the class or one of its bases looks up attention in transformers' registry; None if none does."""
    return looks_up_attention(layer_class)
