"""The operations in plain PyTorch, under the same names as in `moba_flex.ops.triton`."""

from .dense_mask import block_bits
from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = ["block_bits", "choose", "delta", "dispatch", "dispatch_backward", "merge", "route", "sum_rows"]
