"""Input buffers of a graph, which outlive a call, and copies of a call's tensors to and from buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.allocation import allocate_persistent
from ..core.strides import empty_with_strides_of
from ..core.upstream import copy_all


def copy(tensors: tuple[Tensor | None, ...], into: tuple[Tensor | None, ...]) -> None:
    """Copy each of `tensors` to its counterpart in `into`. Tensors of one dtype with matching strides are copied in one launch."""
    of_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for x, to in zip(tensors, into):
        if x is None or to is None:
            continue
        if x.stride() != to.stride():
            to.copy_(x)
            continue
        places, sources = of_dtype.setdefault(x.dtype, ([], []))
        places.append(to)
        sources.append(x)
    for places, sources in of_dtype.values():
        if len(places) == 1:
            places[0].copy_(sources[0])
        else:
            copy_all(places, sources)


def buffer_like(x: Tensor | None) -> Tensor | None:
    """A buffer for `x` with strides that the call reads without another copy."""
    if x is None:
        return None
    return empty_with_strides_of(x, *x.shape[2:]) if x.dim() == 4 else torch.empty_like(x, memory_format=torch.contiguous_format)


def buffers_like(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Input buffers for `tensors` that outlive this call."""
    inference = torch.is_inference_mode_enabled()  # compiled kernels distinguish inference tensors

    def make() -> tuple[Tensor | None, ...]:
        with torch.inference_mode(inference):
            return tuple(buffer_like(x) for x in tensors)

    return allocate_persistent(make, first_of(tensors).device)


def first_of(tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The first operand, which is never None: the query in a forward pass, the output's gradient in a backward pass."""
    assert tensors[0] is not None
    return tensors[0]
