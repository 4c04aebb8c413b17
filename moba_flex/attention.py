"""The algorithm: read this file first.

Queries are sent to key blocks as a mixture of experts sends tokens to experts, in four steps:

1. gate    choose the past blocks that each query reads (mean key per block, inner product, top-k);
2. route   make one row per (query, chosen block) pair, and sort rows by block, so that each tile of rows reads one whole block;
3. attend  causal attention of queries to their own block, which is known without reading data, and of rows to their block;
4. merge   sum the partial outputs of a query, weighted by the softmax of their log-sum-exps.

A backend implements the steps: `backends/eager.py` (any device), `backends/flex.py` or `backends/triton.py` (CUDA). The interface is
`backends/protocol.py`, whose `attend` is steps 3 and 4. With few blocks on a GPU, `backends/dense_mask.py` replaces steps 2 to 4. This file
combines the steps, and splits a call into pieces of bounded size. `operator.py` makes it a differentiable operator; `backends/paths.py`
decides which calls get here.

B batch, H query heads, G key heads, N tokens, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from .backends import backend_of, dense_mask, paths
from .backends.protocol import Backend
from .core.chunking import Piece, chunks, launches, pieces
from .core.dtypes import accumulation_dtype
from .core.layout import BlockLayout
from .core.parallel import parallel_map
from .core.settings import AttentionSettings
from .core.strides import empty_with_strides_of, keep_strides, last_dim_contiguous
from .ops.routing import Routes
from .ops.rows import copy_into

HEAD_BY_HEAD_FROM = 1 << 18  # elements of the query tensor
_ONE_THREAD_BELOW = 1 << 27  # multiply-adds of query @ key.mT; next to a busy program two threads took up to 90 times as long


@torch.no_grad()
def forward(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, Nq, Dv]`, log-sum-exp `[B, H, Nq]` and the chosen blocks `[B, H, Q * P, S]`."""
    backend = backend_of(settings)
    plan, in_place, operand_layout = planned(query, key, value, layout, settings, backend, backward=False)
    q = placed_queries(query, layout, backend, in_place)
    k, v = (placed_keys(x, layout, backend, in_place) for x in (key, value))

    chosen = gate(q, k, operand_layout, settings, backend)
    of_layout = layout.block_size, layout.n_key_blocks, layout.tile is not None
    if paths.dense_mask_obstacle(query, key, value, settings, *of_layout) is None:
        out, lse = dense_mask.attend(q, k, v, chosen, operand_layout, settings)
        return *_in_tokens(out, lse, query, layout, backend, in_place), chosen
    out = empty_with_strides_of(q, q.shape[2], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    if in_place and not layout.covers:
        out.zero_()
        lse.fill_(-torch.inf)

    def compute(piece: Piece) -> None:
        rows, groups, heads, blocks = piece[:4]
        part, slots = operand_layout.part(rows, blocks), layout.slots(blocks)
        at = rows, heads, slice(None) if in_place else slots
        operands, into = (q[at], k[rows, groups], v[rows, groups]), (out[at], lse[at])
        routes = route(chosen[rows, heads, slots], operands[1], blocks, layout, settings, backend)
        backend.attend(*operands, routes, part, settings, into)

    for _ in parallel_map(compute, plan, q.device):
        pass
    return *_in_tokens(out, lse, query, layout, backend, in_place), chosen


def _in_tokens(out: Tensor, lse: Tensor, query: Tensor, layout: BlockLayout, backend: Backend, in_place: bool) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of a forward pass as tokens, with the strides of the query."""
    if in_place:
        return out, lse
    like = query if backend.READS_STRIDES else None
    return layout.query_tokens(out, like=like), layout.query_tokens(lse, fill=-torch.inf)


@torch.no_grad()
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    layout: BlockLayout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Routes are recomputed from `chosen`, piece by piece."""
    backend = backend_of(settings)
    grad = last_dim_contiguous(grad)
    delta = backend.delta(out, grad, grad_lse)
    plan, in_place, operand_layout = planned(query, key, value, layout, settings, backend, backward=True)
    q, grad = (placed_queries(x, layout, backend, in_place) for x in (query, grad))
    k, v = (placed_keys(x, layout, backend, in_place) for x in (key, value))
    lse, delta = (x.contiguous() if in_place else layout.query_slots(x).contiguous() for x in (lse, delta))
    grad_q, grad_k, grad_v = (empty_with_strides_of(x, *x.shape[2:]) for x in (q, k, v))
    if in_place and not layout.covers:
        for x in (grad_q, grad_k, grad_v):
            x.zero_()

    def differentiate(piece: Piece) -> tuple[Tensor, Tensor]:
        rows, groups, heads, blocks = piece[:4]
        part, slots = operand_layout.part(rows, blocks), layout.slots(blocks)
        at = rows, heads, slice(None) if in_place else slots
        operands = (q[at], k[rows, groups], v[rows, groups], grad[at], lse[at], delta[at])
        into = grad_k[rows, groups], grad_v[rows, groups]
        if not piece.alone:
            into = empty(into[0]), empty(into[1])
        routes = route(chosen[rows, heads, slots], operands[1], blocks, layout, settings, backend)
        backend.backward(*operands, routes, part, settings, (grad_q[at], *into))
        return into

    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, dtype=accumulation_dtype(x.dtype) if backend.HEAD_BY_HEAD else x.dtype)

    totals: tuple[Tensor, ...] = ()
    for of_keys, piece in zip(parallel_map(differentiate, plan, q.device), plan):
        if piece.alone:
            continue
        sums = (grad_k[piece.rows, piece.groups], grad_v[piece.rows, piece.groups])
        if piece.is_first:  # a key's gradient is then a sum over pieces, always in this order, in at least float32
            totals = tuple(torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in sums)
        for total, x in zip(totals, of_keys):
            total += x
        if piece.is_last:
            copy_into(totals, sums)
    if in_place:
        return grad_q, grad_k, grad_v
    of_query, of_key, of_value = (query, key, value) if backend.READS_STRIDES else (None, None, None)
    return layout.query_tokens(grad_q, like=of_query), layout.key_tokens(grad_k, of_key), layout.key_tokens(grad_v, of_value)


