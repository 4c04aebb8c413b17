"""Gather, merge and sum over routed rows: each reads what it needs once and writes its result once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import rows as plain
from ..routing import Routes


@triton.jit
def _gather_kernel(X, QUERY, OUT, R, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    r, d = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    query = tl.load(QUERY + r, mask=r < R, other=-1).to(tl.int64)
    x = tl.load(X + query[:, None] * D + d[None, :], mask=(query[:, None] >= 0) & (d[None, :] < D), other=0.0)
    tl.store(OUT + r[:, None] * D + d[None, :], x, mask=(r[:, None] < R) & (d[None, :] < D))


def gather(x: Tensor, routes: Routes, fill: float = 0.0) -> Tensor:
    """`[B, H, N, D]` -> `[R, D]`, or `[B, H, N]` -> `[R]`: the query of each row, `fill` in spare rows."""
    if x.dim() == 3 or fill != 0:
        return plain.gather(x, routes, fill)
    n_rows, width = routes.query_of_row.numel(), x.shape[-1]
    out = x.new_empty(n_rows, width)
    tile = 32
    _gather_kernel[(triton.cdiv(n_rows, tile),)](
        x.contiguous(), routes.query_of_row, out, n_rows, width, triton.next_power_of_2(width), tile, num_warps=4
    )
    return out


@triton.jit
def _merge_kernel(OUT, LSE, ROW_OUT, ROW_LSE, PAIR, TO, TO_LSE, N, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    here, seen = n < N, d[None, :] < D
    most = tl.load(LSE + n, mask=here, other=float("-inf"))
    for s in tl.static_range(S):
        row = tl.load(PAIR + n * S + s, mask=here, other=-1).to(tl.int64)
        most = tl.maximum(most, tl.load(ROW_LSE + row, mask=row >= 0, other=float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    most = tl.where(most == float("-inf"), 0.0, most)

    total = tl.exp(tl.load(LSE + n, mask=here, other=float("-inf")) - most)
    acc = total[:, None] * tl.load(OUT + n[:, None] * D + d[None, :], mask=here[:, None] & seen, other=0.0).to(tl.float32)
    for s in tl.static_range(S):
        row = tl.load(PAIR + n * S + s, mask=here, other=-1).to(tl.int64)
        weight = tl.exp(tl.load(ROW_LSE + row, mask=row >= 0, other=float("-inf")) - most)
        part = tl.load(ROW_OUT + row[:, None] * D + d[None, :], mask=(row[:, None] >= 0) & seen, other=0.0)
        total += weight
        acc += weight[:, None] * part.to(tl.float32)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(TO + n[:, None] * D + d[None, :], acc.to(TO.dtype.element_ty), mask=here[:, None] & seen)
    tl.store(TO_LSE + n, most + tl.log(total), mask=here)


def merge(out: Tensor, lse: Tensor, row_out: Tensor, row_lse: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """The softmax-weighted sum of a query's partial outputs: see `moba_flex.rows.merge`."""
    *shape, count = routes.row_of_pair.shape
    width, tile = row_out.shape[-1], 16
    merged, total = row_out.new_empty(*shape, width), row_lse.new_empty(shape)
    _merge_kernel[(triton.cdiv(total.numel(), tile),)](
        out,
        lse,
        row_out,
        row_lse,
        routes.row_of_pair,
        merged,
        total,
        total.numel(),
        count,
        width,
        triton.next_power_of_2(width),
        tile,
        num_warps=4,
    )
    return merged, total


@triton.jit
def _sum_kernel(GRAD, ROW_GRAD, PAIR, TO, N, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    here, seen = n < N, d[None, :] < D
    at = n[:, None] * D + d[None, :]
    acc = tl.load(GRAD + at, mask=here[:, None] & seen, other=0.0).to(tl.float32)
    for s in tl.static_range(S):
        row = tl.load(PAIR + n * S + s, mask=here, other=-1).to(tl.int64)
        part = tl.load(ROW_GRAD + row[:, None] * D + d[None, :], mask=(row[:, None] >= 0) & seen, other=0.0)
        acc += part.to(tl.float32)
    tl.store(TO + at, acc.to(TO.dtype.element_ty), mask=here[:, None] & seen)


def sum_rows(grad: Tensor, row_grad: Tensor, routes: Routes) -> Tensor:
    """`grad [B, H, N, D]` plus the gradients `row_grad [R, D]` of the rows that each query sent."""
    *shape, count = routes.row_of_pair.shape
    width, tile = row_grad.shape[-1], 16
    total = row_grad.new_empty(*shape, width)
    n = total.numel() // width
    _sum_kernel[(triton.cdiv(n, tile),)](
        grad, row_grad, routes.row_of_pair, total, n, count, width, triton.next_power_of_2(width), tile, num_warps=4
    )
    return total
