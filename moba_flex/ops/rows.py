"""Moving between queries and routed rows, in plain PyTorch: dispatch, merge, and the sum of gradients.

There are no atomics: results for a query are gathered through `row_of_pair`, so two runs give the same bits.

B batch, H query heads, N query slots, S chosen blocks per query, R routed rows, D and Dv head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.layout import BlockLayout
from .routing import Routes

_QUERIES_AT_ONCE = 1 << 14


def dispatch(x: Tensor, routes: Routes, spare: float = 0.0) -> Tensor:
    """`[B, H, N, ...]` -> `[R, ...]`: the query of each row, `spare` in spare rows."""
    pairs = routes.row_of_pair.flatten(0, 2)
    query, choice = (pairs >= 0).nonzero(as_tuple=True)
    out = x.new_full((routes.n_rows, *x.shape[3:]), spare)
    out[pairs[query, choice].long()] = x.flatten(0, 2)[query]
    return out


def dispatch_backward(query: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, routes: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of all tensors that the backward pass reads. Spare rows get a log-sum-exp of infinity, so that their weights are 0."""
    return dispatch(query, routes), dispatch(grad, routes), dispatch(lse, routes, torch.inf), dispatch(delta, routes)


def merge(
    out: Tensor, lse: Tensor, row_out: Tensor, row_lse: Tensor, routes: Routes, layout: BlockLayout, into: tuple[Tensor, Tensor]
) -> None:
    """The softmax-weighted sum of a query's partial outputs.

    Merges `out [B, H, N, Dv]` and `lse [B, H, N]` of the local call with `row_out [R, Dv]` and `row_lse [R]` of the routed call, and
    writes the output over all blocks and its log-sum-exp to `into`. `out`, `lse` and `into` are in the slots of `layout`.
    """
    pairs = routes.row_of_pair.flatten(0, 2)
    whole_out, whole_lse = (x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format) for x in into)
    merged, total = whole_out.flatten(0, 2), whole_lse.flatten(0, 2)
    for start in range(0, pairs.shape[0], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        pair = pairs[part]
        part_lse = _take_rows(row_lse, pair).masked_fill_(pair < 0, -torch.inf)
        part_lse = torch.cat([part_lse, lse.flatten()[part, None]], 1)
        weight, whole = weights_of_parts(part_lse, 1)
        result = _sum_of_rows(row_out, pair, weight[:, : pair.shape[1]])
        merged[part] = result.addcmul_(weight[:, -1:], out.flatten(0, 2)[part].to(result.dtype))
        total[part] = whole
    copy_into((whole_out, whole_lse), into)


def weights_of_parts(lse: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights of partial outputs from their log-sum-exps along `dim` (-inf for a part that read nothing), and the total log-sum-exp."""
    whole = lse.logsumexp(dim)
    some = lse.masked_fill((whole == -torch.inf).unsqueeze(dim), 0)
    return some.softmax(dim).masked_fill(lse == -torch.inf, 0), whole


def sum_rows(grad: Tensor, row_grad: Tensor, routes: Routes, into: Tensor) -> None:
    """`grad [B, H, N, D]` plus the gradients `row_grad [R, D]` of the rows of each query, written to `into`, of the shape of `grad`."""
    whole = into if into.is_contiguous() else torch.empty_like(into, memory_format=torch.contiguous_format)
    pairs, total = routes.row_of_pair.flatten(0, 2), whole.flatten(0, 2)
    for start in range(0, pairs.shape[0], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        total[part] = _sum_of_rows(row_grad, pairs[part]).add_(grad.flatten(0, 2)[part])
    copy_into((whole,), (into,))


def delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`out . grad - grad_lse` `[B, H, N]`, in at least float32: `grad_score = weight * (grad_weight - delta)`."""
    total = (out.to(accumulation_dtype(out.dtype)) * grad).sum(-1)
    return total if grad_lse is None else total - grad_lse


def copy_into(tensors: tuple[Tensor, ...], into: tuple[Tensor, ...]) -> None:
    """Copy each of `tensors` to its counterpart in `into`, converted to its dtype."""
    for x, to in zip(tensors, into):
        to.copy_(x)


def _take_rows(rows: Tensor, pair: Tensor) -> Tensor:
    return rows.index_select(0, pair.clamp(min=0).flatten()).view(*pair.shape, *rows.shape[1:])


def _sum_of_rows(rows: Tensor, pair: Tensor, weight: Tensor | None = None) -> Tensor:
    """`[R, D]`, rows of each query `[n, S]`, -1 for none -> their sum `[n, D]`, weighted by `weight [n, S]`, in at least float32."""
    taken = _take_rows(rows, pair).to(accumulation_dtype(rows.dtype)).masked_fill((pair < 0)[..., None], 0)
    return taken.sum(1) if weight is None else torch.bmm(weight[:, None], taken)[:, 0]


def empty_attention(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The local result of queries without an own block (`causal=False`): zeros, and a log-sum-exp of -inf."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=accumulation_dtype(query.dtype))
    return out, torch.full_like(out[..., 0], -torch.inf)
