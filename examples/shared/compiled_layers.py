"""Compilation of a model layer by layer. Layers with the same attention share a graph. This takes a small part of the time that compiling
the whole model takes, and keeps the GPU as busy.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moba_flex.models.masks import MobaMask, moba_mask


def compile_layers(model: nn.Module, **options) -> None:
    """Compile each of a model's layers; `options` are those of `torch.compile`. The layers' parameters keep their names."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=False, fullgraph=True, **options)


@lru_cache(maxsize=8)
def mask_of(rows: int, context: int, device: torch.device) -> MobaMask:
    """The mask of rows that are whole sequences, for a patched model.

    Without it transformers would search for packed sequences, and break a compiled graph. All that layers read of the mask is computed
    here: a graph would be recompiled if that were added later.
    """
    mask, empty = moba_mask(rows, context, context, device=device), torch.empty(rows, 1, context, 0, device=device)
    mask.visible(empty, empty)
    mask.original("sdpa", device)
    return mask
