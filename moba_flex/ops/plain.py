"""The steps in plain PyTorch, under the names that `moba_flex.ops.triton` has too."""

from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = ["choose", "delta", "dispatch", "dispatch_backward", "merge", "route", "sum_rows"]
