"""The implementation for any device: plain matrix products on the rows of one block after another.

Cost and memory follow the number of chosen pairs. Forward and backward are written out, because the backward pass wants one thing
that autograd would not do: use the log-sum-exp over *all* blocks of a query, so that no partial output has to be kept.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, R routed rows, D width.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops.gate import choose
from ..ops.routing import order_pairs
from ..ops.rows import delta, over_no_keys, write

__all__ = ["MAX_TENSOR_ELEMENTS", "READS_STRIDES", "attend", "backward", "choose", "delta", "route", "slots_per_block"]

MAX_TENSOR_ELEMENTS = sys.maxsize
READS_STRIDES = False


def slots_per_block(block_size: int) -> int:
    """As many as it has tokens: nothing here is cut into tiles."""
    return block_size


_SCORES_AT_ONCE = 1 << 20  # they and their exponentials stay in a core's cache
_ROWS_AT_ONCE = 8192
_TILES = 8  # of a block's rows: products of a batch keep cores busier than one large product does
# e^30 * 1e10 is far below float32's largest number, and e^-30 (1e-13) far above its smallest, with values down to 1e-24 too.
_SMALL_SCORE, _SMALL_SUM = 30.0, 1e10


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(query: Tensor, key: Tensor, settings: AttentionSettings) -> Tensor:
    return _cap(query @ (key * settings.scale).mT, settings)


def _cap(score: Tensor, settings: AttentionSettings) -> Tensor:
    """In place."""
    return score if settings.softcap is None else score.div_(settings.softcap).tanh_().mul_(settings.softcap)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, settings: AttentionSettings, small: bool = False, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[..., M, D]` to `[..., K, D]` and its log-sum-exp; `causal` (M = K): to keys up to the query's own.

    `small`: no score can be large, so that nothing need be subtracted. The output is written `into` a tensor if there is one.
    """
    weight, most = _scores(query, key, settings), None
    if not small:
        later = _later(query.shape[-2], query.device) if causal else None
        most = (weight if later is None else weight.masked_fill_(later, -torch.inf)).amax(-1, keepdim=True)
        weight -= most
        if later is not None:
            weight.masked_fill_(later, 0)  # the exponential of -inf takes many times as long as that of 0
    weight.exp_()
    if causal:
        weight.tril_()
    total = weight.sum(-1, keepdim=True)
    out = torch.matmul(weight, value, out=into).div_(total)
    lse = total.log_()
    return out, (lse if most is None else lse.add_(most)).squeeze(-1)


