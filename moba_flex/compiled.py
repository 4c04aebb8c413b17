"""torch.compile for FlexAttention calls: one compilation for each combination of settings, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor


def any_length(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, marked so that the first compilation serves other lengths and batches. Heads and widths stay constants."""
    for x in filter(torch.is_tensor, tensors):
        torch._dynamo.maybe_mark_dynamic(x, ([], [0], [0, 1], [0, 2], [0, 2])[x.dim()])
    return tensors


def compiled(call: Callable, settings: tuple) -> Callable:
    """`call`, compiled from a function, and so from a code object, whose name says the settings.

    torch.compile keeps what it learns by code object and name: shared, a second block size or scale would turn from a constant into a
    variable of the kernel, and eight combinations would exhaust the limit on recompilations.
    """
    code = call.__code__.replace(co_name=f"{call.__name__}_{settings}")
    return torch.compile(FunctionType(code, call.__globals__, None, None, call.__closure__), fullgraph=True)
