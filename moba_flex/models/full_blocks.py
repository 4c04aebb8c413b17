"""The `full_attention` blocks that layers are in. Those of several tasks or threads overlap: the last one that is left restores a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .layers import MOBA, configs_of, name_attention
from .state import FullBlocks, choice_of, set_choice
from .upstream import implementation_of

if TYPE_CHECKING:
    from .upstream import AttentionLayer


def enter(block: object, layers: list[AttentionLayer]) -> None:
    """Let patched layers use full attention until `block`, and all others that they are in, are left."""
    for layer in layers:
        choice = choice_of(layer)
        assert choice is not None  # it is patched
        within = choice.full_blocks
        if within is None:
            name = implementation_of(layer.config)
            within = FullBlocks(frozenset(), choice, name if name in MOBA else "moba")
        set_choice(layer, replace(choice, attention="full", full_blocks=replace(within, blocks=within.blocks | {block})))


def within(block: object, layers: list[AttentionLayer]) -> dict[AttentionLayer, FullBlocks]:
    """The blocks of those layers that are in `block`. Layers switched since they entered it are in none."""
    found = {layer: choice.full_blocks for layer in layers if (choice := choice_of(layer)) is not None and choice.full_blocks is not None}
    return {layer: full for layer, full in found.items() if block in full.blocks}


def leave(block: object, layers: list[AttentionLayer]) -> None:
    """Restore the layers for which `block` was the last one. `layers` are all of the model, which share configurations."""
    left = within(block, layers)
    for layer, full in left.items():
        choice, others = choice_of(layer), full.blocks - {block}
        assert choice is not None  # it is in the block
        set_choice(layer, replace(choice, full_blocks=replace(full, blocks=others)) if others else full.after)
    for config in configs_of(left):
        named = next(full.named for layer, full in left.items() if layer.config is config)
        name_attention([layer for layer in layers if layer.config is config], named)
