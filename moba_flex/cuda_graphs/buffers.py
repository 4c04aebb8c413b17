"""Input buffers of a graph, which outlive a call, and copies of a call's tensors to and from buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.allocation import allocate_persistent
from ..core.strides import empty_with_strides_of
from ..core.upstream import copy_all


def copy(tensors: tuple[Tensor | None, ...], into: tuple[Tensor | None, ...]) -> None:
    """Copy each of `tensors` to its counterpart in `into`.

    One launch copies all but scalars, elements of one byte and tensors whose strides differ from those of their counterpart.
    """
    places, sources = [], []
    for x, to in zip(tensors, into):
        if x is None or to is None:
            continue
        if x.dim() > 0 and x.stride() == to.stride() and x.stride(-1) == 1 and x.element_size() % 2 == 0:
            places.append(to.view(torch.int16))  # one launch takes tensors of one dtype
            sources.append(x.view(torch.int16))
        else:
            to.copy_(x)
    if places:
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
