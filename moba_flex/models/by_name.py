"""Settings of models that use MoBA without having been patched: loaded with `attn_implementation="moba"` and no saved settings.

The loader may be a library: TRL's trainers load a reference model under the name of the policy's attention implementation. The reference
must compute what the policy computes. It therefore takes, with a warning, the settings of this process's patched models of the same kind,
including the layers that `set_attention` switched to full attention.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..config import DEFAULT, MobaConfig
from ..core.compiling import constant_in_graphs
from ..core.messages import kind_of
from .by_identity import ByIdentity
from .layers import MOBA, is_foreign, is_replaceable
from .state import Choice, patched_layers
from .upstream import global_value, implementation_of

if TYPE_CHECKING:
    from .upstream import AttentionLayer

_Kind = tuple[type[PreTrainedConfig], tuple[object, ...]]
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
_DEFAULTED: ByIdentity[MobaConfig] = ByIdentity()  # configurations of loaded models that use the defaults
_UNUSED: ByIdentity[bool] = ByIdentity()  # configurations of loaded models whose layers cannot use MoBA
_COMPARED: ByIdentity[bool] = ByIdentity()  # configurations already compared with patched models of their kind
_TRACED: dict[_Kind, MobaConfig] = {}  # the settings for the graph being traced


def settings_by_name(config: PreTrainedConfig, implementations: tuple[str, ...]) -> MobaConfig:
    """The settings of a layer that was not patched: those in its configuration, or else those of patched models, with a warning.

    Only patched models of the same class and sizes count; the vocabulary size may differ. Raises ValueError if their settings differ, or if
    they have `key_conv`, whose weights the loaded model lacks. Warns if the settings in the configuration differ from theirs.
    """
    kind = _kind(config)
    if getattr(config, "moba", None) is not None:
        if not torch.compiler.is_compiling() and _COMPARED.get(config) is None:
            _COMPARED.put(config, True)
            _compare(config, implementations)
        return MobaConfig.of(config)
    if torch.compiler.is_compiling():  # a graph can neither search nor write
        return _TRACED[kind] if _trace(kind, implementations) else DEFAULT
    if (settings := _DEFAULTED.get(config)) is not None:
        return settings
    settings = _found(kind, implementations)
    if settings is DEFAULT:  # not written to the config: later patches must not change it, and saving must not record it
        _DEFAULTED.put(config, settings)
    else:
        config.moba = settings
        _COMPARED.put(config, True)
    return settings


def settings_of_unpatched(layer: AttentionLayer) -> MobaConfig:
    """The settings of a layer of a model that was loaded with "moba". Layers that MoBA cannot replace need none, but may get a warning."""
    if is_replaceable(layer):
        return settings_by_name(layer.config, MOBA)
    config = layer.config
    if _is_of_another_kind(layer) and getattr(config, "moba", None) is None:
        if torch.compiler.is_compiling():  # a graph can neither search nor write
            _warn_of_no_use(type(layer), type(config))
        elif _DEFAULTED.get(config) is None and _UNUSED.get(config) is None:  # no layer with this configuration uses MoBA so far
            _UNUSED.put(config, True)
            _warn_of_no_use(type(layer), type(config))
    return DEFAULT


def _is_of_another_kind(layer: AttentionLayer) -> bool:
    """Whether a layer's model may have none that MoBA can replace: it is an encoder alone, or its attention has a position bias."""
    return is_foreign(type(layer)) or not (getattr(layer, "is_causal", True) or getattr(layer.config, "is_encoder_decoder", False))


@constant_in_graphs
def _warn_of_no_use(layer_class: type[nn.Module], config_class: type[PreTrainedConfig]) -> bool:
    warnings.warn(
        f'a model with a {config_class.__name__} was loaded with attn_implementation="moba", but {layer_class.__name__} keeps its original '
        "attention: MoBA can only replace full causal self-attention without a position bias",
        stacklevel=2,
    )
    return True


