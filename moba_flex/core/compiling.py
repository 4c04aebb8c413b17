"""What torch.compile shall not trace. PyTorch's own decorators have no types, and would take those of what they decorate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """A function that is a break in a graph, and runs as it is."""
    return torch.compiler.disable(function)


def constant_in_graphs(function: F) -> F:
    """A function that is called while a graph is traced; what it returns is a constant of the graph."""
    return torch.compiler.assume_constant_result(function)
