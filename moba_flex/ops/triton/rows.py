"""Dispatch, merge and sum over routed rows: one kernel each, without intermediate tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from ..routing import Routes
from .sizes import cdiv, next_power_of_2


@triton.jit
def _offset(head, i, H, stride_b, stride_h, stride_n):
    """The offset of query i of a head; heads are numbered across the batch, `b * H + h`."""
    return (head // H) * stride_b + (head % H) * stride_h + i * stride_n


@triton.jit
def _dispatch_kernel(X, PAIR, OUT, H, N, S, stride_b, stride_h, stride_n, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    # One program: M queries of a head, each written to the row of each of its pairs.
    head, i, d = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    n, here, seen = head * N + i, i < N, d[None, :] < D
    at = _offset(head, i, H, stride_b, stride_h, stride_n)
    x = tl.load(X + at[:, None] + d[None, :], mask=here[:, None] & seen, other=0.0)
    for s in range(S):
        row = tl.load(PAIR + n * S + s, mask=here, other=-1).to(tl.int64)
        tl.store(OUT + row[:, None] * D + d[None, :], x, mask=(row[:, None] >= 0) & seen)


def dispatch(x: Tensor, routes: Routes) -> Tensor:
    """`[B, H, N, D]` -> `[R, D]`: the query of each row. Spare rows are uninitialized: their outputs are never read."""
    (rows, heads, slots, width), count, tile = x.shape, routes.row_of_pair.shape[-1], 32
    out = x.new_empty(routes.n_rows, width)
    _dispatch_kernel[(cdiv(slots, tile), rows * heads)](
        x, routes.row_of_pair, out, heads, slots, count, *x.stride()[:3], width, next_power_of_2(width), tile, num_warps=4
    )
    return out


@triton.jit
def _dispatch_backward_kernel(
    QUERY, GRAD, LSE, DELTA, PAIR, FIRST, ROWS, TILES, TO_QUERY, TO_GRAD, TO_LSE, TO_DELTA, N, S,
    TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    d, dv = tl.arange(0, DP)[None, :], tl.arange(0, DVP)[None, :]
    programs = tl.cdiv(N, M)
    if tl.program_id(0) < programs:  # M queries
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        here = n < N
        query = tl.load(QUERY + n[:, None] * D + d, mask=here[:, None] & (d < D), other=0.0)
        grad = tl.load(GRAD + n[:, None] * DV + dv, mask=here[:, None] & (dv < DV), other=0.0)
        lse, delta = tl.load(LSE + n, mask=here, other=0.0), tl.load(DELTA + n, mask=here, other=0.0)
        for s in range(S):
            row = tl.load(PAIR + n * S + s, mask=here, other=-1).to(tl.int64)
            real = row >= 0
            tl.store(TO_QUERY + row[:, None] * D + d, query, mask=real[:, None] & (d < D))
            tl.store(TO_GRAD + row[:, None] * DV + dv, grad, mask=real[:, None] & (dv < DV))
            tl.store(TO_LSE + row, lse, mask=real)
            tl.store(TO_DELTA + row, delta, mask=real)
    else:  # The spare rows of one block.
        block = tl.program_id(0) - programs
        first = tl.load(FIRST + block).to(tl.int64) * TILE
        stop = first + tl.load(TILES + block) * TILE
        for start in range(first + tl.load(ROWS + block), stop, M):
            row = start + tl.arange(0, M)
            spare = row < stop
            tl.store(TO_QUERY + row[:, None] * D + d, tl.zeros([M, DP], TO_QUERY.dtype.element_ty), mask=spare[:, None] & (d < D))
            tl.store(TO_GRAD + row[:, None] * DV + dv, tl.zeros([M, DVP], TO_GRAD.dtype.element_ty), mask=spare[:, None] & (dv < DV))
            tl.store(TO_LSE + row, tl.full([M], float("inf"), tl.float32), mask=spare)
            tl.store(TO_DELTA + row, tl.zeros([M], tl.float32), mask=spare)


def dispatch_backward(query: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, routes: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of all tensors that the backward pass reads. Spare rows get a log-sum-exp of infinity, so that their weights are 0."""
    n_query, count, tile = lse.numel(), routes.row_of_pair.shape[-1], 32
    width, value_width = query.shape[-1], grad.shape[-1]
    rows = [x.new_empty(routes.n_rows, *x.shape[3:]) for x in (query, grad, lse, delta)]
    _dispatch_backward_kernel[(cdiv(n_query, tile) + routes.n_blocks,)](
        query,
        grad,
        lse,
        delta,
        routes.row_of_pair,
        routes.first_tile,
        routes.rows_of_block,
        routes.tiles_of_block,
        *rows,
        n_query,
        count,
        routes.tile,
        width,
        next_power_of_2(width),
        value_width,
        next_power_of_2(value_width),
        tile,
        num_warps=4,
    )
    return rows[0], rows[1], rows[2], rows[3]


