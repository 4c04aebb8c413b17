"""The operations around attention: gate, routing, dispatch and merge of rows, decoding.

Each exists twice with the same semantics: in plain PyTorch here, and as a Triton kernel in `triton/`, in a file of the same name.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import plain

try:
    from . import triton as kernels
except ImportError:  # no Triton, so no CUDA either
    kernels = None  # type: ignore[assignment]  # not used then


def ops_for(x: Tensor) -> ModuleType:
    """The operations for tensors like `x`: Triton kernels on a GPU, plain PyTorch elsewhere."""
    return kernels if x.is_cuda else plain
