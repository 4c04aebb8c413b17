"""The implementation for any device: plain matrix products on the rows of one block after another.

Time and memory grow with the number of chosen pairs. The backward pass is explicit because autograd would not use the log-sum-exp over
*all* blocks of a query, with which no partial output has to be stored.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, D and Dv head dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops.gate import choose as choose
from ..ops.rows import copy_into, empty_attention
from ..ops.rows import delta as delta
from .eager_routes import Routes, merge_routed, routed_keys
from .eager_routes import route as route
from .eager_softmax import (
    Diagonal,
    ValueRange,
    backward_is_safe,
    exponentials,
    largest,
    range_of,
    softmax_attention,
    softmax_backward,
    upcast,
)

MAX_TENSOR_ELEMENTS = sys.maxsize
READS_STRIDES = False
HEAD_BY_HEAD = True


def slots_per_block(block_size: int) -> int:
    """One slot per token: nothing here is tiled."""
    return block_size


def reads_tokens(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> bool:
    """Never: blocks are a dimension of their own here."""
    return False


def elements_per_row(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> int:
    """Elements per row of query, output and output gradient."""
    return query.shape[-1] + 2 * value.shape[-1]


def slots_per_query_tile(width: int, n_query: int, sequences: int) -> int:
    """Half of the mean number of queries per sequence, so that there are not many more slots than queries.

    At least `min(8, n_query - sequences + 1)`, since each tile copies the keys of its own block, and at most `width`.
    """
    few = torch.sym_max(1, torch.sym_min(8, n_query - sequences + 1))
    return torch.sym_min(width, torch.sym_max(few, n_query // (2 * sequences)))


_SCORES_AT_ONCE = 1 << 20  # scores and their exponentials stay in a core's cache
_ROUNDED = 2.0**-16  # a rounded log-sum-exp is recomputed if the relative error of weights is larger


def _local_heads(
    layout: BlockLayout, per_query: tuple[Tensor, ...], per_key: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor | slice, Diagonal, list[Tensor], list[Tensor]]]:
    """Yields some query blocks of one query head at a time: their own blocks, their causal mask, their tensors and those of the key head.

    `per_query [B, H, Q * P, ...]` become `[q, P, ...]`, `per_key [B, G, C * P, ...]` become `[C, P, ...]`. Query blocks may be narrower.
    """
    rows, heads, repeats = per_query[0].shape[0], per_query[0].shape[1], per_query[0].shape[1] // per_key[0].shape[1]
    tiles, whole = layout.offset, Diagonal(layout.width, layout.own.device)
    by_block = [x.unflatten(2, (-1, layout.query_width)) for x in per_query] + [x.unflatten(2, (-1, layout.width)) for x in per_key]
    at_once = layout.width if tiles is None else max(layout.query_width, per_key[0].shape[-1])  # the keys of tiles are copied
    step = max(1, _SCORES_AT_ONCE // (layout.width * at_once))
    for b in range(rows):
        own = layout.own[b].long()
        first, last = int(own[0]), int(own[-1])
        follow = tiles is None and last - first == layout.n_query_blocks - 1  # own blocks are consecutive, so keys are not copied
        for h in range(heads):
            of_query = [x[b, h] for x in by_block[: len(per_query)]]
            of_key = [x[b, h // repeats] for x in by_block[len(per_query) :]]
            for start in range(0, layout.n_query_blocks, step):
                part = slice(start, start + step)
                blocks = slice(first + part.start, min(first + part.stop, last + 1)) if follow else own[part]
                causal = whole if tiles is None else Diagonal(layout.width, own.device, layout.query_width, tiles[b, part])
                yield blocks, causal, [x[part] for x in of_query], of_key


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """Attention to the own block and along `routes`, merged by log-sum-exps. Writes output and log-sum-exp to `into`."""
    known = range_of(query, key, value, settings)
    out, lse = local(query, key, value, layout, settings, known, into) if settings.causal else empty_attention(query, value)
    if routes is None:
        copy_into((out, lse), into)
    else:
        merge_routed(out, lse, query, key, value, routes, layout, settings, known, into)


def local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    settings: AttentionSettings,
    known: ValueRange,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block: `[B, H, Q * P, Dv]`, at least float32, and the log-sum-exp `[B, H, Q * P]`, float64.

    The output reuses the memory of `into` if its dtype and strides fit.
    """
    dtype = accumulation_dtype(query.dtype)
    out = into[0] if into[0].dtype == dtype and into[0].is_contiguous() else into[0].new_empty(into[0].shape, dtype=dtype)
    lse = into[1].new_empty(into[1].shape, dtype=torch.float64)
    for own, causal, (q, o, l), (k, v) in _local_heads(layout, (query, out, lse), (key, value)):
        l.copy_(softmax_attention(upcast(q), upcast(k[own]), upcast(v[own]), causal, settings, known, into=o)[1])
    return out, lse


