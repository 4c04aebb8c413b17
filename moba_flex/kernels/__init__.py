"""Triton kernels: the gate, gathering rows, merging partial outputs, summing gradients, and all of decoding.

Each has the signature and the meaning of its plain PyTorch twin in `gate.py`, `rows.py` or `decoding.py`, which tests hold it against.
Importing this needs Triton, which comes with PyTorch for CUDA.
"""

from .decode import decode
from .gate import choose
from .rows import gather, merge, sum_rows

__all__ = ["choose", "decode", "gather", "merge", "sum_rows"]
