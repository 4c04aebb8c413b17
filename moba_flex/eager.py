"""The implementation for any device: plain matrix products on the rows of one block after another.

Cost and memory follow the number of chosen pairs. Forward and backward are written out, because the backward pass wants one thing
that autograd would not do: use the log-sum-exp over *all* blocks of a query, so that no partial output has to be kept.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, R routed rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import BlockLayout
from .gate import choose
from .routing import Routes
from .spec import Spec

__all__ = ["TILE", "choose", "local", "local_backward", "merge_routed", "merge_routed_backward"]

TILE = 1  # rows need no padding here
_SCORES_AT_ONCE = 1 << 21  # about what a core's cache holds
_ROWS_AT_ONCE = 4096


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(query: Tensor, key: Tensor, spec: Spec) -> Tensor:
    score = query @ (key * spec.scale).mT
    return score if spec.softcap is None else score.div_(spec.softcap).tanh_().mul_(spec.softcap)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, spec: Spec) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[..., M, D]` to `[..., K, D]` and its log-sum-exp; `causal` (M = K): to keys up to the query's own."""
    if not query.is_cuda and spec.softcap is None and query.shape[-1] == value.shape[-1]:
        # What scaled_dot_product_attention runs on a CPU. Called by name because only so it hands out its log-sum-exp.
        operands = (x.reshape(1, -1, *x.shape[-2:]) for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, causal, scale=spec.scale)
        return out.view(*query.shape[:-1], -1), lse.view(query.shape[:-1])
    score = _scores(query, key, spec)
    if causal:
        score.masked_fill_(_later(query.shape[-2], query.device), -torch.inf)
    most = score.amax(-1, keepdim=True)
    weight = score.sub_(most).exp_()
    total = weight.sum(-1, keepdim=True)
    return (weight @ value).div_(total), total.log_().add_(most).squeeze(-1)


def _later(width: int, device: torch.device) -> Tensor:
    """`[P, P]`: the keys that come after a query of the same block. They hide a last block's missing keys too."""
    slot = torch.arange(width, device=device)
    return slot > slot[:, None]


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, hidden: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`'s share in an output whose log-sum-exp over all blocks is `lse`; `delta` is `out . grad`."""
    score = _scores(query, key, spec)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]  # a query that reads nothing gives nothing back
    weight = (score - lse).exp_()
    if hidden is not None:
        weight.masked_fill_(hidden, 0)
    grad_value = weight.mT @ grad
    grad_score = weight.mul_((grad @ value.mT).sub_(delta[..., None]))
    if spec.softcap is not None:
        grad_score *= 1 - (score / spec.softcap) ** 2
    grad_score *= spec.scale
    return grad_score @ key, grad_score.mT @ query, grad_value


def _local_parts(rows: int, layout: BlockLayout) -> Iterator[tuple[slice, Tensor]]:
    """Query blocks a few at a time, and their own blocks `[B, q]`."""
    step = max(1, _SCORES_AT_ONCE // (rows * layout.width**2))
    for start in range(0, layout.n_query_blocks, step):
        part = slice(start, min(start + step, layout.n_query_blocks))
        yield part, layout.own[:, part].long()


def _take_blocks(x: Tensor, block: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, G, C * P, D]` -> `[B, G, q, P, D]`."""
    by_block = x.unflatten(2, (layout.n_key_blocks, layout.width))
    return _wide(torch.stack([by_block[b].index_select(1, block[b]) for b in range(block.shape[0])]))


def _query_blocks(x: Tensor, groups: int, layout: BlockLayout) -> Tensor:
    """`[B, H, Q * P, ...]` -> `[H / G, B, G, Q, P, ...]`: each entry meets a key head of its own, which is what products are fast at."""
    return x.unflatten(2, (layout.n_query_blocks, layout.width)).unflatten(1, (groups, -1)).movedim(2, 0)


def local(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: Spec) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block: `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`, in float32 at least."""
    groups, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    out, lse = query.new_empty(*query.shape[:3], value.shape[-1], dtype=wide), query.new_empty(query.shape[:3], dtype=wide)
    heads = list(zip(*(_query_blocks(x, groups, layout) for x in (query, out, lse))))
    for part, own in _local_parts(key.shape[0] * groups, layout):
        k, v = _take_blocks(key, own, layout), _take_blocks(value, own, layout)
        for q, o, l in heads:
            o[:, :, part], l[:, :, part] = _attend(_wide(q[:, :, part]), k, v, True, spec)
    return out, lse


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    groups, hidden = key.shape[1], _later(layout.width, query.device)
    grad_query = torch.empty_like(query, dtype=lse.dtype)
    grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
    totals = [x.unflatten(2, (layout.n_key_blocks, layout.width)) for x in (grad_key, grad_value)]
    heads = list(zip(*(_query_blocks(x, groups, layout) for x in (query, grad, lse, delta, grad_query))))
    for part, own in _local_parts(key.shape[0] * groups, layout):
        k, v = _take_blocks(key, own, layout), _take_blocks(value, own, layout)
        for q, do, of_lse, of_delta, dq in heads:
            upstream = (_wide(x[:, :, part]) for x in (do, of_lse, of_delta))
            dq[:, :, part], *parts = _attend_backward(_wide(q[:, :, part]), k, v, *upstream, hidden, spec)
            for total, gathered in zip(totals, parts):
                for b in range(own.shape[0]):
                    total[b].index_add_(1, own[b], gathered[b])
    return grad_query, grad_key, grad_value