def _later(width: int, device: torch.device) -> Tensor:
    """`[P, P]`: the keys that come after a query of the same block. They hide a last block's missing keys too."""
    slot = torch.arange(width, device=device)
    return slot > slot[:, None]


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, hidden: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`'s share in an output whose log-sum-exp over all blocks is `lse`; `delta` is `out . grad`."""
    score = _scores(query, key, settings)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]  # a query that reads nothing gives nothing back
    weight = (score - lse).exp_()
    if hidden is not None:
        weight.masked_fill_(hidden, 0)
    grad_value = weight.mT @ grad
    grad_score = weight.mul_((grad @ value.mT).sub_(delta[..., None]))
    if settings.softcap is not None:
        grad_score *= 1 - (score / settings.softcap) ** 2
    grad_score *= settings.scale
    return grad_score @ key, grad_score.mT @ query, grad_value


def _local_heads(
    layout: BlockLayout, per_query: tuple[Tensor, ...], per_key: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor | slice, list[Tensor], list[Tensor]]]:
    """Each query head with its key head, some query blocks at a time: their own blocks, and all that there is of them.

    `per_query [B, H, Q * P, ...]` comes as `[q, P, ...]`, `per_key [B, G, C * P, ...]` as `[C, P, ...]`.
    """
    rows, heads, repeats = per_query[0].shape[0], per_query[0].shape[1], per_query[0].shape[1] // per_key[0].shape[1]
    by_block = [x.unflatten(2, (-1, layout.width)) for x in (*per_query, *per_key)]
    step = max(1, _SCORES_AT_ONCE // layout.width**2)
    for b in range(rows):
        own = layout.own[b].long()
        first, last = int(own[0]), int(own[-1])
        follow = last - first == layout.n_query_blocks - 1  # one after another: then keys need not be copied
        for h in range(heads):
            of_query = [x[b, h] for x in by_block[: len(per_query)]]
            of_key = [x[b, h // repeats] for x in by_block[len(per_query) :]]
            for start in range(0, layout.n_query_blocks, step):
                part = slice(start, start + step)
                blocks = slice(first + part.start, min(first + part.stop, last + 1)) if follow else own[part]
                yield blocks, [x[part] for x in of_query], of_key


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """Attention to the own block and along `routes`, merged by log-sum-exps; output and log-sum-exp go to `into`."""
    out, lse = local(query, key, value, layout, settings, into) if settings.causal else over_no_keys(query, value)
    if routes is None:
        write((out, lse), into)
    else:
        merge_routed(out, lse, query, key, value, routes, layout, settings, into)


def local(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings, into: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block: `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`, in float32 at least.

    They are `into` themselves where those can hold them, so that no other memory need be taken for the whole output.
    """
    wide, small = torch.promote_types(query.dtype, torch.float32), _all_small(query, key, value, settings)
    out, lse = (x if x.dtype == wide and x.is_contiguous() else x.new_empty(x.shape, dtype=wide) for x in into)
    for own, (q, o, l), (k, v) in _local_heads(layout, (query, out, lse), (key, value)):
        l.copy_(_attend(_wide(q), _wide(k[own]), _wide(v[own]), True, settings, small, into=o)[1])
    return out, lse


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    hidden = _later(layout.width, query.device)
    grad_query = torch.empty_like(query, dtype=lse.dtype)
    grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
    per_query, per_key = (query, grad, lse, delta, grad_query), (key, value, grad_key, grad_value)
    for own, (*of_query, dq), (k, v, dk, dv) in _local_heads(layout, per_query, per_key):
        q, g, l, d = (_wide(x) for x in of_query)
        part, part_k, part_v = _attend_backward(q, _wide(k[own]), _wide(v[own]), g, l, d, hidden, settings)
        dq.copy_(part)
        for total, added in ((dk, part_k), (dv, part_v)):
            if isinstance(own, slice):
                total[own] += added
            else:
                total.index_add_(0, own, added)
    return grad_query, grad_key, grad_value


@dataclass(frozen=True, eq=False)
class Routes:
    """The queries of each block: those of block i are `queries[first[i] : first[i + 1]]`, none of them twice."""

    queries: Tensor  # [pairs] int64, `(b * H + h) * N + n`
    first: list[int]

    @property
    def most_rows(self) -> int:
        """The most queries that are worked on at a time."""
        return min(_ROWS_AT_ONCE, max((stop - start for start, stop in itertools.pairwise(self.first)), default=0))


def route(chosen: Tensor, groups: int, n_blocks: int, max_pairs: int) -> Routes:
    """The pairs of `chosen [B, H, N, S]`, ordered by block. How many they are is read from the device, so no bound is needed."""
    _, order, first = order_pairs(chosen, groups, n_blocks)
    starts = first.tolist()
    return Routes(order[: starts[-1]] // chosen.shape[-1], starts)


def _routed_parts(routes: Routes) -> Iterator[tuple[int, Tensor]]:
    """Each block that was chosen, with its queries, some of them at a time."""
    sizes = [stop - start for start, stop in itertools.pairwise(routes.first)]
    for block, queries in enumerate(routes.queries.split(sizes)):
        for part in queries.split(_ROWS_AT_ONCE) if len(queries) else ():
            yield block, part


def _routed_keys(routes: Routes, layout: BlockLayout, groups: int) -> Iterator[tuple[Tensor, slice]]:
    """The queries of each block that was chosen, and its real keys among all keys `[B * G * C * P]`."""
    keys = layout.block_keys[:, None].expand(-1, groups, -1).flatten().tolist()
    for block, queries in _routed_parts(routes):
        yield queries, slice(block * layout.width, block * layout.width + keys[block])


def merge_routed(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """What queries read along `routes`, added to an output `[B, H, N, Dv]` and its log-sum-exp `[B, H, N]`, written `into` such.

    Merging block after block keeps no partial output: they would be `top_k` times the size of the output.
    """
    operands = (out, lse, query, key, value, routes, layout, settings, into)
    if not (settings.causal and _sum_routed(*operands)):
        _merge_one_by_one(*operands)


def _sum_routed(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> bool:
    """Softmax weights relative to one number a query, so that blocks add up and nothing has to be rescaled.

    That number is 0 if no score can be large, and else the local call's log-sum-exp. False, and nothing done, if something is too large
    even so: a score some 80 above it (float32), infinity or NaN. A score far below is no matter, since its weight is nothing beside
    the local call's 1.
    """
    small = _all_small(query, key, value, settings)
    q = _wide(query).flatten(0, 2)
    k, v = _tiles(_wide(key) * settings.scale, layout), _tiles(_wide(value), layout)
    relative = None if small else lse.flatten()
    total = (lse.exp() if small else torch.ones_like(lse)).flatten()
    whole = out.mul_(total.view(lse.shape)[..., None]) if small else out.clone()
    sums = whole.flatten(0, 2)
    # The same memory for every block, so that it stays in the cache.
    most_rows = -(-routes.most_rows // _TILES) * _TILES
    kept = [total.new_zeros(most_rows, n) for n in (q.shape[1], layout.width, value.shape[-1])]
    for block, queries in _routed_parts(routes):
        n, tile = len(queries), -(-len(queries) // _TILES)
        row_query, weight, part = (x[: tile * _TILES] for x in kept)  # rows after n: of an earlier block, for nothing
        in_tiles = [x.view(_TILES, tile, -1) for x in (row_query, weight, part)]
        torch.index_select(q, 0, queries, out=row_query[:n])
        torch.bmm(in_tiles[0], k[block].mT, out=in_tiles[1])
        _cap(weight, settings)
        if relative is not None:
            weight[:n] -= relative.index_select(0, queries)[:, None]
        total.index_add_(0, queries, weight.exp_().sum(-1)[:n])
        torch.bmm(in_tiles[1], v[block], out=in_tiles[2])
        sums.index_add_(0, queries, part[:n])
    if not small and not all(math.isfinite(bound) for x in (total, sums) for bound in torch.aminmax(x)):
        return False
    total = total.view(lse.shape)
    torch.div(whole, total[..., None], out=into[0])
    into[1].copy_(total.log_() if small else total.log_().add_(lse))
    return True


def _tiles(x: Tensor, layout: BlockLayout) -> tuple[Tensor, ...]:
    """Each block of `[B, G, C * P, D]` as often as its rows have tiles: `[tiles, P, D]`. Only whole blocks are routed to."""
    return x.unflatten(2, (-1, layout.width)).flatten(0, 2)[:, None].expand(-1, _TILES, -1, -1).unbind(0)


def _all_small(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> bool:
    """Whether sums of values weighted with `exp(score)` stay far from float32's limits. A product is at most that of the lengths."""
    lengths = [float(torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).max()) for x in (query, key)]
    score = lengths[0] * lengths[1] * abs(settings.scale)
    return score < _SMALL_SCORE and max(abs(float(x)) for x in torch.aminmax(value)) * key.shape[2] < _SMALL_SUM  # False for NaN


def _merge_one_by_one(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """The same for any scores: each block's output is a softmax of its own, merged with what came before it."""
    q, total, sums = query.flatten(0, 2), lse.flatten(), out.flatten(0, 2)
    k, v = key.flatten(0, 2), value.flatten(0, 2)
    for queries, keys in _routed_keys(routes, layout, key.shape[1]):
        part, part_lse = _attend(_wide(q.index_select(0, queries)), _wide(k[keys]), _wide(v[keys]), False, settings)
        before = total.index_select(0, queries)
        share = torch.sigmoid(part_lse - before)[:, None]  # of the block in the sum of both
        sums.index_copy_(0, queries, torch.lerp(sums.index_select(0, queries), part, share))
        total.index_copy_(0, queries, torch.logaddexp(before, part_lse))
    write((out, lse), into)


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
    """Gradients of query, key and value, through the own block and along `routes`."""
    if settings.causal:
        local = local_backward(query, key, value, grad, lse, delta, layout, settings)
    else:
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value))
        local = grad_query, grad_key, grad_value
    if routes is not None:
        per_query = [x.flatten(0, 2) for x in (query, grad, lse, delta)]
        k, v, dq, dk, dv = (x.flatten(0, 2) for x in (key, value, *local))
        for queries, keys in _routed_keys(routes, layout, key.shape[1]):
            q, g, l, d = (_wide(x.index_select(0, queries)) for x in per_query)
            part, part_k, part_v = _attend_backward(q, _wide(k[keys]), _wide(v[keys]), g, l, d, None, settings)
            dq.index_add_(0, queries, part)
            dk[keys] += part_k
            dv[keys] += part_v
    write(local, into)
