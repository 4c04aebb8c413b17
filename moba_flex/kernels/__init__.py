"""The steps around FlexAttention as Triton kernels: the gate, gathering rows, merging partial outputs, summing gradients.

Each has the signature and the meaning of its plain PyTorch twin in `gate.py` and `rows.py`, which tests hold it against. Importing
this needs Triton, which comes with PyTorch for CUDA.
"""

from .gate import choose
from .rows import gather, merge, sum_rows

__all__ = ["choose", "gather", "merge", "sum_rows"]
