"""Where a graph reads its inputs: buffers that outlive a call, and copies of a call's tensors to them and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.allocation import allocate_persistent
from ..core.strides import empty_with_strides_of
from ..core.upstream import copy_all


def copy(tensors: tuple[Tensor | None, ...], into: tuple[Tensor | None, ...]) -> None:
    """Copy each of `tensors` into its place: those of one dtype and of the strides of their places in one launch."""
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
    """A buffer for `x` with the strides that the call would give it, so that copying into it is all that moves `x`."""
    if x is None:
        return None
    return empty_with_strides_of(x, *x.shape[2:]) if x.dim() == 4 else torch.empty_like(x, memory_format=torch.contiguous_format)


def buffers_like(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Where a graph reads `tensors`, which outlives this call."""
    inference = torch.is_inference_mode_enabled()  # compiled kernels tell its tensors from others

    def make() -> tuple[Tensor | None, ...]:
        with torch.inference_mode(inference):
            return tuple(buffer_like(x) for x in tensors)

    return allocate_persistent(make, first_of(tensors).device)


def first_of(tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The query of a call, or its gradient: there always is one."""
    assert tensors[0] is not None
    return tensors[0]