def _unrolled(slots: int) -> int:
    """How many slots of a query are unrolled. Unrolling 63 took 43 s to compile, and unrolling 47 ran a third longer than a loop."""
    return slots if slots <= 16 else 8


@triton.jit
def _merge_kernel(
    OUT, LSE, ROW_OUT, ROW_LSE, PAIR, QUERY_START, QUERY_STOP, QUERY_TOKEN, TO, TO_LSE, H, N, N_TOKENS, Q,
    stride_b, stride_h, stride_n, to_stride_b, to_stride_h, to_stride_n,
    S: tl.constexpr, UNROLLED: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    # One program: M queries of a query block of a head. FULL: slot i holds query i, for all slots. The other kernel needs more registers,
    # so that a multiprocessor holds 5 programs in place of 6 (128 wide, 7 pairs per query).
    head, i, d = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    n, seen, inside = head * N + i, d[None, :] < D, i < N
    if FULL:
        token, here, at_lse = i, inside, n
    else:
        block = (head // H) * Q + tl.program_id(0) * M // P
        token = tl.load(QUERY_TOKEN + block) + i % P
        here = (i % P >= tl.load(QUERY_START + block)) & (i % P < tl.load(QUERY_STOP + block))
        at_lse = head * N_TOKENS + token
    # A slot without a query has no pairs, so loading pairs need not wait for `here`.
    most = tl.load(LSE + at_lse, mask=here, other=float("-inf"))
    for s in range(0, S, UNROLLED):
        for u in tl.static_range(UNROLLED):
            row = tl.load(PAIR + n * S + s + u, mask=inside & (s + u < S), other=-1).to(tl.int64)
            most = tl.maximum(most, tl.load(ROW_LSE + row, mask=row >= 0, other=float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    most = tl.where(most == float("-inf"), 0.0, most)

    total = tl.exp(tl.load(LSE + at_lse, mask=here, other=float("-inf")) - most)
    at = _offset(head, token, H, stride_b, stride_h, stride_n)
    acc = total[:, None] * tl.load(OUT + at[:, None] + d[None, :], mask=here[:, None] & seen, other=0.0).to(tl.float32)
    for s in range(0, S, UNROLLED):
        for u in tl.static_range(UNROLLED):
            row = tl.load(PAIR + n * S + s + u, mask=inside & (s + u < S), other=-1).to(tl.int64)
            weight = tl.exp(tl.load(ROW_LSE + row, mask=row >= 0, other=float("-inf")) - most)
            part = tl.load(ROW_OUT + row[:, None] * D + d[None, :], mask=(row[:, None] >= 0) & seen, other=0.0)
            total += weight
            acc += weight[:, None] * part.to(tl.float32)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    at = _offset(head, token, H, to_stride_b, to_stride_h, to_stride_n)
    tl.store(TO + at[:, None] + d[None, :], acc.to(TO.dtype.element_ty), mask=here[:, None] & seen)
    tl.store(TO_LSE + at_lse, most + tl.log(total), mask=here)


def merge(
    out: Tensor, lse: Tensor, row_out: Tensor, row_lse: Tensor, routes: Routes, layout: BlockLayout, into: tuple[Tensor, Tensor]
) -> None:
    """The softmax-weighted sum of a query's partial outputs: see `moba_flex.ops.rows.merge`.

    `out [B, H, Nq, Dv]` and that in `into` may have any strides, last dimension contiguous; the log-sum-exps are contiguous. Only queries
    of `layout` are written.
    """
    (rows, heads, n_tokens, width), count, tile, slots = out.shape, routes.row_of_pair.shape[-1], 16, routes.row_of_pair.shape[2]
    of_queries = layout.query_start, layout.query_stop, layout.query_token
    _merge_kernel[(cdiv(slots, tile), rows * heads)](
        out, lse, row_out, row_lse, routes.row_of_pair, *of_queries, *into, heads, slots, n_tokens, layout.n_query_blocks,
        *out.stride()[:3], *into[0].stride()[:3],
        count, _unrolled(count), layout.query_width, width, next_power_of_2(width), tile, layout.is_full and n_tokens == slots, num_warps=4,
    )  # fmt: skip


@triton.jit
def _sum_kernel(
    GRAD, ROW_GRAD, PAIR, TO, H, N, stride_b, stride_h, stride_n,
    S: tl.constexpr, UNROLLED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # One program: M queries of a head.
    head, i, d = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, DP)
    n, here, seen = head * N + i, i < N, d[None, :] < D
    at = n[:, None] * D + d[None, :]
    acc = tl.load(GRAD + at, mask=here[:, None] & seen, other=0.0).to(tl.float32)
    for s in range(0, S, UNROLLED):
        for u in tl.static_range(UNROLLED):
            row = tl.load(PAIR + n * S + s + u, mask=here & (s + u < S), other=-1).to(tl.int64)
            part = tl.load(ROW_GRAD + row[:, None] * D + d[None, :], mask=(row[:, None] >= 0) & seen, other=0.0)
            acc += part.to(tl.float32)
    at = _offset(head, i, H, stride_b, stride_h, stride_n)
    tl.store(TO + at[:, None] + d[None, :], acc.to(TO.dtype.element_ty), mask=here[:, None] & seen)


def sum_rows(grad: Tensor, row_grad: Tensor, routes: Routes, into: Tensor) -> None:
    """See `moba_flex.ops.rows.sum_rows`. `grad [B, H, N, D]` is contiguous; `into` has any strides, last dimension contiguous."""
    (rows, heads, n_query, width), count, tile = grad.shape, routes.row_of_pair.shape[-1], 16
    _sum_kernel[(cdiv(n_query, tile), rows * heads)](
        grad, row_grad, routes.row_of_pair, into, heads, n_query, *into.stride()[:3],
        count, _unrolled(count), width, next_power_of_2(width), tile, num_warps=4,
    )  # fmt: skip


@triton.jit
def _delta_kernel(
    OUT, GRAD, GRAD_LSE, TO, H, N, stride_b, stride_h, stride_n, grad_stride_b, grad_stride_h, grad_stride_n,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # One program: M queries of a head.
    tiles = tl.cdiv(N, M)
    head, i = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * M + tl.arange(0, M)
    d = tl.arange(0, DP)
    n, here, mask = head * N + i, i < N, (i < N)[:, None] & (d[None, :] < D)
    at = _offset(head, i, H, stride_b, stride_h, stride_n)
    out = tl.load(OUT + at[:, None] + d[None, :], mask=mask, other=0.0)
    at = _offset(head, i, H, grad_stride_b, grad_stride_h, grad_stride_n)
    grad = tl.load(GRAD + at[:, None] + d[None, :], mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + n, mask=here, other=0.0)
    tl.store(TO + n, delta, mask=here)


def delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`out . grad - grad_lse`, float32 `[B, H, N]`. Any strides, last dimension contiguous."""
    rows, heads, n_query, width = out.shape
    tile = 32
    to = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    strides = *out.stride()[:3], *grad.stride()[:3]
    _delta_kernel[(cdiv(n_query, tile) * rows * heads,)](
        out, grad, grad_lse, to, heads, n_query, *strides, width, next_power_of_2(width), tile, num_warps=4
    )
    return to
