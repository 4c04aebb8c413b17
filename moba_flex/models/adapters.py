"""Settings of MoBA for PEFT adapters: an extra file in the adapter's folder, written when PEFT saves the adapter.

PEFT saves an adapter's weights and its `PeftConfig`, but not the model's configuration. Before it saves, it calls the model's `state_dict`.
A hook on that call gives each `PeftConfig` on the model a `save_pretrained` that also writes the settings of the model that is being saved:
other models may have the same `PeftConfig`. PEFT's classes are not changed, and its own loader can read the folder.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import MobaConfig
from .layers import attention_layers, is_replaceable
from .state import save_hook_of, set_save_hook
from .upstream import ADAPTER_SAVER, adapter_configs_of, file_of_repository, saving_module

SETTINGS_FILE = "moba.json"


class SaveWithSettings:
    """`save_pretrained` of one `PeftConfig`. It is copied and pickled together with that config."""

    def __init__(self, adapter: Any, owner: nn.Module) -> None:
        self._adapter = adapter
        self._owner: weakref.ref[nn.Module] | None = weakref.ref(owner)  # whose weights were asked for last

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_owner": None}

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        model = saving_module()
        if model is None and self._owner is not None:  # called by a program, not by a model
            model = self._owner()
        getattr(type(self._adapter), ADAPTER_SAVER)(self._adapter, save_directory, **kwargs)
        if model is not None and modules_with_save_hooks(model) and (settings := _settings_of(model)) is not None:
            (Path(save_directory) / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")


def save_settings_with_adapters(model: nn.Module) -> None:
    """Save the model's settings with every PEFT adapter of the model, including adapters that are added later."""
    for module in _holders(model):
        if save_hook_of(module) is None:
            set_save_hook(module, module.register_state_dict_pre_hook(_prepare))


def save_adapters_alone(modules: Iterable[nn.Module]) -> None:
    """Undo `save_settings_with_adapters` for these modules."""
    for module in modules:
        if (handle := save_hook_of(module)) is not None:
            handle.remove()
            set_save_hook(module, None)
            _restore(module)


def modules_with_save_hooks(model: nn.Module) -> set[nn.Module]:
    """The modules of a model whose adapters are saved with its settings."""
    return {module for module in model.modules() if save_hook_of(module) is not None}


def _holders(model: nn.Module) -> list[nn.Module]:
    """transformers models, which may get adapter configurations from PEFT, and PEFT models."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) or adapter_configs_of(module)]


def _prepare(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A pre-hook of the model's `state_dict`."""
    for adapter in adapter_configs_of(module):
        setattr(adapter, ADAPTER_SAVER, SaveWithSettings(adapter, module))


def _settings_of(model: nn.Module) -> MobaConfig | None:
    return next((MobaConfig.of(layer.config) for layer in attention_layers(model) if is_replaceable(layer)), None)


def _restore(module: nn.Module) -> None:
    for adapter in adapter_configs_of(module):
        if isinstance(vars(adapter).get(ADAPTER_SAVER), SaveWithSettings):
            delattr(adapter, ADAPTER_SAVER)


def settings_beside_adapter(name: str, where: dict[str, Any]) -> MobaConfig | None:
    """The settings in an adapter's folder or repository; None if there are none.

    Raises ValueError, naming the file, if the settings are not valid.
    """
    file = None
    with suppress(OSError):  # loading the adapter raises the error
        file = file_of_repository(name, SETTINGS_FILE, where)
    if file is None:
        return None
    try:
        return MobaConfig.from_dict(json.loads(Path(file).read_text()))
    except ValueError as error:
        raise ValueError(f"the settings of MoBA in {file} cannot be used: {error}") from error
