"""What the call of a model says about its tokens, for the masks that are made during the call.

Not all models pass extra keyword arguments down to their attention layers, but all pass the mask. Hooks on the models, see `call_hooks.py`,
record here what a call says; each `MobaMask` takes it from here when it is made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.upstream import modules_being_called
from .recomputation import ForwardPass

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of a model."""

    drafts: int = 0  # how many of the last tokens are drafts, which may share the call with a prompt
    packed: tuple[Tensor | None, Tensor | None] = (None, None)  # `cu_seq_lens_q` and `cu_seq_lens_k`
    all_real: bool = False  # the mask of the call was added by a hook: no token is padding
    this_pass: ForwardPass | None = None  # with gradients, outside of graphs
    wants_weights: bool | None = None  # `output_attentions`; None: the call does not say

    def is_plain(self) -> bool:
        """Whether the call says nothing that a mask made before it would have to know."""
        return not self.drafts and self.packed[0] is None and self.this_pass is None and self.wants_weights is None


PLAIN = ModelCall()


@dataclass(frozen=True, eq=False)
class _Running:
    """A model that is being called."""

    model: nn.Module
    call: ModelCall


class _OfThread(threading.local):
    def __init__(self) -> None:
        # Calls are nested: a model with a head calls its stack of layers. A list, since torch.compile loses attributes that it sets here.
        self.running: list[_Running] = []


_HERE = _OfThread()


def current_call(config: PreTrainedConfig | None) -> ModelCall:
    """The innermost call in this thread, for a mask of a model with this configuration; None: the mask does not say whose it is."""
    if not _HERE.running:
        return PLAIN
    model, call = _HERE.running[-1].model, _HERE.running[-1].call
    return call if config is None or call.is_plain() or torch.compiler.is_compiling() or _has(model, config) else PLAIN


def outer_call(model: nn.Module) -> ModelCall:
    """The innermost call in this thread of a model that `model` is a part of."""
    if torch.compiler.is_compiling():
        return _HERE.running[-1].call if _HERE.running else PLAIN
    if all(running.call.is_plain() for running in _HERE.running):  # spares the search, which takes long in large models
        return PLAIN
    for running in reversed(_HERE.running):
        if running.model is not model and any(part is model for part in running.model.modules()):
            return running.call
    return PLAIN


def begin_call(model: nn.Module, call: ModelCall) -> None:
    """To be called before a model's `forward`."""
    _HERE.running.append(_Running(model, call))


def end_call(model: nn.Module) -> None:
    """To be called after a model's `forward`, also if it raises; also if `begin_call` was not reached."""
    if _HERE.running and _HERE.running[-1].model is model:
        _HERE.running.pop()


def forget_ended() -> None:
    """To be called at the beginning of a model's call: forget calls that have ended without `end_call`.

    No hook runs after a KeyboardInterrupt, or if it is removed during the call.
    """
    if torch.compiler.is_compiling() or not _HERE.running:
        return
    called = modules_being_called()[1:]  # without the call that begins
    kept: list[_Running] = []
    for running in reversed(_HERE.running):
        place = next((i for i, module in enumerate(called) if module is running.model), None)
        if place is not None:
            kept.insert(0, running)
            called = called[place + 1 :]
    _HERE.running[:] = kept


def _has(model: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a model, or a part of it, has this configuration."""
    return any(isinstance(part, PreTrainedModel) and part.config is config for part in model.modules())
