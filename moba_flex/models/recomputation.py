"""Gradient checkpoints compute a layer twice, and it must use the second time what it used the first, whatever was switched in between.

Each pass of training has a `ForwardPass`, which comes to every layer among its arguments, both times. It is empty as long as nothing is
switched, so that compiled layers share a graph. Whoever switches calls `before_switch`, and what layers used until then is written into
the passes whose backward pass may still come.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import MobaConfig
from ..core.upstream import computes_gradients
from .layers import attention_layers, attention_of
from .state import choice_of

if TYPE_CHECKING:
    from .upstream import AttentionLayer

_REMEDY = "backward must come before patch, set_attention, full_attention or unpatch change what the forward pass used"


class ForwardPass:
    """One pass of training."""

    def __init__(self) -> None:
        self._used: dict[AttentionLayer, tuple[str, MobaConfig]] | None = None
        _PASSES.add(self)

    def used(self, layer: AttentionLayer, attention: str, settings: MobaConfig) -> tuple[str, MobaConfig]:
        """What a layer uses in this pass: `attention` with `settings`, unless it was switched to that later."""
        return (attention, settings) if self._used is None else self._used.get(layer, (attention, settings))

    def keep(self, used: dict[AttentionLayer, tuple[str, MobaConfig]]) -> None:
        """Layers will use something else from now on."""
        self._used = {**used, **(self._used or {})}


_PASSES: weakref.WeakSet[ForwardPass] = weakref.WeakSet()  # checkpoints hold a pass until its backward pass is over
_SWITCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # after their last forward pass


def before_switch(model: nn.Module) -> None:
    """The attention of a model's layers is about to change."""
    if passes := list(_PASSES):
        patched = [layer for layer in attention_layers(model) if choice_of(layer) is not None]
        used = {layer: (attention_of(layer, settings), settings) for layer in patched for settings in [MobaConfig.of(layer.config)]}
        for each in passes:
            each.keep(used)
    _SWITCHED.update(part for part in model.modules() if isinstance(part, PreTrainedModel))


def check_not_switched(model: PreTrainedModel) -> None:
    """Called as a forward pass begins. ValueError if a checkpoint around the whole model computes an earlier one again.

    Then no argument could tell what that one used.
    """
    if not computes_gradients():
        _SWITCHED.discard(model)
    elif model in _SWITCHED:
        raise ValueError(
            f"a checkpoint computes {type(model).__name__} again, whose attention was switched after its forward pass: {_REMEDY}"
        )


def check_pass_is_known(layer: AttentionLayer) -> None:
    """For a call without a mask of MoBA. ValueError if a checkpoint computes a layer again whose forward pass knew nothing of MoBA."""
    if not torch.compiler.is_compiling() and computes_gradients():
        raise ValueError(f"a checkpoint computes {type(layer).__name__} again, which was patched after its forward pass: {_REMEDY}")
