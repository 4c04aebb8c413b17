"""Settings of MoBA beside PEFT's adapters: a file of their own in an adapter's folder, written when PEFT saves the adapter.

PEFT saves an adapter's weights and its `PeftConfig`, and nothing of the model's configuration. Before it does so it asks the model for its
state dict. A hook there gives each `PeftConfig` that PEFT has left on the model a `save_pretrained` that writes the settings too. PEFT's
classes stay what they are, and its own loader reads such a folder as any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import MobaConfig
from .layers import attention_layers, takes_moba
from .state import save_hook_of, set_save_hook
from .upstream import ADAPTER_SAVER, adapter_configs_of, file_of_repository

SETTINGS_FILE = "moba.json"


class SaveWithSettings:
    """`save_pretrained` of one `PeftConfig`, which is copied and pickled with it."""

    def __init__(self, adapter: Any, settings: MobaConfig) -> None:
        self._adapter, self._settings = adapter, settings

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        getattr(type(self._adapter), ADAPTER_SAVER)(self._adapter, save_directory, **kwargs)
        (Path(save_directory) / SETTINGS_FILE).write_text(json.dumps(self._settings.to_dict(), indent=2) + "\n")


def save_settings_with_adapters(model: nn.Module) -> None:
    """Let adapters that PEFT saves of this model, now or once it has some, have the model's settings beside them."""
    for module in _holders(model):
        if save_hook_of(module) is None:
            set_save_hook(module, module.register_state_dict_pre_hook(_prepare))


def save_adapters_alone(modules: Iterable[nn.Module]) -> None:
    """Undo it for some modules."""
    for module in modules:
        if (handle := save_hook_of(module)) is not None:
            handle.remove()
            set_save_hook(module, None)
            _restore(module)


def modules_with_save_hooks(model: nn.Module) -> set[nn.Module]:
    """Those of a model whose adapters are saved with its settings."""
    return {module for module in model.modules() if save_hook_of(module) is not None}


def _holders(model: nn.Module) -> list[nn.Module]:
    """Models of transformers on which PEFT may leave its adapters' configurations, and those of PEFT."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) or adapter_configs_of(module)]


def _prepare(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook before a model's state dict is made."""
    adapters = adapter_configs_of(module)
    if not adapters:
        return
    settings = next((MobaConfig.of(layer.config) for layer in attention_layers(module) if takes_moba(layer)), None)
    if settings is None:
        return
    for adapter in adapters:
        setattr(adapter, ADAPTER_SAVER, SaveWithSettings(adapter, settings))


def _restore(module: nn.Module) -> None:
    for adapter in adapter_configs_of(module):
        if isinstance(vars(adapter).get(ADAPTER_SAVER), SaveWithSettings):
            delattr(adapter, ADAPTER_SAVER)


def settings_beside_adapter(name: str, where: dict[str, Any]) -> MobaConfig | None:
    """The settings in the folder or repository of an adapter; None if there are none.

    Raises ValueError, naming the file, if they are no settings.
    """
    file = None
    with suppress(OSError):  # loading says what is wrong
        file = file_of_repository(name, SETTINGS_FILE, where)
    if file is None:
        return None
    try:
        return MobaConfig.from_dict(json.loads(Path(file).read_text()))
    except ValueError as error:
        raise ValueError(f"the settings of MoBA in {file} cannot be used: {error}") from error
