"""torch.compile for FlexAttention calls: one compilation per combination of settings, for all lengths."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, wraps
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.upstream import BackendCompilerFailed, FailOnRecompileLimitHit, any_number_of_compilations, mark_dynamic
from ..core.validation import being_captured

T = TypeVar("T")
_NOT_COMPILED = (
    "FlexAttention has no kernel for this call yet, and could not compile one while a CUDA graph is captured: make the same call before "
    "the capture (packed tokens as one sequence, followed by as many empty ones as there were others, with return_lse=True), or use "
    'implementation="triton"'
)


@cache
def _marks(dim: int) -> dict[str, Any]:
    """The attributes that `maybe_mark_dynamic` sets on a tensor of `dim` dimensions.

    They are copied to every tensor of every call, before the launch: calling the function takes four times as long. Only a compilation
    reads them, but new lengths are not the only cause of one.
    """
    x = torch.empty([2] * dim, device="meta")
    mark_dynamic(x, ([], [0], [0, 1], [0, 2], [0, 2])[dim])
    return vars(x)


def any_length(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, marked so that one compilation serves all lengths and batch sizes. Heads and head dimensions stay constants."""
    for x in tensors:
        if x is not None:
            vars(x).update(_marks(x.dim()))
    return tensors


def compiled(call: Callable[..., T], settings: tuple[Hashable, ...]) -> Callable[..., T]:
    """`call`, compiled from a copy with its own code object, whose name contains the settings.

    torch.compile keeps its state by code object and name. If shared, a second block size or scale would turn a constant of the kernel
    into a variable, and eight combinations would exhaust the recompilation limit.
    """
    code = call.__code__.replace(co_name=f"{call.__name__}_{settings}")
    function = torch.compile(FunctionType(code, call.__globals__, None, None, call.__closure__), fullgraph=True)
    limit_hit = False

    def unlimited(*tensors: Tensor | None) -> T:
        """A compilation specializes on sizes of 1, and on whether there are at least 128 queries: together more than eight cases."""
        nonlocal limit_hit
        if not limit_hit:
            try:
                return function(*tensors)
            except FailOnRecompileLimitHit:  # raised before anything is computed
                limit_hit = True
        with any_number_of_compilations():
            return function(*tensors)

    @wraps(call)
    def or_told(*tensors: Tensor | None) -> T:
        try:
            return unlimited(*tensors)
        except BackendCompilerFailed as error:
            if being_captured():
                raise RuntimeError(_NOT_COMPILED) from error
            raise

    return or_told
