"""Calls of a pass that repeat an earlier layer's call of the original attention.

The layers of a model are usually called alike. What `decision.py` decides for the first of them then holds for the others, and deciding it
again for each layer takes as much of the host's time as launching the attention: with short prompts and generated tokens the GPU waits for
the host. Only the original attention is repeated, since all that it depends on is compared here.

Nq queries, Nk keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..config import MobaConfig
from .decision import LayerCall, LayerPath
from .layers import original_attention, original_implementation
from .masks import MobaMask
from .state import Choice, choice_of_plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .upstream import AttentionLayer

_VALUES = (bool, int, float, str)  # types whose equal values mean the same
_PATHS = (LayerPath.FULL, LayerPath.DECODING_FULL, LayerPath.ALL_KEYS)


class OriginalCall(NamedTuple):
    """A layer's call of its original attention, and all that this was decided by."""

    attention: Callable[..., tuple[Tensor, Tensor | None]]
    mask: Tensor | BlockMask | None
    layer_class: type
    config: PreTrainedConfig
    settings: MobaConfig
    choice: Choice
    named: str
    lengths: tuple[int, int]  # Nq, Nk
    device: torch.device
    kwargs: dict[str, Any]

    def is_repeated_by(self, layer: AttentionLayer, query: Tensor, key: Tensor, named: str, kwargs: dict[str, Any]) -> bool:
        """Whether a call with the same `MobaMask` differs in nothing that the decision depends on."""
        choice = choice_of_plain(layer)
        return (
            choice is not None
            and type(layer) is self.layer_class
            and layer.config is self.config
            and (query.shape[2], key.shape[2]) == self.lengths
            and named == self.named
            and query.device == self.device
            and choice == self.choice
            and _equal(kwargs, self.kwargs)
            and MobaConfig.of(layer.config) is self.settings
        )


def repeated(layer: AttentionLayer, query: Tensor, key: Tensor, mask: object, named: str, kwargs: dict[str, Any]) -> OriginalCall | None:
    """The earlier call of the pass that this call repeats, if any. `kwargs` are all arguments that the layer passes."""
    if torch.compiler.is_compiling() or not isinstance(mask, MobaMask):
        return None
    known = mask.original_call
    return known if known is not None and known.is_repeated_by(layer, query, key, named, kwargs) else None


def remember(call: LayerCall, named: str, path: LayerPath) -> None:
    """Note a call that took `path`, without attention weights, for the later layers of its pass.

    Not with gradients, where checkpoints run layers again after a switch; and only "sdpa", whose function neither returns weights nor reads
    its own name. Calls that update block means pass a cache, which is none of the arguments compared: they are never repeated.
    """
    mask, choice, settings = call.mask, choice_of_plain(call.layer), call.settings
    if torch.compiler.is_compiling() or not isinstance(mask, MobaMask) or mask.call.this_pass is not None or choice is None:
        return
    if path not in _PATHS or settings.key_conv:
        return
    if (implementation := original_implementation(call.layer)) != "sdpa":
        return
    mask.original_call = OriginalCall(
        original_attention(call.layer, implementation),
        mask.original(implementation, call.query.device),
        type(call.layer),
        call.layer.config,
        settings,
        choice,
        named,
        (call.query.shape[2], call.key.shape[2]),
        call.query.device,
        call.kwargs,
    )


def _equal(kwargs: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether two calls pass the same arguments: the same objects, or equal numbers and names."""
    if kwargs.keys() != known.keys():
        return False
    for name, value in kwargs.items():
        other = known[name]
        if value is not other and not (type(value) is type(other) and type(value) in _VALUES and value == other):
            return False
    return True
