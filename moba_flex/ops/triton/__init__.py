"""Triton kernels: the gate, routing, rows, decoding; attention forward and backward, each in one pass, and forward under a dense mask;
and marks of how far the GPU has got.

Tests compare the kernels with the file of the same name in `moba_flex.ops`, and `forward.py`, `backward.py` and
`dense_mask.py` with the specification.
Importing this package needs Triton, which comes with PyTorch for CUDA.
"""

from .backward import one_pass_backward
from .decoding import decode, decode_pages
from .dense_mask import block_bits, dense_mask_forward
from .forward import one_pass_forward
from .gate import choose
from .marks import mark
from .routing import route
from .rows import delta, dispatch, dispatch_backward, merge, sum_rows

__all__ = [
    "block_bits",
    "choose",
    "decode",
    "decode_pages",
    "delta",
    "dense_mask_forward",
    "dispatch",
    "dispatch_backward",
    "mark",
    "merge",
    "one_pass_backward",
    "one_pass_forward",
    "route",
    "sum_rows",
]