def _routed_parts(routes: Routes, layout: BlockLayout, groups: int) -> Iterator[tuple[Tensor, slice]]:
    """For each block with rows: the rows' queries, no query twice, and the block's real keys among all keys `[B * G * C * P]`."""
    first, query_of_row = routes.first_tile.tolist(), routes.query_of_row.long()
    keys = layout.block_keys[:, None].expand(-1, groups, -1).flatten().tolist()
    for block, n_keys in enumerate(keys):
        for start in range(first[block], first[block + 1], _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, first[block + 1]))
            yield query_of_row[rows], slice(block * layout.width, block * layout.width + n_keys)


def merge_routed(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, routes: Routes, layout: BlockLayout, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Add what queries read along `routes` to an output `[B, H, N, Dv]` and its log-sum-exp `[B, H, N]`, in place.

    Merging after each block keeps no partial output: they would be `top_k` times the size of the output.
    """
    q, total, sums = query.flatten(0, 2), lse.flatten(), out.flatten(0, 2)
    k, v = key.flatten(0, 2), value.flatten(0, 2)
    for queries, keys in _routed_parts(routes, layout, key.shape[1]):
        part, part_lse = _attend(_wide(q.index_select(0, queries)), _wide(k[keys]), _wide(v[keys]), False, spec)
        before = total.index_select(0, queries)
        merged = torch.logaddexp(before, part_lse)
        share, part_share = (torch.exp(x - merged)[:, None] for x in (before, part_lse))
        sums.index_copy_(0, queries, sums.index_select(0, queries).mul_(share).addcmul_(part, part_share))
        total.index_copy_(0, queries, merged)
    return out, lse


def merge_routed_backward(
    grad_query: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes,
    layout: BlockLayout,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, added to `grad_query` in place, of key and of value that come along `routes`."""
    grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
    per_query = [x.flatten(0, 2) for x in (query, grad, lse, delta)]
    dq, k, v, dk, dv = (x.flatten(0, 2) for x in (grad_query, key, value, grad_key, grad_value))
    for queries, keys in _routed_parts(routes, layout, key.shape[1]):
        q, *upstream = (_wide(x.index_select(0, queries)) for x in per_query)
        part, part_k, part_v = _attend_backward(q, _wide(k[keys]), _wide(v[keys]), *upstream, None, spec)
        dq.index_add_(0, queries, part)
        dk[keys] += part_k
        dv[keys] += part_v
    return grad_query, grad_key, grad_value
