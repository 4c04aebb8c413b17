"""Which modules of a model are attention layers, and which attention each of them uses.

transformers looks an attention layer's function up by one name in the configuration that all layers share. Here that
name is "moba" or "moba_naive" for all of them, and the `Choice` in a layer's state says what it does otherwise.
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
# Arguments of attention that change who sees whom, or the scores, in ways that MoBA has no form of.
UNKNOWN_TO_MOBA = ("position_bias", "cache", "indices", "block_indices", "sinks")
T = TypeVar("T")


def _of_a_class(find: Callable[[type[nn.Module]], T]) -> Callable[[type[nn.Module]], T]:
    """Look a class of layers up once. torch.compile takes the answer as a constant, without tracing how it is found."""
    once = lru_cache(maxsize=256)(find)

    @constant_in_graphs
    @wraps(find)
    def found(layer_class: type) -> T:
        return once(layer_class)

    return found


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """All modules of a model that look their attention up in transformers' registry, of whatever kind."""
    return [module for module in model.modules() if _is_attention(module)]


def _is_attention(module: nn.Module) -> TypeGuard[AttentionLayer]:
    return hasattr(module, "config") and _source(type(module)) is not None


def configs_of(modules: Iterable[Configured]) -> list[PreTrainedConfig]:
    """The configurations of modules, each once: layers share them."""
    return list({id(module.config): module.config for module in modules}.values())


def takes_moba(layer: AttentionLayer) -> bool:
    """Whether a layer is causal self-attention over all keys: what MoBA can replace."""
    index, config = getattr(layer, "layer_idx", None), layer.config
    if index is None or getattr(layer, "is_cross_attention", False) or not getattr(layer, "is_causal", True):
        return False
    if _is_foreign(type(layer)) or not _is_served(layer):
        return False
    types = getattr(config, "layer_types", None)
    if types is not None and index < len(types):
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", True) else None  # EXAONE 4 has it in all layers
        return types[index] in FULL_LAYER_TYPES and window is None
    return getattr(layer, "sliding_window", getattr(config, "sliding_window", None)) is None


def plainly_full(layer: AttentionLayer) -> bool:
    """Whether a patched layer computes just what it did before, so that nothing of the package is needed around it."""
    state = state_of(layer)
    if state is None or state.choice is None or state.context is not None or state.key_conv is not None:
        return False
    return state.choice.attention == "full" or (state.choice.attention is None and state.choice.keeps_full)


def is_patched(layers: list[AttentionLayer]) -> bool:
    """Whether layers use MoBA, or would but for full attention that was chosen for them."""
    return all(implementation_of(layer.config) in MOBA or _has_original_name(layer) for layer in layers)


def _has_original_name(layer: AttentionLayer) -> bool:
    return plainly_full(layer) and implementation_of(layer.config) == original_implementation(layer)


def name_attention(layers: list[AttentionLayer], moba: str = "moba") -> None:
    """Let configurations name what their layers use, for the model's code reads that name and its masks follow from it.

    Where all layers use full attention it is the name that the model had before, so that the model is what it was. Else it is one of
    MoBA's: `moba`, where it is none yet.
    """
    for config in configs_of(layers):
        own = [layer for layer in layers if layer.config is config]
        if all(map(plainly_full, own)):
            set_implementation(config, original_implementation(own[0]))
        elif all(choice_of(layer) is not None for layer in own) and implementation_of(config) not in MOBA:
            set_implementation(config, moba)


def attention_of(layer: AttentionLayer, settings: MobaConfig, named: str | None = None) -> str:
    """ "full", "moba" or "moba_naive": what a layer uses now, `named` being the one of these that its configuration names."""
    choice = choice_of(layer)
    if choice is not None and choice.attention is not None:
        return choice.attention
    if (choice is None and not takes_moba(layer)) or keeps_full(layer, settings):
        return "full"
    return named or implementation_of(layer.config)


def keeps_full(layer: AttentionLayer, settings: MobaConfig) -> bool:
    """Whether `full_attention_layers` names a layer.

    What patching found stays true: while it drafts with `assistant_early_exit`, transformers sets the configuration's number of layers to
    those that it runs.
    """
    choice = choice_of(layer)
    return choice.keeps_full if choice is not None else named_full(layer, settings)


def named_full(layer: AttentionLayer, settings: MobaConfig) -> bool:
    """The same, by the configuration's number of layers. Raises ValueError if `full_attention_layers` names one that is not there."""
    named, index = full_layers(settings, n_layers(layer), layer), getattr(layer, "layer_idx", None)
    if named and index is not None and index < 0:  # Zamba2's, which are told their place with each call
        raise ValueError(f"full_attention_layers={named}, but no {type(layer).__name__} says which layer it is: leave it out")
    return index in named


