"""Strides of queries: heads one after another, or together for each token, as a model's projections make them.

A tensor `[B, H, N, D]` that a projection made is a view of `[B, N, H, D]`. With one row it is not copied: kernels read and write any
strides, and the output has the strides of its query, so that a model need not copy it to join heads again.

B rows, H heads, N tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def tokens_first(x: Tensor) -> bool:
    """Whether `x [B, H, N, ...]` is one row whose heads are together for each token."""
    return x.shape[0] == 1 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def keep_strides(x: Tensor) -> Tensor:
    """`x [B, H, N, ...]`, copied only if its strides are neither of these two."""
    return x if tokens_first(x) else x.contiguous()


def empty_with_strides_of(x: Tensor, n: int, width: int) -> Tensor:
    """`[B, H, n, width]` for the rows and heads of `x [B, H, N, D]`, with the strides of `keep_strides(x)`."""
    if tokens_first(x):
        return x.new_empty(1, n, x.shape[1], width).transpose(1, 2)
    return x.new_empty(*x.shape[:2], n, width)
