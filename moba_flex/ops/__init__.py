"""What is done to tensors around attention: the gate, routing, and moving between queries and rows.

Each step exists twice with one meaning: in plain PyTorch here, and as a Triton kernel in `triton/`, in a file of the same name.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import plain

try:
    from . import triton as kernels
except ImportError:  # no Triton, so no CUDA either
    kernels = None  # type: ignore[assignment]  # nobody asks for it then


def steps_for(x: Tensor) -> ModuleType:
    """The steps for tensors like `x`: Triton kernels on a GPU, plain PyTorch elsewhere."""
    return kernels if x.is_cuda else plain