def n_layers(layer: AttentionLayer) -> int:
    """How many layers there are in a causal layer's stack: `num_hidden_layers` may be an encoder's, where the configuration is of both."""
    return n_layers_of(layer.config)


def n_layers_of(config: PreTrainedConfig) -> int:
    """The same by a configuration."""
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def full_layers(settings: MobaConfig, n_layers: int, model: nn.Module | type) -> list[int]:
    """`full_attention_layers` counted from 0; ValueError, naming the model's class, if one is not there."""
    if not settings.full_attention_layers:
        return []
    return resolve_layers("full_attention_layers", settings.full_attention_layers, n_layers, range(n_layers), model)


def resolve_layers(name: str, layers: tuple[int, ...], n_layers: int, found: range | list[int], model: nn.Module | type) -> list[int]:
    """Layer indices counted from 0, where negative ones count from the last of `n_layers`.

    Raises ValueError, naming the class of the model, which may be given itself, and the layers that were found, for an index that is not
    among them.
    """
    model_class = model if isinstance(model, type) else type(model)
    resolved = [layer if layer >= 0 else n_layers + layer for layer in layers]
    for given, layer in zip(layers, resolved):
        if layer not in found:
            raise ValueError(f"{name} has {shown(given)}, but {model_class.__name__} has the layers {show(found)}")
    return resolved


def show(layers: range | list[int]) -> str:
    """For messages: "0 to 3", "1, 3, 5"."""
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
def default_implementation(layer_class: type[nn.Module]) -> str:
    """What transformers gives a model that asks for nothing: "sdpa" where its source says so, else "eager"."""
    return "sdpa" if supports_sdpa(_source(layer_class)) else "eager"


def _is_served(layer: AttentionLayer) -> bool:
    """Whether a layer's own code finds the mask that it knows: one that only looks at it can be handed that of the original attention."""
    if _runs_optional_code(layer):
        return False
    return _ignores_mask(type(layer)) or (_only_looks(type(layer)) and takes_more(type(layer)))


def _runs_optional_code(layer: AttentionLayer) -> bool:
    return any(getattr(layer, name, False) is True for name in OPTIONAL_CODE)


def check_served(layer: AttentionLayer) -> None:
    """ValueError if the code of a layer that was not patched would do something else under MoBA's name and masks."""
    if _ignores_mask(type(layer)) and not _runs_optional_code(layer):
        return
    remedy = "call moba_flex.patch(model, ...)" if _is_served(layer) else "the model cannot use MoBA"
    raise ValueError(f"the code of {type(layer).__name__} depends on its mask or on the name of its attention, which are MoBA's: {remedy}")


def mask_use_of(layer: AttentionLayer) -> MaskUse:
    """What a layer's code does with its mask, beside handing it to the attention function."""
    if _runs_optional_code(layer):
        return MaskUse.NAMES
    return _mask_use(type(layer))


_mask_use = _of_a_class(mask_use)


# For what a graph asks: torch.compile does not know a member of an enumeration again.


@_of_a_class
def _ignores_mask(layer_class: type[nn.Module]) -> bool:
    """Whether a layer only hands its mask on, and asks for no name."""
    return mask_use(layer_class) is MaskUse.NOTHING


@_of_a_class
def _only_looks(layer_class: type[nn.Module]) -> bool:
    """Whether a layer looks at its mask, and does no more with it."""
    return mask_use(layer_class) is MaskUse.LOOKS


@_of_a_class
def mask_place(layer_class: type[nn.Module]) -> int:
    """The place of the mask among the arguments of a layer."""
    return list(inspect.signature(layer_class.forward).parameters).index("attention_mask") - 1  # without self


@_of_a_class
def takes_more(module_class: type[nn.Module]) -> bool:
    """Whether a module's `forward` takes any further keyword argument."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module_class.forward).parameters.values())


@_of_a_class
def _is_foreign(layer_class: type[nn.Module]) -> bool:
    """Whether a number for each query and key is added to the scores, as in T5 and its kin, or keys are those of other states (Mllama)."""
    names = {name for method in ("forward", "__init__") for name in inspect.signature(getattr(layer_class, method)).parameters}
    foreign = {"position_bias", "has_relative_attention_bias", "cross_attention_states"}
    return not names.isdisjoint(foreign) or not passes_to_attention(layer_class).isdisjoint(UNKNOWN_TO_MOBA)


@_of_a_class
def _source(layer_class: type[nn.Module]) -> ModuleType | None:
    """The Python module whose forward looks attention up in transformers' registry, for this class or a base of it."""
    return looks_up_attention(layer_class)
