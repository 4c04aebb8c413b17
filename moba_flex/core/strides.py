"""Strides: heads one after another, or together for each token, as a model's projections make them.

A tensor `[B, H, N, D]` that a projection made is a view of `[B, N, H, D]`. It is not copied: kernels read and write any strides. Outputs
and gradients lie as what they belong to, so that a model need not copy them to join heads again.

B rows, H heads, N tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def tokens_first(x: Tensor) -> bool:
    """Whether the heads of `x [B, H, N, ...]` are together for each token."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def keep_strides(x: Tensor) -> Tensor:
    """`x [B, H, N, ...]`, copied only if its heads are neither together for each token nor one after another."""
    return x if tokens_first(x) else x.contiguous()


def readable(x: Tensor) -> Tensor:
    """`x [B, H, N, D]`, copied only if a token's numbers do not lie together: a kernel reads it with any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_with_strides_of(x: Tensor, n: int, width: int) -> Tensor:
    """`[B, H, n, width]` for the rows and heads of `x [B, H, N, D]`, with the strides of `keep_strides(x)`."""
    rows, heads = x.shape[:2]
    return x.new_empty(rows, n, heads, width).transpose(1, 2) if tokens_first(x) else x.new_empty(rows, heads, n, width)


def rows_in_line(x: Tensor) -> Tensor | None:
    """`[1, H, B * N, D]`: the rows of `x [B, H, N, D]` one behind the other, if they lie so."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] if x.stride(0) == x.shape[2] * x.stride(2) else None
