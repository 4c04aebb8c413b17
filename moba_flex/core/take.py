"""Tokens moved to the places that an index gives them, `fill` where it gives none: one pass over them on a GPU.

B rows, H heads, N tokens, M places, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, so no CUDA either
    triton = None


def take(x: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """`[B, H, N, ...]`, `[B, M]` int64 -> `[B, H, M, ...]`: `out[b, h, i] = x[b, h, index[b, i]]`, `fill` where the index is -1."""
    if x.shape[2] == 0:
        return x.new_full((*x.shape[:2], index.shape[1], *x.shape[3:]), fill)
    if x.is_cuda and triton is not None:
        return take_in_one_pass(x, index, fill)
    shape = (index.shape[0], 1, index.shape[1]) + (1,) * (x.dim() - 3)
    index = index.view(shape)
    if index.shape[0] == 1 and x.shape[0] == 1:  # copies whole tokens, where `gather` looks up each number
        out = x.index_select(2, index.clamp(min=0).flatten())
    else:
        out = x.gather(2, index.clamp(min=0).expand(*x.shape[:2], -1, *x.shape[3:]))
    return out.masked_fill_(index < 0, fill)


def take_in_one_pass(x: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """`take` by a Triton kernel: PyTorch looks up each number of a token, and fills in a second pass."""
    out = x.new_empty(*x.shape[:2], index.shape[1], *x.shape[3:])
    source, to = (x, out) if x.dim() == 4 else (x[..., None], out[..., None])
    if source.shape[3] > 1 and source.stride(3) != 1:
        source = source.contiguous()
    (rows, heads, _, width), padded = source.shape, 1 << (source.shape[3] - 1).bit_length()
    at_once = max(1, 4096 // padded)
    if out.numel():
        _take_kernel[(-(-index.shape[1] // at_once), rows * heads)](
            source, index, to, heads, index.shape[1], *source.stride()[:3], index.stride(0) if index.shape[0] > 1 else 0,
            FILL=fill, D=width, DP=padded, M=at_once, num_warps=4,
        )  # fmt: skip
    return out


if triton is None:
    _take_kernel: Any = None
else:

    @triton.jit(do_not_specialize=["N"])
    def _take_kernel(
        X, INDEX, TO, H, N, stride_b, stride_h, stride_n, index_b,
        FILL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    ):  # fmt: skip
        # One program: M places of a head.
        bh, i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, DP)
        b, h, here = bh // H, bh % H, i < N
        token = tl.load(INDEX + b * index_b + i, mask=here, other=-1)
        x = tl.load(X + b * stride_b + h * stride_h + token[:, None] * stride_n + d[None, :], mask=(token >= 0)[:, None] & (d < D)[None, :])
        x = tl.where((token >= 0)[:, None], x, tl.full([M, DP], FILL, tl.float32).to(x.dtype))
        tl.store(TO + (bh * N + i)[:, None] * D + d[None, :], x, mask=here[:, None] & (d < D)[None, :])
