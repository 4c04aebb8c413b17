"""Triton kernels: the gate, bits for a mask, routing, rows, decoding; and attention forward and backward, each in one pass.

Those of a file that `moba_flex.ops` has too are held against it by tests; `forward.py` and `backward.py` against the specification.
Importing this needs Triton, which comes with PyTorch for CUDA.
"""

from .backward import one_pass_backward
from .bits import block_bits
from .decoding import decode
from .forward import one_pass_forward
from .gate import choose
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = [
    "block_bits",
    "choose",
    "decode",
    "delta",
    "dispatch",
    "dispatch_backward",
    "merge",
    "one_pass_backward",
    "one_pass_forward",
    "route",
    "sum_rows",
]
