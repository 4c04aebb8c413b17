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
from .rows import gather, merge, sum_rows
from .spec import Spec

__all__ = ["TILE", "choose", "gather", "local", "local_backward", "merge", "routed", "routed_backward", "sum_rows"]

TILE = 1  # rows need no padding here
_SCORES_AT_ONCE = 1 << 21  # about what a core's cache holds
_ROWS_AT_ONCE = 2048


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(query: Tensor, key: Tensor, spec: Spec) -> Tensor:
    score = (query * spec.scale) @ key.mT
    return score if spec.softcap is None else score.div_(spec.softcap).tanh_().mul_(spec.softcap)


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[..., M, D]` to `[..., K, D]`, without the pairs that are `hidden [..., M, K]`."""
    score = _scores(query, key, spec)
    if hidden is not None:
        score.masked_fill_(hidden, -torch.inf)
    most = score.amax(-1, keepdim=True)
    most = most.masked_fill_(most == -torch.inf, 0)
    weight = score.sub_(most).exp_()
    total = weight.sum(-1, keepdim=True)
    out = (weight @ value) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return out, (total.log_() + most).squeeze(-1)


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


def _local_parts(query: Tensor, layout: BlockLayout) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query blocks a few at a time: as a slice of blocks, as a slice of slots, and their own blocks `[B, q]`."""
    step = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * layout.width**2))
    for start in range(0, layout.n_query_blocks, step):
        part = slice(start, min(start + step, layout.n_query_blocks))
        yield part, slice(part.start * layout.width, part.stop * layout.width), layout.own[:, part].long()


def _take_blocks(x: Tensor, block: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, G, C * P, D]` -> `[B, G, 1, q, P, D]`."""
    by_block = x.unflatten(2, (layout.n_key_blocks, layout.width))
    return _wide(torch.stack([by_block[b].index_select(1, block[b]) for b in range(block.shape[0])])[:, :, None])


def _query_blocks(x: Tensor, groups: int, layout: BlockLayout, part: slice) -> Tensor:
    """`[B, H, Q * P, ...]` -> `[B, G, H / G, q, P, ...]`."""
    return _wide(x.unflatten(2, (layout.n_query_blocks, layout.width)).unflatten(1, (groups, -1))[:, :, :, part])


def _after(width: int, device: torch.device) -> Tensor:
    """`[P, P]`: the keys that come after a query of the same block. They hide a last block's missing keys too."""
    slot = torch.arange(width, device=device)
    return slot > slot[:, None]


def local(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: Spec) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block. Returns `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`."""
    groups, hidden = key.shape[1], _after(layout.width, query.device)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for part, slots, own in _local_parts(query, layout):
        q = _query_blocks(query, groups, layout, part)
        o, l = _attend(q, _take_blocks(key, own, layout), _take_blocks(value, own, layout), hidden, spec)
        out[:, :, slots], lse[:, :, slots] = o.flatten(3, 4).flatten(1, 2).to(out.dtype), l.flatten(3, 4).flatten(1, 2)
    return out, lse


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    groups, hidden = key.shape[1], _after(layout.width, query.device)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
    totals = [x.unflatten(2, (layout.n_key_blocks, layout.width)) for x in (grad_key, grad_value)]
    for part, slots, own in _local_parts(query, layout):
        q, do, of_lse, of_delta = (_query_blocks(x, groups, layout, part) for x in (query, grad, lse, delta))
        k, v = _take_blocks(key, own, layout), _take_blocks(value, own, layout)
        dq, *parts = _attend_backward(q, k, v, do, of_lse, of_delta, hidden, spec)
        grad_query[:, :, slots] = dq.flatten(3, 4).flatten(1, 2).to(query.dtype)
        for total, gathered in zip(totals, parts):
            for b in range(own.shape[0]):
                total[b].index_add_(1, own[b], gathered[b].sum(1))
    return grad_query, grad_key, grad_value


def _routed_parts(routes: Routes, layout: BlockLayout, groups: int) -> Iterator[tuple[slice, slice]]:
    """For each block with rows: the rows, and the block's real keys among all keys `[B * G * C * P]`."""
    first = routes.first_tile.tolist()
    keys = layout.block_keys[:, None].expand(-1, groups, -1).flatten().tolist()
    for block, n_keys in enumerate(keys):
        for start in range(first[block], first[block + 1], _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, first[block + 1]))
            yield rows, slice(block * layout.width, block * layout.width + n_keys)


def routed(query: Tensor, key: Tensor, value: Tensor, routes: Routes, layout: BlockLayout, spec: Spec) -> tuple[Tensor, Tensor]:
    """Attention of each row `[R, D]` to its block of `key [B, G, C * P, D]`. Returns `[R, Dv]` and the log-sum-exp `[R]`."""
    out = query.new_empty(query.shape[0], value.shape[-1])
    lse = query.new_empty(query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    k, v = key.flatten(0, 2), value.flatten(0, 2)
    for rows, keys in _routed_parts(routes, layout, key.shape[1]):
        out[rows], lse[rows] = _attend(_wide(query[rows]), _wide(k[keys]), _wide(v[keys]), None, spec)
    return out, lse


def routed_backward(
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
    """Gradients of the rows `[R, D]`, of key and of value that come through the routed call."""
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
    k, v, dk, dv = (x.flatten(0, 2) for x in (key, value, grad_key, grad_value))
    for rows, keys in _routed_parts(routes, layout, key.shape[1]):
        dq, part_k, part_v = _attend_backward(
            _wide(query[rows]), _wide(k[keys]), _wide(v[keys]), _wide(grad[rows]), lse[rows], delta[rows], None, spec
        )
        grad_query[rows] = dq.to(query.dtype)
        dk[keys] += part_k
        dv[keys] += part_v
    return grad_query, grad_key, grad_value
