"""torch.compile for FlexAttention calls: one compilation for each combination of settings, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, wraps
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.upstream import FailOnRecompileLimitHit, any_number_of_compilations, mark_dynamic

T = TypeVar("T")


@cache
def _marks(dim: int) -> dict[str, Any]:
    """What `maybe_mark_dynamic` leaves on a tensor of so many dimensions.

    It is copied, since the function would be called for every tensor of every call, on the host's way to the GPU, and takes four times as
    long. Tensors need it only where something is compiled, but lengths are not all that can make torch.compile do so.
    """
    x = torch.empty([2] * dim, device="meta")
    mark_dynamic(x, ([], [0], [0, 1], [0, 2], [0, 2])[dim])
    return vars(x)


def any_length(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, marked so that a compilation serves other lengths and batches. Heads and widths stay constants."""
    for x in tensors:
        if x is not None:
            vars(x).update(_marks(x.dim()))
    return tensors


def compiled(call: Callable[..., T], settings: tuple[Hashable, ...]) -> Callable[..., T]:
    """`call`, compiled from a function, and so from a code object, whose name says the settings.

    torch.compile keeps what it learns by code object and name: shared, a second block size or scale would turn from a constant into a
    variable of the kernel, and eight combinations would exhaust the limit on recompilations.
    """
    code = call.__code__.replace(co_name=f"{call.__name__}_{settings}")
    function = torch.compile(FunctionType(code, call.__globals__, None, None, call.__closure__), fullgraph=True)
    limit_hit = False

    @wraps(call)
    def unlimited(*tensors: Tensor | None) -> T:
        """Sizes of 1 are constants of a compilation, and so is whether there are 128 queries: together these can be more than eight."""
        nonlocal limit_hit
        if not limit_hit:
            try:
                return function(*tensors)
            except FailOnRecompileLimitHit:  # raised before anything is computed
                limit_hit = True
        with any_number_of_compilations():
            return function(*tensors)

    return unlimited
