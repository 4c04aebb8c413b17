"""Reuse of layer outputs: a pass over a text skips the first layers if an earlier pass over it used the same attention in them.

The search for layers that need full attention runs passes that differ in one layer. On a CPU a pass takes many seconds, half of them on
average for the layers before that one.

L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config import MobaConfig
from ...models.layers import attention_layers, is_replaceable
from ...models.upstream import DECODER_LAYER, skip_forward
from .space import with_full_layers

MOST_BYTES = 2 << 30  # of stored outputs
PROBE = 64  # number of tokens for the test whether a model can continue from a layer's output


@dataclass
class _Pass:
    text: int
    kinds: list[object]  # the attention of each layer
    outputs: list[Any]

    def shared(self, text: int, kinds: list[object]) -> int:
        """The number of first layers that a pass over `text` would repeat."""
        if text != self.text:
            return 0
        return next((n for n, (one, other) in enumerate(zip(kinds, self.kinds)) if one != other), len(kinds))


class Prefix:
    """Stores the decoder layers' outputs of passes, up to `MOST_BYTES`. The least recently used are dropped first."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = _decoder_layers(model)
        self._kept: list[_Pass] = []

    @property
    def possible(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def reused(self, config: MobaConfig | None, text: int) -> Iterator[int]:
        """Within the block a pass over `text` skips first layers that an earlier pass has computed. Yields the number of skipped layers."""
        kinds = [_kind(attention, config) for _, attention in self._layers]
        best = max(self._kept, key=lambda kept: kept.shared(text, kinds), default=None)
        n = 0 if best is None else min(best.shared(text, kinds), len(kinds) - 1)
        now = _Pass(text, kinds, [] if best is None else best.outputs[:n])
        with _instead(self._layers, now.outputs, n):
            yield n
        if best is not None and n:
            self._kept.remove(best)
            self._kept.append(best)
        if len(now.outputs) == len(self._layers):
            self._kept.append(now)
        while self._kept and _bytes(kept.outputs for kept in self._kept) > MOST_BYTES:
            self._kept.pop(0)

    def works(self, logits: Callable[[], Tensor]) -> bool:
        """Whether `logits`, a pass over a few tokens, gives bitwise equal results when it continues from the middle layer."""
        try:
            outputs: list[Any] = []
            with _instead(self._layers, outputs, 0):
                whole = logits()
            if len(outputs) != len(self._layers):
                return False
            half = len(outputs) // 2
            with _instead(self._layers, outputs[:half], half):
                return torch.equal(logits(), whole)
        except Exception:  # a layer needs more than the preceding layer's output
            return False


@contextmanager
def _instead(layers: list[tuple[nn.Module, nn.Module]], outputs: list[Any], n: int) -> Iterator[None]:
    """The first `n` layers return the last of `outputs` at once; the outputs of the others are appended to it."""
    hooks = [layer.register_forward_hook(lambda _, args, output: outputs.append(output)) for layer, _ in layers[n:]]
    try:
        with skip_forward([layer for layer, _ in layers[:n]], outputs[n - 1] if n else None):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each decoder layer with its attention, in order; empty if a layer has several, or is not one of transformers' decoder layers."""
    attentions = attention_layers(model)
    found: list[tuple[nn.Module, nn.Module]] = []
    for layer in model.modules():
        if isinstance(layer, DECODER_LAYER):
            within = [module for module in attentions if any(module is part for part in layer.modules())]
            if len(within) != 1:
                return []
            found.append((layer, within[0]))
    return found if len(found) == len(attentions) else []


def _kind(attention: Any, config: MobaConfig | None) -> object:
    """A key that is equal for passes that compute the same in a layer."""
    if not is_replaceable(attention):
        return "its own"
    if config is None or attention.layer_idx in config.full_attention_layers:
        return "full"
    return with_full_layers(config)


def _bytes(outputs: Iterable[Any]) -> int:
    """Bytes of all tensors. Each counts once, since passes share them."""
    return sum({id(x): x.numel() * x.element_size() for x in _tensors(outputs)}.values())


def _tensors(outputs: Iterable[Any]) -> Iterator[Tensor]:
    for output in outputs:
        if isinstance(output, Tensor):
            yield output
        elif isinstance(output, (tuple, list)):
            yield from _tensors(output)
