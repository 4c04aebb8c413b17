"""The implementation for any device: plain matrix products on the rows of one block after another.

Cost and memory follow the number of chosen pairs. Forward and backward are written out, because the backward pass wants one thing
that autograd would not do: use the log-sum-exp over *all* blocks of a query, so that no partial output has to be kept.

A log-sum-exp is rounded, and `exp(score - lse)` is off by as much: by 0.8 % for a score of 133,120 in float32. So forward keeps those of
large scores in float64, and backward, which is given a rounded one, computes it again in two numbers where that matters.

Inputs that are not `safe`, with NaN, infinity or numbers near the end of their range, take slower products in which a weight of 0 hides
anything: see `moba_flex/core/hidden.py`. Only the local call hides pairs; along a route a query reads all of a block.

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

from ..core.dtypes import wide
from ..core.hidden import visible_product
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops.gate import choose
from ..ops.routing import order_pairs
from ..ops.rows import delta, over_no_keys, write

__all__ = ["HEAD_BY_HEAD", "MAX_TENSOR_ELEMENTS", "READS_STRIDES", "attend", "backward", "choose", "delta", "route"]
__all__ += ["slots_per_block", "slots_per_query_tile"]

MAX_TENSOR_ELEMENTS = sys.maxsize
READS_STRIDES = False
HEAD_BY_HEAD = True


def slots_per_block(block_size: int) -> int:
    """As many as it has tokens: nothing here is cut into tiles."""
    return block_size


def slots_per_query_tile(width: int, n_query: int, sequences: int) -> int:
    """Half of the queries that a sequence has on average, so that there are not many more slots than queries.

    One where each sequence has one query, and 8 at least as soon as some have more: a tile copies its own block's keys.
    """
    few = torch.sym_max(1, torch.sym_min(8, n_query - sequences + 1))
    return torch.sym_min(width, torch.sym_max(few, n_query // (2 * sequences)))


_SCORES_AT_ONCE = 1 << 20  # they and their exponentials stay in a core's cache
_ROWS_AT_ONCE = 8192
_TILES = 8  # of a block's rows: products of a batch keep cores busier than one large product does
# e^30 * 1e10 is far below float32's largest number, and e^-30 (1e-13) far above its smallest, with values down to 1e-24 too.
_SMALL_SCORE, _SMALL_SUM = 30.0, 1e10
_SAFE = 1e36  # intermediate results below it stay finite in float32, and a factor below float32's largest number
_ROUNDED = 2.0**-16  # a larger relative error of weights, from a rounded log-sum-exp, is worth its recomputation


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _scores(query: Tensor, key: Tensor, settings: AttentionSettings, safe: bool) -> Tensor:
    if safe:
        return _cap(query @ (key * settings.scale).mT, settings)
    return _cap((query @ key.mT).mul_(settings.scale), settings)


def _cap(score: Tensor, settings: AttentionSettings) -> Tensor:
    """In place."""
    return score if settings.softcap is None else score.div_(settings.softcap).tanh_().mul_(settings.softcap)


@dataclass(frozen=True)
class _Range:
    """What is known of all numbers of a call. `small`: no score can be large, so that nothing need be subtracted from it."""

    small: bool
    safe: bool


@dataclass(frozen=True, eq=False)
class _Diagonal:
    """Which keys of its own block a query sees: those up to its own place. They hide a last block's missing keys too."""

    width: int
    device: torch.device
    tile: int | None = None  # queries `[q, tile]` of a part of a block, which begins at `offset [q]`; None: of a whole block
    offset: Tensor | None = None

    def later(self) -> Tensor:
        """`[P, P]` or `[q, tile, P]`: the keys that come after a query."""
        if self.tile is None or self.offset is None:
            return _later(self.width, self.device)
        slot = torch.arange(self.width, device=self.device)
        return slot > (self.offset[:, None] + slot[: self.tile])[..., None]

    def hide(self, weight: Tensor) -> Tensor:
        """`weight`, 0 at later keys. In place."""
        return weight.tril_() if self.tile is None else weight.masked_fill_(self.later(), 0)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: _Diagonal | None,
    settings: AttentionSettings,
    known: _Range,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[..., M, D]` to `[..., K, D]` and its log-sum-exp; `causal`: to keys up to the query's own.

    The output is written `into` a tensor if there is one. The log-sum-exp is float64, but for small scores.
    """
    weight, total, most = _weights(query, key, causal, settings, known)
    lse = (total.log() if most is None else total.double().log().add_(most)).squeeze(-1)
    if known.safe:
        return torch.matmul(weight, value, out=into).div_(total), lse
    weight = weight.div_(total)  # before the product, which could overflow otherwise
    out = _product(weight, value, ~causal.later() if causal else None)
    return out if into is None else into.copy_(out), lse


def _weights(
    query: Tensor, key: Tensor, causal: _Diagonal | None, settings: AttentionSettings, known: _Range
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exponentials of scores `[..., M, K]`, their sums `[..., M, 1]`, and what was subtracted from a query's scores, if anything."""
    weight, most = _scores(query, key, settings, known.safe), None
    if not known.small:
        later = causal.later() if causal else None
        most = (weight if later is None else weight.masked_fill_(later, -torch.inf)).amax(-1, keepdim=True)
        if not known.safe:
            most = torch.where(most.isfinite(), most, 0)
        weight -= most
        if later is not None:
            weight.masked_fill_(later, 0)  # the exponential of -inf takes many times as long as that of 0
    weight.exp_()
    if causal:
        causal.hide(weight)
    return weight, weight.sum(-1, keepdim=True), most


def _later(width: int, device: torch.device) -> Tensor:
    """`[P, P]`: the keys that come after a query of the same block."""
    slot = torch.arange(width, device=device)
    return slot > slot[:, None]


def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    rest: Tensor | None,
    hidden: Tensor | None,
    settings: AttentionSettings,
    safe: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`'s share in an output whose log-sum-exp over all blocks is `lse`, plus `rest`; `delta` is `out . grad`."""
    score = _scores(query, key, settings, safe)
    nothing = (lse == -torch.inf)[..., None]
    lse = lse[..., None].masked_fill(nothing, torch.inf)  # a query that reads nothing gives nothing back
    weight = score - lse
    weight = (weight if rest is None else weight.sub_(rest[..., None])).exp_()
    if hidden is not None:
        hidden = hidden if safe else hidden | nothing
        weight.masked_fill_(hidden, 0)
    visible = None if safe or hidden is None else ~hidden
    grad_value = _product(weight.mT, grad, None if visible is None else visible.mT)
    grad_score = weight.mul_((grad @ value.mT).sub_(delta[..., None]))
    if settings.softcap is not None:
        grad_score *= 1 - (score / settings.softcap) ** 2
    grad_score *= settings.scale
    if visible is None:
        return grad_score @ key, grad_score.mT @ query, grad_value
    grad_score.masked_fill_(hidden, 0)
    return _product(grad_score, key, visible), _product(grad_score.mT, query, visible.mT), grad_value


