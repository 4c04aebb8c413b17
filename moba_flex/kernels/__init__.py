"""Triton kernels: the gate, routing, dispatch of rows, merging partial outputs, summing gradients, and all of decoding.

Each has the signature and the meaning of its plain PyTorch twin in `gate.py`, `routing.py`, `rows.py` or `decoding.py`, which tests hold
it against.
Importing this needs Triton, which comes with PyTorch for CUDA.
"""

from .decode import decode
from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = ["choose", "decode", "delta", "dispatch", "dispatch_backward", "merge", "route", "sum_rows"]
