"""Decorators for functions that torch.compile must not trace. PyTorch's own are untyped and would erase the function's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Makes calls of `function` graph breaks that run eagerly."""
    return torch.compiler.disable(function)


def constant_in_graphs(function: F) -> F:
    """Calls `function` during tracing and makes its result a constant of the graph."""
    return torch.compiler.assume_constant_result(function)
