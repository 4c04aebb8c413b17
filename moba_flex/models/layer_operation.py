"""What a layer's call asks of the operation, and the attention that the layer had before: what all paths of a call share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core import validation
from ..core.settings import AttentionSettings
from ..functional import checked_settings
from .decision import LayerCall
from .layers import original_attention
from .upstream import set_implementation

if TYPE_CHECKING:
    from .upstream import AttentionLayer


@dataclass(frozen=True)
class Operation:
    """What one layer asks of the operation, beside its tensors and who may see whom."""

    settings: AttentionSettings
    sinks: Tensor | None


def operation_of(call: LayerCall, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Operation:
    """What a layer's call asks of the operation, checked."""
    implementation = "naive" if call.naive else validation.resolve_implementation(call.settings.implementation, query)
    scale, softcap, sinks = (call.kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
    validation.check_query_key(query=query, key=key, value=value)
    checked = checked_settings(
        query,
        query.shape[1],
        block_size=call.settings.block_size,
        top_k=call.settings.top_k,
        sink_blocks=call.settings.sink_blocks,
        recent_blocks=call.settings.recent_blocks,
        share_selection=call.settings.share_selection,
        causal=causal,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        implementation=implementation,
    )
    return Operation(checked, sinks)


def autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """As autocast does for dense attention: rotary embeddings leave query and key wider than the value."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 else x for x in tensors]
    return tensors


def call_original(call: LayerCall, implementation: str, mask: Tensor | BlockMask | None) -> tuple[Tensor, Tensor | None]:
    """The attention of a name, found where the layer itself would find it, with the tensors and arguments of the call."""
    module = call.layer
    named = module if implementation in ("eager", "sdpa") else _Named(module, implementation)
    return original_attention(module, implementation)(named, call.query, call.key, call.value, mask, **call.kwargs)


class _Named:
    """A layer whose configuration names another implementation: some functions look their own name up there."""

    def __init__(self, module: AttentionLayer, implementation: str) -> None:
        self._module, self.config = module, copy.copy(module.config)
        set_implementation(self.config, implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
