"""Gradient checkpointing runs a layer's forward twice. Both runs must use the same attention, even if it was switched in between.

Each pass with gradients has a `ForwardPass`, which reaches every layer in both runs: in the mask of MoBA, or, if all layers use full
attention, as an argument. It is empty until something is switched, so that compiled layers share a graph. Code that switches calls
`before_switch` first, which records what layers used in the passes whose backward may still come.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import MobaConfig
from ..core.upstream import in_backward_pass
from ..core.weak_set import SharedWeakSet
from .layers import attention_layers, attention_of
from .state import choice_of

if TYPE_CHECKING:
    from .upstream import AttentionLayer

_REMEDY = "backward must come before patch, set_attention, full_attention or unpatch change what the forward pass used"


class ForwardPass:
    """One pass with gradients."""

    def __init__(self) -> None:
        self._used: dict[AttentionLayer, tuple[str, MobaConfig]] | None = None
        _PASSES.add(self)

    def used(self, layer: AttentionLayer, attention: str, settings: MobaConfig) -> tuple[str, MobaConfig]:
        """The attention and settings of a layer in this pass: the given ones, unless the layer was switched after the pass."""
        return (attention, settings) if self._used is None else self._used.get(layer, (attention, settings))

    def keep(self, used: dict[AttentionLayer, tuple[str, MobaConfig]]) -> None:
        """Record what layers have used so far, before they are switched. Earlier records take precedence."""
        self._used = {**used, **(self._used or {})}


_PASSES = SharedWeakSet[ForwardPass]()  # checkpoints keep a pass alive until its backward has run
_SWITCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # models switched since their last forward pass


def before_switch(model: nn.Module) -> None:
    """To be called before the attention of a model's layers changes."""
    if passes := _PASSES.all():
        patched = [layer for layer in attention_layers(model) if choice_of(layer) is not None]
        used = {layer: (attention_of(layer, settings), settings) for layer in patched for settings in [MobaConfig.of(layer.config)]}
        for each in passes:
            each.keep(used)
    _SWITCHED.update(part for part in model.modules() if isinstance(part, PreTrainedModel))


def may_be_recomputation() -> bool:
    """Whether a call may be the second run of a checkpoint, which is within a backward pass and has gradients."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and in_backward_pass()


def check_not_switched(model: PreTrainedModel) -> None:
    """Called at the start of a forward pass. Raises ValueError if a checkpoint around the whole model recomputes a pass from before a
    switch.

    The recomputed pass has a new `ForwardPass`, which does not know what the first run used.
    """
    if not in_backward_pass():
        _SWITCHED.discard(model)
    elif model in _SWITCHED and may_be_recomputation():
        raise ValueError(
            f"a checkpoint computes {type(model).__name__} again, whose attention was switched after its forward pass: {_REMEDY}"
        )


def check_pass_is_known(layer: AttentionLayer) -> None:
    """For a call without a MoBA mask and a `ForwardPass`: raise ValueError if a checkpoint recomputes a layer that did not use MoBA in its
    forward pass.
    """
    if may_be_recomputation():
        raise ValueError(
            f"a checkpoint computes {type(layer).__name__} again, which was patched or switched to MoBA after its forward pass: {_REMEDY}"
        )
