"""Gathers tokens by index, with `fill` where the index is -1. On a GPU each token is read once and written once.

B batch, H heads, N tokens, M output tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, so no CUDA either
    triton = None

_TILE = 4096  # elements per program, or one token if it has more


def take(x: Tensor, index: Tensor, fill: float = 0, into: Tensor | None = None) -> Tensor:
    """`[B, H, N, ...]`, `[B, M]` int64 -> `[B, H, M, ...]`: `out[b, h, i] = x[b, h, index[b, i]]`, `fill` where the index is -1.

    The result is written to `into`, if given, which may have any strides.
    """
    if x.is_cuda and triton is not None:
        return take_by_kernel(x, index, fill, into)
    out = _take(x, index, fill)
    return out if into is None else into.copy_(out)


def _take(x: Tensor, index: Tensor, fill: float) -> Tensor:
    if x.shape[2] == 0:
        return x.new_full((*x.shape[:2], index.shape[1], *x.shape[3:]), fill)
    index = index.view(index.shape[0], 1, index.shape[1], *(1,) * (x.dim() - 3))
    if index.shape[0] == 1 and x.shape[0] == 1:  # copies whole tokens; `gather` looks up each element
        out = x.index_select(2, index.clamp(min=0).flatten())
    else:
        out = x.gather(2, index.clamp(min=0).expand(*x.shape[:2], -1, *x.shape[3:]))
    return out.masked_fill_(index < 0, fill)


def take_by_kernel(x: Tensor, index: Tensor, fill: float = 0, into: Tensor | None = None) -> Tensor:
    """`take` of `[B, H, N]` or `[B, H, N, D]`, any strides."""
    (rows, heads), places, width = x.shape[:2], index.shape[1], x.shape[3] if x.dim() == 4 else 1
    out = x.new_empty(rows, heads, places, *x.shape[3:]) if into is None else into
    index = index.contiguous()
    padded = 1 << (max(1, width) - 1).bit_length()
    at_once = max(1, min(1024, _TILE // padded))
    parts = -(-places // at_once)
    if out.numel():
        with torch.cuda.device_of(x):
            _take_kernel[(rows * heads * parts,)](
                x, index, out, *_strides(x), *_strides(out), heads, places, parts, fill, width, padded, at_once, num_warps=4
            )
    return out


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """The strides of `[B, H, N, D]`, or of `[B, H, N]` followed by 1."""
    b, h, n, d = (*x.stride(), 1)[:4]
    return b, h, n, d


_take_kernel: Any = None
if triton is not None:

    @triton.jit(do_not_specialize=["N", "PARTS"])
    def _take_kernel(
        X, INDEX, OUT, stride_b, stride_h, stride_n, stride_d, to_stride_b, to_stride_h, to_stride_n, to_stride_d,
        H, N, PARTS, fill, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    ):  # fmt: skip
        # One program: M output tokens of one head.
        head, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
        i, d = part * M + tl.arange(0, M), tl.arange(0, DP)[None, :].to(tl.int64)  # stride_d can be large too
        at = tl.load(INDEX + head // H * N + i, mask=i < N, other=-1)
        token = (head // H) * stride_b + (head % H) * stride_h + at * stride_n
        x = tl.load(X + token[:, None] + d * stride_d, mask=(at >= 0)[:, None] & (d < D), other=fill)
        to = (head // H) * to_stride_b + (head % H) * to_stride_h + i.to(tl.int64) * to_stride_n
        tl.store(OUT + to[:, None] + d * to_stride_d, x, mask=(i < N)[:, None] & (d < D))