def _product(weight: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """`weight @ x`, of the pairs that are visible if not all are."""
    return weight @ x if visible is None else visible_product(weight, visible, x)


def _local_heads(
    layout: BlockLayout, per_query: tuple[Tensor, ...], per_key: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor | slice, _Diagonal, list[Tensor], list[Tensor]]]:
    """Each query head with its key head, some query blocks at a time: their own blocks, and all that there is of them.

    `per_query [B, H, Q * P, ...]` comes as `[q, P, ...]`, `per_key [B, G, C * P, ...]` as `[C, P, ...]`. Query blocks may be narrower.
    """
    rows, heads, repeats = per_query[0].shape[0], per_query[0].shape[1], per_query[0].shape[1] // per_key[0].shape[1]
    tiles, whole = layout.offset, _Diagonal(layout.width, layout.own.device)
    by_block = [x.unflatten(2, (-1, layout.query_width)) for x in per_query] + [x.unflatten(2, (-1, layout.width)) for x in per_key]
    at_once = layout.width if tiles is None else max(layout.query_width, per_key[0].shape[-1])  # the keys of tiles are copied
    step = max(1, _SCORES_AT_ONCE // (layout.width * at_once))
    for b in range(rows):
        own = layout.own[b].long()
        first, last = int(own[0]), int(own[-1])
        follow = tiles is None and last - first == layout.n_query_blocks - 1  # one after another: then keys need not be copied
        for h in range(heads):
            of_query = [x[b, h] for x in by_block[: len(per_query)]]
            of_key = [x[b, h // repeats] for x in by_block[len(per_query) :]]
            for start in range(0, layout.n_query_blocks, step):
                part = slice(start, start + step)
                blocks = slice(first + part.start, min(first + part.stop, last + 1)) if follow else own[part]
                causal = whole if tiles is None else _Diagonal(layout.width, own.device, layout.query_width, tiles[b, part])
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
    """Attention to the own block and along `routes`, merged by log-sum-exps; output and log-sum-exp go to `into`."""
    known = _range_of(query, key, value, settings)
    out, lse = local(query, key, value, layout, settings, known, into) if settings.causal else over_no_keys(query, value)
    if routes is None:
        write((out, lse), into)
    else:
        merge_routed(out, lse, query, key, value, routes, layout, settings, known, into)


def local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    settings: AttentionSettings,
    known: _Range,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block: `[B, H, Q * P, Dv]`, float32 at least, and the log-sum-exp `[B, H, Q * P]`, float64.

    The output is that of `into` where it can hold it, so that no other memory need be taken for it.
    """
    dtype = wide(query.dtype)
    out = into[0] if into[0].dtype == dtype and into[0].is_contiguous() else into[0].new_empty(into[0].shape, dtype=dtype)
    lse = into[1].new_empty(into[1].shape, dtype=torch.float64)
    for own, causal, (q, o, l), (k, v) in _local_heads(layout, (query, out, lse), (key, value)):
        l.copy_(_attend(_wide(q), _wide(k[own]), _wide(v[own]), causal, settings, known, into=o)[1])
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
    hidden = _Diagonal(layout.width, query.device).later() if layout.tile is None else None
    grad_query = torch.empty_like(query, dtype=delta.dtype)
    grad_key, grad_value = (torch.zeros_like(x, dtype=delta.dtype) for x in (key, value))
    per_query = (query, grad_query, grad, lse, delta) if rest is None else (query, grad_query, grad, lse, delta, rest)
    per_key = (key, value, grad_key, grad_value)
    for own, causal, (q, dq, *upstream), (k, v, dk, dv) in _local_heads(layout, per_query, per_key):
        upstream, later = _upstream(*upstream), causal.later() if hidden is None else hidden
        part, part_k, part_v = _attend_backward(_wide(q), _wide(k[own]), _wide(v[own]), *upstream, later, settings, safe)
        dq.copy_(part)
        for total, added in ((dk, part_k), (dv, part_v)):
            if isinstance(own, slice):
                total[own] += added
            else:
                total.index_add_(0, own, added)
    return grad_query, grad_key, grad_value


def _upstream(grad: Tensor, lse: Tensor, delta: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return _wide(grad), lse, delta, rest


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
    first = first.tolist()
    return Routes(order[: first[-1]] // chosen.shape[-1], first)


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
    known: _Range,
    into: tuple[Tensor, Tensor],
) -> None:
    """What queries read along `routes`, added to an output `[B, H, N, Dv]` and its log-sum-exp `[B, H, N]`, written `into` such.

    Merging block after block keeps no partial output: they would be `top_k` times the size of the output.
    """
    operands = (out, lse, query, key, value, routes, layout, settings, known, into)
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
    known: _Range,
    into: tuple[Tensor, Tensor],
) -> bool:
    """Softmax weights relative to one number a query, so that blocks add up and nothing has to be rescaled.

    That number is 0 if no score can be large, and else the local call's log-sum-exp. False, and nothing done, if something is too large
    even so: a score some 80 above it (float32), infinity or NaN. A score far below is no matter, since its weight is nothing beside
    the local call's 1.
    """
    if not known.safe:
        return False
    small, dtype = known.small, wide(query.dtype)
    q = _wide(query).flatten(0, 2)
    k, v = (x.unflatten(2, (-1, layout.width)).flatten(0, 2) for x in (key, value))
    relative = None if small else lse.to(dtype).flatten()
    total = (lse if small else lse - relative.view(lse.shape)).to(dtype).exp().flatten()  # 1, but for rounding
    share = total.view(lse.shape)[..., None]
    whole = out.mul_(share) if small else out * share
    sums = whole.flatten(0, 2)
    # The same memory for every block, so that it stays in the cache.
    most_rows = -(-routes.most_rows // _TILES) * _TILES
    kept = [total.new_zeros(most_rows, n) for n in (q.shape[1], layout.width, value.shape[-1])]
    for block, queries in _routed_parts(routes):
        n, tile = len(queries), -(-len(queries) // _TILES)
        row_query, weight, part = (x[: tile * _TILES] for x in kept)  # rows after n: of an earlier block, for nothing
        in_tiles = [x.view(_TILES, tile, -1) for x in (row_query, weight, part)]
        torch.index_select(q, 0, queries, out=row_query[:n])
        block_key, block_value = _wide(k[block]) * settings.scale, _wide(v[block])  # only of blocks that are read
        torch.bmm(in_tiles[0], block_key.mT.expand(_TILES, -1, -1), out=in_tiles[1])
        _cap(weight, settings)
        if relative is not None:
            weight[:n] -= relative.index_select(0, queries)[:, None]
        total.index_add_(0, queries, weight.exp_().sum(-1)[:n])
        torch.bmm(in_tiles[1], block_value.expand(_TILES, -1, -1), out=in_tiles[2])
        sums.index_add_(0, queries, part[:n])
    if not small and not all(math.isfinite(bound) for x in (total, sums) for bound in torch.aminmax(x)):
        return False
    total = total.view(lse.shape)
    torch.div(whole, total[..., None], out=into[0])
    into[1].copy_(total.log_() if small else total.log_().add_(relative.view(lse.shape)))
    return True


def _range_of(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> _Range:
    """`small`: sums of values weighted with `exp(score)` stay far from float32's limits too. A product is at most that of the lengths."""
    lengths = [float(torch.linalg.vector_norm(x, dim=-1, dtype=wide(x.dtype)).max()) for x in (query, key)]
    score, values = lengths[0] * lengths[1] * abs(settings.scale), _largest(value) * key.shape[2]
    safe = max(score, lengths[0] * lengths[1], lengths[1] * abs(settings.scale)) < _SAFE and values < _SAFE  # False for NaN
    return _Range(safe and score < _SMALL_SCORE and values < _SMALL_SUM, safe)


def _largest(x: Tensor) -> float:
    return max(abs(float(bound)) for bound in torch.aminmax(x)) if x.numel() else 0.0


def _merge_one_by_one(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
    known: _Range,
    into: tuple[Tensor, Tensor],
) -> None:
    """The same for any scores: each block's output is a softmax of its own, merged with what came before it."""
    lse = lse.double()
    q, total, sums = query.flatten(0, 2), lse.flatten(), out.flatten(0, 2)
    k, v, known = key.flatten(0, 2), value.flatten(0, 2), _Range(False, known.safe)
    for queries, keys in _routed_keys(routes, layout, key.shape[1]):
        part, part_lse = _attend(_wide(q.index_select(0, queries)), _wide(k[keys]), _wide(v[keys]), None, settings, known)
        before, part_lse = total.index_select(0, queries), part_lse.to(total.dtype)
        share = torch.sigmoid(part_lse - before)[:, None].to(part.dtype)  # of the block in the sum of both
        old = sums.index_select(0, queries)
        merged = torch.where(before[:, None] == -torch.inf, part, torch.lerp(old, part, share))
        sums.index_copy_(0, queries, torch.where((part_lse == -torch.inf)[:, None], old, merged))
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
    safe = _backward_is_safe(*(_largest(x) for x in (query, key, value, grad, delta)), query.shape[-1], value.shape[-1], settings)
    rest = None
    if not safe or _largest(torch.where(lse.isfinite(), lse, 0)) * torch.finfo(lse.dtype).eps > _ROUNDED:
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
        for queries, keys in _routed_keys(routes, layout, key.shape[1]):
            q, *upstream = (x.index_select(0, queries) for x in per_query)
            part, part_k, part_v = _attend_backward(_wide(q), _wide(k[keys]), _wide(v[keys]), *_upstream(*upstream), None, settings, safe)
            dq.index_add_(0, queries, part)
            dk[keys] += part_k
            dv[keys] += part_v
    write(local, into)


def _slots_without_a_query(layout: BlockLayout) -> Tensor:
    """`[B, 1, Q * P]`. Their gradients are 0, which times NaN is NaN."""
    slot = torch.arange(layout.query_width, device=layout.own.device)
    return ((slot < layout.query_start[..., None]) | (slot >= layout.query_stop[..., None])).flatten(1)[:, None]


def _backward_is_safe(
    query: float, key: float, value: float, grad: float, delta: float, width: int, value_width: int, settings: AttentionSettings
) -> bool:
    """Whether nothing overflows, given the largest of all numbers. False for NaN."""
    products = query * key * width, query * key * width * abs(settings.scale), key * abs(settings.scale), grad * value * value_width + delta
    return all(x < _SAFE for x in products)


def _log_sum_exp(
    query: Tensor, key: Tensor, routes: Routes | None, layout: BlockLayout, settings: AttentionSettings, safe: bool
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp `[B, H, N]` over all blocks of a query as a large and a small number, of the very scores that backward computes."""
    known = _Range(False, safe)
    most = torch.full(query.shape[:3], -torch.inf, dtype=_wide(query[:0]).dtype, device=query.device)
    rest = torch.zeros_like(most)
    for own, causal, (q, m, r), (k,) in _local_heads(layout, (query, most, rest), (key,)) if settings.causal else ():
        _, total, part = _weights(_wide(q), _wide(k[own]), causal, settings, known)
        m.copy_(part.squeeze(-1))
        r.copy_(total.squeeze(-1).log_())
    if routes is not None:
        q, k, all_most, all_rest = query.flatten(0, 2), key.flatten(0, 2), most.flatten(), rest.flatten()
        for queries, keys in _routed_keys(routes, layout, key.shape[1]):
            _, total, part = _weights(_wide(q.index_select(0, queries)), _wide(k[keys]), None, settings, known)
            before, part = all_most.index_select(0, queries), part.squeeze(-1)
            above = torch.maximum(before, part)
            sums = (before - above) + all_rest.index_select(0, queries), (part - above) + total.squeeze(-1).log_()
            all_most.index_copy_(0, queries, above)
            all_rest.index_copy_(0, queries, torch.logaddexp(*sums))
    return most, rest
