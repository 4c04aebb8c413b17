"""Suggested `block_size` and `top_k` per prompt length, and a warning where a model's settings have no effect.

`docs/how-to/block-size.md` has the same table, with measurements.
"""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedConfig

from ..config import MobaConfig, changed_settings
from .by_identity import ByIdentity

# Prompts up to this length, `block_size`, `top_k`. Longer prompts use the last entry.
SIZES = (
    (4_096, 64, 12),
    (8_192, 64, 24),
    (524_288, 128, 8),
    (1_048_576, 128, 16),
)
# No warning for shorter prompts: nearly every model also gets short ones, and MoBA is not faster there.
SHORTEST_TOLD = 1024

# Settings of models that need no warning: a prompt was sparse, or they have been warned.
_KNOWN: ByIdentity[MobaConfig] = ByIdentity()


def suggested_blocks(n_tokens: int) -> tuple[int, int]:
    """Suggested `block_size` and `top_k` for prompts of `n_tokens` tokens.

    >>> from moba_flex.models.sizes import suggested_blocks
    >>> suggested_blocks(8_192), suggested_blocks(32_768)
    ((64, 24), (128, 8))
    """
    return next(((block_size, top_k) for longest, block_size, top_k in SIZES if n_tokens <= longest), SIZES[-1][1:])


def without_effect(n_tokens: int, settings: MobaConfig) -> str:
    """A message that MoBA has no effect on a prompt of at most `block_size * top_k` tokens, with settings that would have one."""
    block_size, top_k = settings.block_size, settings.top_k
    n_blocks = -(-n_tokens // block_size)
    blocks = "1 block" if n_blocks == 1 else f"{n_blocks:,} blocks"
    said = f"a prompt of {n_tokens:,} tokens has {blocks} of block_size={block_size}, and top_k={top_k} reads them all: attention is full"
    smaller, fewer = suggested_blocks(n_tokens)
    fewer = max(fewer, 1 + settings.sink_blocks + settings.recent_blocks)
    if n_tokens <= smaller * fewer:
        return f"{said}. MoBA is for longer prompts"
    call = {"block_size": smaller, "top_k": fewer}  # patch resets what it is not given
    call = {**call, **{name: value for name, value in changed_settings(settings).items() if name not in call}}
    keywords = ", ".join(f"{name}={value!r}" for name, value in call.items())
    return f"{said}. Smaller settings for this length: patch(model, {keywords})"


def note_sparse(config: PreTrainedConfig, settings: MobaConfig) -> None:
    """Record that a prompt of a model was sparse: shorter prompts need no warning."""
    if not torch.compiler.is_compiling() and not _is_known(config, settings):
        _KNOWN.put(config, settings)


def warn_of_no_effect(config: PreTrainedConfig, settings: MobaConfig, n_new: int, n_tokens: int) -> None:
    """Warn, once per model and settings, that all keys of a prompt were read. `n_new` of its `n_tokens` are new."""
    if n_new < SHORTEST_TOLD or torch.compiler.is_compiling() or _is_known(config, settings):
        return
    _KNOWN.put(config, settings)
    warnings.warn(
        f"MoBA has no effect: {without_effect(n_tokens, settings)}. moba_flex.describe(model, length={n_tokens}) shows each layer",
        stacklevel=2,
    )


def _is_known(config: PreTrainedConfig, settings: MobaConfig) -> bool:
    known = _KNOWN.get(config)
    return known is settings or known == settings
