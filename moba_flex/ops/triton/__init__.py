"""Triton kernels: the gate, bits for a mask, routing, dispatch of rows, merging partial outputs, summing gradients, and all of decoding.

Each has the signature and the meaning of its plain PyTorch twin in `gate.py`, `masked.py`, `routing.py`, `rows.py` or `decoding.py`, which
tests hold it against.
Importing this needs Triton, which comes with PyTorch for CUDA.
"""

from .bits import block_bits
from .decoding import decode
from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = ["block_bits", "choose", "decode", "delta", "dispatch", "dispatch_backward", "merge", "route", "sum_rows"]
