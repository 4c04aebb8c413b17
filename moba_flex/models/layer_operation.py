"""Code that all paths of a layer's call share: the arguments of the MoBA operation, and the layer's original attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core import validation
from ..core.autocast import autocast_is_on
from ..core.settings import AttentionSettings
from ..functional import checked_settings
from .decision import LayerCall
from .layers import original_attention
from .upstream import set_implementation

if TYPE_CHECKING:
    from .upstream import AttentionLayer


@dataclass(frozen=True)
class Operation:
    """The arguments of the MoBA operation for one layer, except tensors and masks."""

    settings: AttentionSettings
    sinks: Tensor | None


def operation_of(call: LayerCall, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Operation:
    """The validated arguments of the MoBA operation for a layer's call."""
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
    """Cast float32 tensors as autocast does for dense attention: rotary embeddings leave query and key in float32."""
    device = tensors[0].device
    if autocast_is_on(device):
        return [x.to(torch.get_autocast_dtype(device.type)) if x.dtype == torch.float32 else x for x in tensors]
    return tensors


def call_original(call: LayerCall, implementation: str, mask: Tensor | BlockMask | None) -> tuple[Tensor, Tensor | None]:
    """Call the attention named `implementation`, as the layer itself would find it, with the tensors and arguments of the call."""
    module = call.layer
    named = module if implementation in ("eager", "sdpa") else _Named(module, implementation)
    return original_attention(module, implementation)(named, call.query, call.key, call.value, mask, **call.kwargs)


class _Named:
    """A layer whose configuration names another implementation: some attention functions read their own name there."""

    def __init__(self, module: AttentionLayer, implementation: str) -> None:
        self._module, self.config = module, copy.copy(module.config)
        set_implementation(self.config, implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
