"""Models whose layers are compiled one by one: those with the same attention share a graph, which takes a small part of the time that
the whole model would, and keeps the GPU as busy.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moba_flex.models.masks import MobaMask, moba_mask


def compile_layers(model: nn.Module, **options) -> None:
    """Compile each of a model's layers; `options` are `torch.compile`'s. The layers' parameters keep their names."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=False, fullgraph=True, **options)


@lru_cache(maxsize=8)
def mask_of(rows: int, context: int, device: torch.device) -> MobaMask:
    """The mask of rows that are whole sequences, for a patched model. Left to itself, transformers would look for packed ones, and break
    a compiled graph.

    All that layers will ask of it is worked out now: a graph would be compiled again when it is there.
    """
    mask, empty = moba_mask(rows, context, context, device=device), torch.empty(rows, 1, context, 0, device=device)
    mask.visible(empty, empty)
    mask.original("sdpa", device)
    return mask
