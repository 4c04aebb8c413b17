"""The routed rows of the eager backend: which queries read which block, and the merge of what they read there with the local output.

B batch, H query heads, G key heads, N queries, C key blocks, P slots per block, S chosen blocks, D and Dv head dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops.routing import order_pairs
from ..ops.rows import copy_into
from .eager_softmax import ValueRange, softmax_attention, upcast

_ROWS_AT_ONCE = 8192
_TILES = 8  # per block: a batched product uses cores better than one large product


@dataclass(frozen=True, eq=False)
class Routes:
    """The queries of each block: those of block i are `queries[first[i] : first[i + 1]]`, without duplicates."""

    queries: Tensor  # [pairs] int64, `(b * H + h) * N + n`
    first: list[int]

    @property
    def most_rows(self) -> int:
        """The maximum number of queries that are processed at a time."""
        return min(_ROWS_AT_ONCE, max((stop - start for start, stop in itertools.pairwise(self.first)), default=0))


def route(chosen: Tensor, groups: int, n_blocks: int, max_pairs: int) -> Routes:
    """The pairs of `chosen [B, H, N, S]`, sorted by block. Their number is read from the device, so no bound is needed."""
    _, order, starts = order_pairs(chosen, groups, n_blocks)
    first = starts.tolist()
    return Routes(order[: first[-1]] // chosen.shape[-1], first)


def _routed_parts(routes: Routes) -> Iterator[tuple[int, Tensor]]:
    """Yields each chosen block with its queries, at most `_ROWS_AT_ONCE` at a time."""
    sizes = [stop - start for start, stop in itertools.pairwise(routes.first)]
    for block, queries in enumerate(routes.queries.split(sizes)):
        for part in queries.split(_ROWS_AT_ONCE) if len(queries) else ():
            yield block, part


def routed_keys(routes: Routes, layout: BlockLayout, groups: int) -> Iterator[tuple[Tensor, slice]]:
    """Yields the queries of each chosen block, and the slice of its real keys in `[B * G * C * P]`."""
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
    known: ValueRange,
    into: tuple[Tensor, Tensor],
) -> None:
    """Merges what queries read along `routes` with `out [B, H, N, Dv]` and `lse [B, H, N]`. Writes the result to `into`.

    Merging block by block stores no partial outputs, which would be `top_k` times the size of the output.
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
    known: ValueRange,
    into: tuple[Tensor, Tensor],
) -> bool:
    """`merge_routed` with softmax weights relative to one reference per query, so that blocks are summed without rescaling.

    The reference is 0 if no score can be large, else the local call's log-sum-exp. Returns False and writes nothing if a value is too
    large even so: a score some 80 above the reference (float32), infinity or NaN. A score far below it does no harm: its weight is
    negligible next to the local call's 1.
    """
    if not known.safe:
        return False
    dtype = accumulation_dtype(query.dtype)
    q = upcast(query).flatten(0, 2)
    k, v = (x.unflatten(2, (-1, layout.width)).flatten(0, 2) for x in (key, value))
    relative = None if known.small else lse.to(dtype).flatten()
    total = (lse if relative is None else lse - relative.view(lse.shape)).to(dtype).exp().flatten()  # 1 up to rounding
    share = total.view(lse.shape)[..., None]
    whole = out.mul_(share) if known.small else out * share
    sums = whole.flatten(0, 2)
    # All blocks use the same memory, so that it stays in the cache.
    most_rows = -(-routes.most_rows // _TILES) * _TILES
    kept = [total.new_zeros(most_rows, n) for n in (q.shape[1], layout.width, value.shape[-1])]
    for block, queries in _routed_parts(routes):
        n, tile = len(queries), -(-len(queries) // _TILES)
        row_query, weight, part = (x[: tile * _TILES] for x in kept)  # rows after n: stale, and not used
        in_tiles = [x.view(_TILES, tile, -1) for x in (row_query, weight, part)]
        torch.index_select(q, 0, queries, out=row_query[:n])
        block_key, block_value = upcast(k[block]) * settings.scale, upcast(v[block])  # only for blocks that are read
        torch.bmm(in_tiles[0], block_key.mT.expand(_TILES, -1, -1), out=in_tiles[1])
        settings.cap_(weight)
        if relative is not None:
            weight[:n] -= relative.index_select(0, queries)[:, None]
        total.index_add_(0, queries, weight.exp_().sum(-1)[:n])
        torch.bmm(in_tiles[1], block_value.expand(_TILES, -1, -1), out=in_tiles[2])
        sums.index_add_(0, queries, part[:n])
    if not known.small and not all(math.isfinite(bound) for x in (total, sums) for bound in torch.aminmax(x)):
        return False
    total = total.view(lse.shape)
    torch.div(whole, total[..., None], out=into[0])
    into[1].copy_(total.log_() if relative is None else total.log_().add_(relative.view(lse.shape)))
    return True


def _merge_one_by_one(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
    known: ValueRange,
    into: tuple[Tensor, Tensor],
) -> None:
    """`merge_routed` for any scores: each block's output has its own softmax, and is merged with the result so far."""
    lse = lse.double()
    q, total, sums = query.flatten(0, 2), lse.flatten(), out.flatten(0, 2)
    k, v, known = key.flatten(0, 2), value.flatten(0, 2), ValueRange(False, known.safe)
    for queries, keys in routed_keys(routes, layout, key.shape[1]):
        part, part_lse = softmax_attention(upcast(q.index_select(0, queries)), upcast(k[keys]), upcast(v[keys]), None, settings, known)
        before, part_lse = total.index_select(0, queries), part_lse.to(total.dtype)
        share = torch.sigmoid(part_lse - before)[:, None].to(part.dtype)  # of the block in the merged softmax
        old = sums.index_select(0, queries)
        merged = torch.where(before[:, None] == -torch.inf, part, torch.lerp(old, part, share))
        sums.index_copy_(0, queries, torch.where((part_lse == -torch.inf)[:, None], old, merged))
        total.index_copy_(0, queries, torch.logaddexp(before, part_lse))
    copy_into((out, lse), into)