def local_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    rest: Tensor | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    safe: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    hidden = Diagonal(layout.width, query.device).later() if layout.tile is None else None
    grad_query = torch.empty_like(query, dtype=delta.dtype)
    grad_key, grad_value = (torch.zeros_like(x, dtype=delta.dtype) for x in (key, value))
    per_query = (query, grad_query, grad, lse, delta) if rest is None else (query, grad_query, grad, lse, delta, rest)
    per_key = (key, value, grad_key, grad_value)
    for own, causal, (q, dq, *upstream), (k, v, dk, dv) in _local_heads(layout, per_query, per_key):
        upstream, later = _upstream(*upstream), causal.later() if hidden is None else hidden
        part, part_k, part_v = softmax_backward(upcast(q), upcast(k[own]), upcast(v[own]), *upstream, later, settings, safe)
        dq.copy_(part)
        for total, added in ((dk, part_k), (dv, part_v)):
            if isinstance(own, slice):
                total[own] += added
            else:
                total.index_add_(0, own, added)
    return grad_query, grad_key, grad_value


def _upstream(grad: Tensor, lse: Tensor, delta: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return upcast(grad), lse, delta, rest


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value, through the own block and along `routes`, to `into`."""
    safe = backward_is_safe(*(largest(x) for x in (query, key, value, grad, delta)), query.shape[-1], value.shape[-1], settings)
    rest = None
    if not safe or largest(torch.where(lse.isfinite(), lse, 0)) * torch.finfo(lse.dtype).eps > _ROUNDED:
        lse, rest = _log_sum_exp(query, key, routes, layout, settings, safe)
    if not safe:
        lse = lse.masked_fill(_slots_without_a_query(layout), -torch.inf)
    if settings.causal:
        local = local_backward(query, key, value, grad, lse, delta, rest, layout, settings, safe)
    else:
        local = tuple(torch.zeros_like(x, dtype=delta.dtype) for x in (query, key, value))
    if routes is not None:
        per_query = [x.flatten(0, 2) for x in (query, grad, lse, delta, rest) if x is not None]
        k, v, dq, dk, dv = (x.flatten(0, 2) for x in (key, value, *local))
        for queries, keys in routed_keys(routes, layout, key.shape[1]):
            q, *upstream = (x.index_select(0, queries) for x in per_query)
            part, part_k, part_v = softmax_backward(
                upcast(q), upcast(k[keys]), upcast(v[keys]), *_upstream(*upstream), None, settings, safe
            )
            dq.index_add_(0, queries, part)
            dk[keys] += part_k
            dv[keys] += part_v
    copy_into(local, into)


def _slots_without_a_query(layout: BlockLayout) -> Tensor:
    """`[B, 1, Q * P]` bool. The gradients of these slots are 0, but 0 * NaN is NaN."""
    slot = torch.arange(layout.query_width, device=layout.own.device)
    return ((slot < layout.query_start[..., None]) | (slot >= layout.query_stop[..., None])).flatten(1)[:, None]


def _log_sum_exp(
    query: Tensor, key: Tensor, routes: Routes | None, layout: BlockLayout, settings: AttentionSettings, safe: bool
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp `[B, H, N]` over all blocks of a query as a large and a small value, from the same scores that backward computes."""
    known = ValueRange(False, safe)
    most = torch.full(query.shape[:3], -torch.inf, dtype=upcast(query[:0]).dtype, device=query.device)
    rest = torch.zeros_like(most)
    for own, causal, (q, m, r), (k,) in _local_heads(layout, (query, most, rest), (key,)) if settings.causal else ():
        _, total, part = exponentials(upcast(q), upcast(k[own]), causal, settings, known)
        m.copy_(part.squeeze(-1))
        r.copy_(total.squeeze(-1).log_())
    if routes is not None:
        q, k, all_most, all_rest = query.flatten(0, 2), key.flatten(0, 2), most.flatten(), rest.flatten()
        for queries, keys in routed_keys(routes, layout, key.shape[1]):
            _, total, part = exponentials(upcast(q.index_select(0, queries)), upcast(k[keys]), None, settings, known)
            before, part = all_most.index_select(0, queries), part.squeeze(-1)
            above = torch.maximum(before, part)
            sums = (before - above) + all_rest.index_select(0, queries), (part - above) + total.squeeze(-1).log_()
            all_most.index_copy_(0, queries, above)
            all_rest.index_copy_(0, queries, torch.logaddexp(*sums))
    return most, rest
