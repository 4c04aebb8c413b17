"""Layers that need not be computed again: those before the first layer in which two passes over a text differ.

Which layers need full attention is found by passes that differ in one layer. On a CPU a pass takes many seconds, and half of them are the
layers before that one.

L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...config import MobaConfig
from ...models.layers import attention_layers, takes_moba

MOST_BYTES = 4 << 30  # of kept outputs
PROBE = 64  # tokens with which it is seen whether a model can go on from a layer's output


@dataclass
class _Pass:
    kinds: list[Hashable]  # what each layer used
    outputs: list[Any]


class Prefix:
    """Keeps the outputs of the decoder layers of the last pass over each text, as far as there is room."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = _decoder_layers(model)
        self._last: dict[int, _Pass] = {}

    @property
    def possible(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def reused(self, config: MobaConfig | None, text: int) -> Iterator[int]:
        """Within the block a pass over `text` computes only what the last one over it did not; gives the number of layers that it skips."""
        kinds = [_kind(attention, config) for _, attention in self._layers]
        last = self._last.get(text)
        n = 0
        while last is not None and n < len(kinds) and kinds[n] == last.kinds[n]:
            n += 1
        n = min(n, len(kinds) - 1)
        now = _Pass(kinds, last.outputs[:n] if last is not None else [])
        with _instead(self._layers, now.outputs, n):
            yield n
        self._keep(text, now)

    def _keep(self, text: int, now: _Pass) -> None:
        self._last.pop(text, None)
        size = sum(_bytes(output) for output in now.outputs)
        while self._last and size * (1 + len(self._last)) > MOST_BYTES:
            self._last.pop(next(iter(self._last)))
        if size <= MOST_BYTES and len(now.outputs) == len(self._layers):
            self._last[text] = now

    def works(self, logits: Callable[[], Tensor]) -> bool:
        """Whether `logits`, a pass over a few tokens, gives the same bits when it goes on from the middle."""
        try:
            outputs: list[Any] = []
            with _instead(self._layers, outputs, 0):
                whole = logits()
            if len(outputs) != len(self._layers):
                return False
            half = len(outputs) // 2
            with _instead(self._layers, outputs[:half], half):
                return torch.equal(logits(), whole)
        except Exception:  # a layer wants more of the one before it than its output
            return False


@contextmanager
def _instead(layers: list[tuple[nn.Module, nn.Module]], outputs: list[Any], n: int) -> Iterator[None]:
    """The first `n` layers give the last of `outputs` at once; what the others give is appended to it."""
    hooks = [layer.register_forward_hook(lambda _, args, output: outputs.append(output)) for layer, _ in layers[n:]]
    kept = outputs[n - 1] if n else None
    before = [layer.__dict__.get("forward") for layer, _ in layers[:n]]
    try:
        for layer, _ in layers[:n]:
            layer.__dict__["forward"] = lambda *args, **kwargs: kept
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (layer, _), forward in zip(layers, before):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def _decoder_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each decoder layer with its attention, in order; none where a layer has several, or is none of transformers' own."""
    attentions = attention_layers(model)
    found: list[tuple[nn.Module, nn.Module]] = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            within = [module for module in attentions if any(module is part for part in layer.modules())]
            if len(within) != 1:
                return []
            found.append((layer, within[0]))
    return found if len(found) == len(attentions) else []


def _kind(attention: Any, config: MobaConfig | None) -> Hashable:
    """What makes two passes the same in a layer."""
    if not takes_moba(attention):
        return "its own"
    if config is None or attention.layer_idx in config.full_attention_layers:
        return "full"
    return config.block_size, config.top_k, config.sink_blocks, config.recent_blocks, config.share_selection


def _bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(map(_bytes, output)) if isinstance(output, (tuple, list)) else 0
