"""Strides of attention tensors: contiguous `[B, H, N, D]`, or a transposed view of `[B, N, H, D]`, as a model's projections return.

These views are not copied: kernels read and write any strides, last dimension contiguous. Outputs and gradients have the strides of the
tensors that they belong to, so a model can merge heads without a copy.

B batch, H heads, N tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .upstream import functorch_transform, has_storage


def tokens_first(x: Tensor) -> bool:
    """Whether `x [B, H, N, ...]` is a transposed view of a contiguous `[B, N, H, ...]`, and not contiguous itself."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def keep_strides(x: Tensor) -> Tensor:
    """`x [B, H, N, ...]`, copied only if it is neither contiguous nor `tokens_first`."""
    return x if tokens_first(x) else x.contiguous()


def last_dim_contiguous(x: Tensor) -> Tensor:
    """`x [..., D]`, copied only if its last dimension is not contiguous: kernels read any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def has_address(x: Tensor) -> bool:
    """Whether it is known where `x` lies in memory: not in a traced graph, under a transform of torch.func, or of a batch of gradients, a
    fake tensor or another class of its own.
    """
    return type(x) in (Tensor, Parameter) and not torch.compiler.is_compiling() and functorch_transform() is None and has_storage(x)


def aligned(x: Tensor) -> Tensor:
    """`x [..., D]`, copied unless each of its rows is contiguous and begins at a multiple of 16 bytes of memory.

    PyTorch's fused attention loads 16 bytes at a time and does not check that it can. With a last dimension that is not contiguous it
    silently computes something slower. Without an address only the latter is mended; torch.compile aligns the inputs of its graphs itself.
    """
    if not has_address(x):
        return last_dim_contiguous(x)
    rows = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and rows and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def empty_with_strides_of(x: Tensor, n: int, width: int) -> Tensor:
    """An empty `[B, H, n, width]` with batch and heads of `x [B, H, N, D]` and the stride order of `keep_strides(x)`."""
    rows, heads = x.shape[:2]
    return x.new_empty(rows, n, heads, width).transpose(1, 2) if tokens_first(x) else x.new_empty(rows, heads, n, width)


def merge_batch(x: Tensor) -> Tensor | None:
    """`x [B, H, N, D]` as a view `[1, H, B * N, D]`, or None if its strides do not allow that."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] if x.stride(0) == x.shape[2] * x.stride(2) else None
