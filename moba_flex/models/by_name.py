"""Models that use MoBA without having been patched: loaded with `attn_implementation="moba"`, and no settings were saved with them.

The loader may be a library: TRL's trainers load a reference model by the name of the policy's implementation. It must compute what the
policy computes, so it takes the settings of the process's patched models of its kind, and says so.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from transformers import PreTrainedConfig

from ..config import DEFAULT, MobaConfig
from .upstream import implementation_of

_PATCHED: dict[type[PreTrainedConfig], list[weakref.ref]] = {}  # by class, the configurations that `patch` wrote settings into


def remember(config: PreTrainedConfig) -> None:
    """`patch` has written settings into this configuration."""
    others = [ref for ref in _PATCHED.get(type(config), ()) if ref() is not None and ref() is not config]
    _PATCHED[type(config)] = [*others, weakref.ref(config)]


def settings_by_name(config: PreTrainedConfig, implementations: tuple[str, ...]) -> MobaConfig:
    """The settings of a layer that was not patched: those in its configuration, or else, with a warning, of models that were patched.

    Raises ValueError if patched models of its kind differ.
    """
    if getattr(config, "moba", None) is not None:
        return MobaConfig.of(config)
    settings = _constant(type(config), implementations) if torch.compiler.is_compiling() else _found(type(config), implementations)
    if not torch.compiler.is_compiling():
        config.moba = settings
    return settings


def _found(kind: type[PreTrainedConfig], implementations: tuple[str, ...]) -> MobaConfig:
    patched = [config for ref in _PATCHED.get(kind, ()) if (config := ref()) is not None]
    patched = [config for config in patched if getattr(config, "moba", None) is not None and implementation_of(config) in implementations]
    different = list(dict.fromkeys(str(MobaConfig.of(config)) for config in patched))
    loaded = f'a model with a {kind.__name__} was loaded with attn_implementation="moba", and no settings of MoBA were saved with it'
    if len(different) > 1:
        raise ValueError(
            f"{loaded}. This process has patched models of that kind with different settings: {'; '.join(different)}. "
            "Call moba_flex.patch(model, ...) on the loaded model, a trainer's reference model say, with its own"
        )
    settings = MobaConfig.of(patched[-1]) if patched else DEFAULT
    whose = "those of this process's patched model of that kind" if patched else "the defaults"
    warnings.warn(f"{loaded}: it takes {whose}, {settings}. moba_flex.patch(model, ...) sets others", stacklevel=2)
    return settings


_constant = torch.compiler.assume_constant_result(_found)