def _kind(config: PreTrainedConfig) -> _Kind:
    return type(config), tuple(global_value(config, name) for name in _SIZES)


@constant_in_graphs
def _trace(kind: _Kind, implementations: tuple[str, ...]) -> bool:
    """Called while a graph is traced: stores the settings in `_TRACED`."""
    _TRACED[kind] = _found(kind, implementations)
    return True


def _found(kind: _Kind, implementations: tuple[str, ...]) -> MobaConfig:
    settings, is_patched = _search(kind, implementations)
    whose = "those of this process's patched model of that kind" if is_patched else "the defaults"
    warnings.warn(f"{_loaded(kind)}: it takes {whose}, {settings}. moba_flex.patch(model, ...) sets others", stacklevel=2)
    return settings


def settings_to_come(config: PreTrainedConfig, implementations: tuple[str, ...]) -> MobaConfig:
    """What `settings_by_name` returns or raises, without warning and without side effects, for callers that only inspect."""
    if getattr(config, "moba", None) is not None:
        return MobaConfig.of(config)
    if (settings := _DEFAULTED.get(config)) is not None:
        return settings
    return _search(_kind(config), implementations)[0]


def _search(kind: _Kind, implementations: tuple[str, ...]) -> tuple[MobaConfig, bool]:
    """The settings of this process's patched models of a kind, and whether there are any such models."""
    patched = _patched(kind, implementations)
    different = list(dict.fromkeys(map(str, patched)))
    remedy = "Call moba_flex.patch(model, ...) on the loaded model, a trainer's reference model say, with its own"
    if len(different) > 1:
        raise ValueError(
            f"{_loaded(kind)}. This process has patched models of its kind with different settings: {'; '.join(different)}. {remedy}"
        )
    settings = patched[-1] if patched else DEFAULT
    if settings.key_conv:
        raise ValueError(
            f"{_loaded(kind)}. This process's patched model of its kind has key_conv={settings.key_conv}, whose weights the loaded one "
            "lacks: save the patched model and load it with moba_flex.AutoModelForCausalLM.from_pretrained"
        )
    return settings, bool(patched)


def _patched(kind: _Kind, implementations: tuple[str, ...]) -> list[MobaConfig]:
    """The current settings of this process's patched models of a kind.

    Models that use only full attention are left out, unless all models do.
    """
    choices: dict[int, dict[int | None, Choice]] = defaultdict(dict)
    configs: dict[int, PreTrainedConfig] = {}
    for place, choice in patched_layers():
        if not choice.is_fixed and getattr(place.config, "moba", None) is not None and _kind(place.config) == kind:
            configs[id(place.config)] = place.config
            choices[id(place.config)][place.index] = choice
    used, unused = [], []
    for key, config in configs.items():
        settings = MobaConfig.of(config)
        full = [index for index, c in choices[key].items() if c.attention == "full" or (c.attention is None and c.keeps_full)]
        if len(full) == len(choices[key]):
            unused.append(settings)
        elif implementation_of(config) in implementations:
            named = [index for index, c in choices[key].items() if c.keeps_full]
            indices = tuple(sorted(index for index in full if index is not None))
            used.append(settings if set(full) == set(named) else replace(settings, full_attention_layers=indices))
    return used or unused


def _compare(config: PreTrainedConfig, implementations: tuple[str, ...]) -> None:
    """Warn if a model loaded by name has other settings than the patched models of its kind: it may be their reference model."""
    own, others = MobaConfig.of(config), _patched(_kind(config), implementations)
    if others and str(own) not in map(str, others):
        warnings.warn(
            f'a model with {kind_of(config)} was loaded with attn_implementation="moba" and has the settings that were saved with '
            f"it, {own}, but this process's patched model of its kind has {others[-1]}: where it is that one's reference, call "
            "moba_flex.patch(model, ...) on it",
            stacklevel=2,
        )


def _loaded(kind: _Kind) -> str:
    return f'a model with a {kind[0].__name__} was loaded with attn_implementation="moba", and no settings of MoBA were saved with it'
