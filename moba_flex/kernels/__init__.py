"""The steps around FlexAttention as Triton kernels: the gate, routing, dispatch of rows, merging partial outputs, summing gradients.

Each has the signature and the meaning of its plain PyTorch twin in `gate.py`, `routing.py` and `rows.py`, which tests hold it against.
Importing this needs Triton, which comes with PyTorch for CUDA.
"""

from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = ["choose", "delta", "dispatch", "dispatch_backward", "merge", "route", "sum_rows"]