def placed_queries(x: Tensor, layout: BlockLayout, backend: Backend, in_place: bool) -> Tensor:
    """`[B, H, Nq, D]` in its original layout, or in slots `[B, H, Q * P, D]`. Copied only if the backend cannot read its strides."""
    return last_dim_contiguous(x) if in_place else _slots_read(layout.query_slots, x, backend)


def placed_keys(x: Tensor, layout: BlockLayout, backend: Backend, in_place: bool) -> Tensor:
    """`[B, G, Nk, D]` in its original layout, or in slots `[B, G, C * P, D]`. Copied as in `placed_queries`."""
    return last_dim_contiguous(x) if in_place else _slots_read(layout.key_slots, x, backend)


def _slots_read(slots: Callable[[Tensor, bool], Tensor], x: Tensor, backend: Backend) -> Tensor:
    x = slots(x, backend.READS_STRIDES)
    return keep_strides(x) if backend.READS_STRIDES else x.contiguous()


def gate(query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend) -> Tensor:
    """Step 1: the chosen blocks `[B, H, Q * P, S]` int32. With `share_selection`, all query heads of a key head have the same ones.

    The sum of a group's scores equals the score of the sum of its queries.
    """
    repeats = query.shape[1] // key.shape[1] if settings.share_selection else 1
    if settings.share_selection:
        query = query.unflatten(1, (-1, repeats)).sum(2, dtype=accumulation_dtype(query.dtype))
    every = slice(0, layout.n_query_blocks)
    if _head_by_head(query, layout, backend):
        ratio = query.shape[1] // key.shape[1]
        some = [(slice(b, b + 1), slice(h, h + 1), slice(h // ratio, h // ratio + 1)) for b, h in product(*map(range, query.shape[:2]))]
    else:
        some = [(rows, slice(None), slice(None)) for rows in launches(*query.shape[:2])]

    def choose(piece: tuple[slice, slice, slice]) -> Tensor:
        rows, heads, groups = piece
        return backend.choose(query[rows, heads], key[rows, groups], layout.part(rows, every), settings)

    parts = list(parallel_map(choose, some, query.device))
    chosen = parts[0] if len(parts) == 1 else torch.cat(parts).view(*query.shape[:3], -1)
    return chosen.repeat_interleave(repeats, 1) if settings.share_selection else chosen


def route(chosen: Tensor, key: Tensor, blocks: slice, layout: BlockLayout, settings: AttentionSettings, backend: Backend) -> Routes | None:
    """Step 2: one row per pair of `chosen [B, H, *, S]`, which covers the query blocks `blocks`. None if no pair is possible."""
    pairs = chosen.shape[0] * chosen.shape[1] * layout.max_pairs(settings.n_routed, settings.causal, blocks)
    return backend.route(chosen, key.shape[1], layout.n_key_blocks, pairs) if pairs else None


def planned(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend, backward: bool
) -> tuple[list[Piece], bool, BlockLayout]:
    """The pieces of a pass, whether they read tokens in place, and the layout of the tensors that they read."""
    plan = planned_pieces(query, key, value, layout, settings, backend, backward)
    in_whole_rows = all(piece.blocks == slice(0, layout.n_query_blocks) for piece in plan)  # in place, some blocks are not a slice
    in_place = backend.reads_tokens(query, value, layout, backward) and in_whole_rows
    return plan, in_place, layout if in_place else layout.in_slots()


def planned_pieces(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend, backward: bool
) -> list[Piece]:
    """The pieces of a pass, computed once per layout, shapes and settings."""
    numbers = backend.elements_per_row(query, value, layout, backward)
    how = backend.MAX_TENSOR_ELEMENTS, numbers, _head_by_head(query, layout, backend)
    name = ("pieces", query.shape, key.shape[1], value.shape[-1], query.dtype, settings.n_routed, settings.working_memory, *how)
    return layout.cached(name, lambda: pieces(chunks(query, key, value, layout, settings, *how)))


def _head_by_head(query: Tensor, layout: BlockLayout, backend: Backend) -> bool:
    """Whether each query head is a piece of its own. Small calls are faster as one piece."""
    slots = layout.n_query_blocks * layout.query_width
    return backend.HEAD_BY_HEAD and query.shape[0] * query.shape[1] * slots * query.shape[-1] >= HEAD_BY_HEAD_FROM


def is_small(query: Tensor, key: Tensor, settings: AttentionSettings) -> bool:
    """Whether one thread should compute the whole call, whose operations are too small to synchronize threads after each of them."""
    if not (backend_of(settings).HEAD_BY_HEAD and max(query.numel(), key.numel()) < HEAD_BY_HEAD_FROM):
        return False
    return query.numel() * min(key.shape[2], settings.block_size * settings.top_k) < _ONE_THREAD_BELOW
