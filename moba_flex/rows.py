"""Moving between queries and routed rows, in plain PyTorch: gather, merge, and the sum of gradients.

Nothing here adds with atomics: what comes back to a query is gathered through `row_of_pair`, so two runs give the same bits.

H query heads, N query slots, S chosen blocks a query, R routed rows, D width. Rows of the batch and heads are one leading axis here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routes

_QUERIES_AT_ONCE = 1 << 14


def gather(x: Tensor, routes: Routes, fill: float = 0.0) -> Tensor:
    """`[B, H, N, ...]` -> `[R, ...]`: the query of each row, `fill` in spare rows."""
    out = x.flatten(0, 2).index_select(0, routes.query_of_row.clamp(min=0))
    return out.masked_fill_((routes.query_of_row < 0).view(-1, *(1,) * (out.dim() - 1)), fill)


def merge(out: Tensor | None, lse: Tensor | None, row_out: Tensor, row_lse: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """The softmax-weighted sum of a query's partial outputs.

    `out [B, H, N, Dv]` and `lse [B, H, N]` of the local call (None without one) and `row_out [R, Dv]`, `row_lse [R]` of the routed
    call give the output over all blocks and its log-sum-exp.
    """
    pairs = routes.row_of_pair.flatten(0, 2)
    queries, width = pairs.shape[0], row_out.shape[-1]
    merged = row_out.new_empty(queries, width)
    total = row_lse.new_empty(queries)
    for start in range(0, queries, _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        pair = pairs[part]
        index = pair.clamp(min=0).flatten()
        part_lse = row_lse.index_select(0, index).view(pair.shape).masked_fill_(pair < 0, -torch.inf)
        part_out = row_out.index_select(0, index).view(*pair.shape, width).to(row_lse.dtype)
        part_out = part_out.masked_fill_((pair < 0)[..., None], 0)  # what stands there is another query's, perhaps NaN
        if lse is not None:
            part_lse = torch.cat([part_lse, lse.flatten()[part, None]], 1)
        whole = part_lse.logsumexp(1)
        weight = torch.exp(part_lse - whole.masked_fill(whole == -torch.inf, 0)[:, None])
        result = torch.bmm(weight[:, None, : pair.shape[1]], part_out)[:, 0]
        if out is not None:
            result += weight[:, -1:] * out.flatten(0, 2)[part]
        merged[part], total[part] = result.to(merged.dtype), whole
    shape = routes.row_of_pair.shape[:3]
    return merged.view(*shape, width), total.view(shape)


def sum_rows(grad: Tensor | None, row_grad: Tensor, routes: Routes) -> Tensor:
    """`grad [B, H, N, D]` (None: zeros) plus the gradients `row_grad [R, D]` of the rows that each query sent."""
    pairs = routes.row_of_pair.flatten(0, 2)
    total = row_grad.new_empty(pairs.shape[0], row_grad.shape[-1])
    wide = torch.promote_types(row_grad.dtype, torch.float32)
    for start in range(0, pairs.shape[0], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        pair = pairs[part]
        rows = row_grad.index_select(0, pair.clamp(min=0).flatten()).view(*pair.shape, -1)
        result = rows.masked_fill_((pair < 0)[..., None], 0).sum(1, dtype=wide)
        if grad is not None:
            result += grad.flatten(0, 2)[part]
        total[part] = result.to(total.dtype)
    return total.view(*routes.row_of_pair.shape[:3], -1)
