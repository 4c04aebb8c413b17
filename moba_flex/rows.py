"""Moving between queries and routed rows, in plain PyTorch: gather, merge, and the sum of gradients.

Nothing here adds with atomics: what comes back to a query is gathered through `row_of_pair`, so two runs give the same bits.

H query heads, N query slots, S chosen blocks a query, R routed rows, D width. Rows of the batch and heads are one leading axis here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import choose
from .routing import Routes

__all__ = ["choose", "gather", "merge", "sum_rows"]

_QUERIES_AT_ONCE = 1 << 14


def gather(x: Tensor, routes: Routes, fill: float = 0.0) -> Tensor:
    """`[B, H, N, ...]` -> `[R, ...]`: the query of each row, `fill` in spare rows."""
    out = x.flatten(0, 2).index_select(0, routes.query_of_row.clamp(min=0))
    out[routes.query_of_row < 0] = fill
    return out


def merge(out: Tensor, lse: Tensor, row_out: Tensor, row_lse: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """The softmax-weighted sum of a query's partial outputs.

    `out [B, H, N, Dv]` and `lse [B, H, N]` of the local call and `row_out [R, Dv]`, `row_lse [R]` of the routed call give the output
    over all blocks and its log-sum-exp.
    """
    pairs = routes.row_of_pair.flatten(0, 2)
    shape, width = routes.row_of_pair.shape[:3], row_out.shape[-1]
    merged = row_out.new_empty(pairs.shape[0], width, dtype=out.dtype)
    total = row_lse.new_empty(pairs.shape[0])
    for start in range(0, pairs.shape[0], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        pair = pairs[part]
        part_lse = _take_rows(row_lse, pair).masked_fill_(pair < 0, -torch.inf)
        part_lse = torch.cat([part_lse, lse.flatten()[part, None]], 1)
        whole = part_lse.logsumexp(1)
        weight = torch.exp(part_lse - whole.masked_fill(whole == -torch.inf, 0)[:, None])
        result = _sum_of_rows(row_out, pair, weight[:, : pair.shape[1]])
        merged[part] = result.addcmul_(weight[:, -1:], out.flatten(0, 2)[part].to(result.dtype))
        total[part] = whole
    return merged.view(*shape, width), total.view(shape)


def sum_rows(grad: Tensor, row_grad: Tensor, routes: Routes) -> Tensor:
    """`grad [B, H, N, D]` plus the gradients `row_grad [R, D]` of the rows that each query sent."""
    pairs = routes.row_of_pair.flatten(0, 2)
    total = row_grad.new_empty(pairs.shape[0], row_grad.shape[-1])
    for start in range(0, pairs.shape[0], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        total[part] = _sum_of_rows(row_grad, pairs[part]).add_(grad.flatten(0, 2)[part])
    return total.view(*routes.row_of_pair.shape[:3], -1)


def _take_rows(rows: Tensor, pair: Tensor) -> Tensor:
    return rows.index_select(0, pair.clamp(min=0).flatten()).view(*pair.shape, *rows.shape[1:])


def _sum_of_rows(rows: Tensor, pair: Tensor, weight: Tensor | None = None) -> Tensor:
    """`[R, D]`, rows of each query `[n, S]`, -1 for none -> their sum `[n, D]`, weighted by `weight [n, S]`, in float32 at least."""
    taken = _take_rows(rows, pair).to(torch.promote_types(rows.dtype, torch.float32)).masked_fill((pair < 0)[..., None], 0)
    return taken.sum(1) if weight is None else torch.bmm(weight[:, None], taken)[:, 0]
