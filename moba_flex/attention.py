"""How it works: read this file first.

Queries are sent to key blocks as a mixture of experts sends tokens to experts, in four steps:

1. gate    which past blocks each query reads (mean of a block's keys, inner product, top-k);
2. route   every (query, chosen block) pair is a row; rows are ordered by block, so that each tile of them meets one whole block;
3. attend  causal attention of queries to their own block, which is known without looking at data, and of rows to their block;
4. merge   a query's output is the softmax-weighted sum of its partial outputs, by their log-sum-exps.

The steps come from a backend, `backends/eager.py` (any device) or `backends/flex.py` (CUDA); `backends/protocol.py` says what each must
do, and steps 3 and 4 are its `attend`. Here they are put together and worked through in pieces of a bounded size. `operator.py` makes
one differentiable operator of them; `backends/paths.py` decides which calls come here at all.

B rows, H query heads, G key heads, N tokens, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, D width.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .backends import backend_of
from .backends.protocol import Backend
from .core.chunking import Piece, chunks, launches, pieces
from .core.dtypes import wide
from .core.layout import BlockLayout
from .core.settings import AttentionSettings
from .core.side_by_side import one_thread, side_by_side
from .core.strides import empty_with_strides_of, keep_strides
from .ops.routing import Routes
from .ops.rows import write

HEAD_BY_HEAD_FROM = 1 << 18  # elements of a query
_ONE_THREAD_BELOW = 1 << 27  # products of elements of a query with keys: beside a busy program two threads took up to 90 times as long


@torch.no_grad()
def forward(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, Nq, Dv]`, log-sum-exp `[B, H, Nq]` and the chosen blocks `[B, H, Q * P, S]`."""
    backend = backend_of(settings)
    with one_thread(_is_small(query, key, settings, backend)):
        return _forward(query, key, value, layout, settings, backend)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    q = query_slots(query, layout, backend)
    k, v = layout.key_slots(key).contiguous(), layout.key_slots(value).contiguous()
    plan = planned_pieces(q, k, v, layout, settings, backend)

    chosen = gate(q, k, layout, settings, backend)
    out, lse = empty_with_strides_of(q, q.shape[2], v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))

    def attend(piece: Piece) -> None:
        rows, groups, heads, blocks = piece[:4]
        part, at = layout.part(rows, blocks), (rows, heads, layout.slots(blocks))
        operands, into = (q[at], k[rows, groups], v[rows, groups]), (out[at], lse[at])
        routes = route(chosen[at], operands[1], blocks, layout, settings, backend)
        backend.attend(*operands, routes, part, settings, into)

    for _ in side_by_side(attend, plan, q.device):
        pass
    return layout.query_tokens(out), layout.query_tokens(lse, fill=-torch.inf), chosen


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
    """Gradients of query, key and value. Rows are routed again, chunk by chunk, and come back by gathering too."""
    backend = backend_of(settings)
    with one_thread(_is_small(query, key, settings, backend)):
        return _backward(grad, grad_lse, query, key, value, out, lse, chosen, layout, settings, backend)


def _backward(
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
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = keep_strides(grad) if backend.READS_STRIDES else grad.contiguous()
    delta = backend.delta(out, grad, grad_lse)
    q, grad = (query_slots(x, layout, backend) for x in (query, grad))
    k, v, lse, delta = (x.contiguous() for x in (layout.key_slots(key), layout.key_slots(value), *map(layout.query_slots, (lse, delta))))
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    plan = planned_pieces(q, k, v, layout, settings, backend)

    def differentiate(piece: Piece) -> tuple[Tensor, Tensor]:
        rows, groups, heads, blocks = piece[:4]
        part, at = layout.part(rows, blocks), (rows, heads, layout.slots(blocks))
        operands = (q[at], k[rows, groups], v[rows, groups], grad[at], lse[at], delta[at])
        into = grad_k[rows, groups], grad_v[rows, groups]
        if not piece.alone:
            into = empty(into[0]), empty(into[1])
        routes = route(chosen[at], operands[1], blocks, layout, settings, backend)
        backend.backward(*operands, routes, part, settings, (grad_q[at], *into))
        return into

    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, dtype=wide(x.dtype) if backend.HEAD_BY_HEAD else x.dtype)

    totals: tuple[Tensor, ...] = ()
    for of_keys, piece in zip(side_by_side(differentiate, plan, q.device), plan):
        if piece.alone:
            continue
        places = (grad_k[piece.rows, piece.groups], grad_v[piece.rows, piece.groups])
        if piece.is_first:  # the gradients of a key are then a sum over pieces, always in this order, in float32 at least
            totals = tuple(torch.zeros_like(x, dtype=wide(x.dtype)) for x in places)
        for total, x in zip(totals, of_keys):
            total += x
        if piece.is_last:
            write(totals, places)
    return layout.query_tokens(grad_q), layout.key_tokens(grad_k), layout.key_tokens(grad_v)


def query_slots(x: Tensor, layout: BlockLayout, backend: Backend) -> Tensor:
    """`[B, H, Nq, D]` -> `[B, H, Q * P, D]`, not copied where the backend can read it as it is."""
    return keep_strides(layout.query_slots(x, keep_strides=True)) if backend.READS_STRIDES else layout.query_slots(x).contiguous()


def gate(query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend) -> Tensor:
    """Step 1: the chosen blocks `[B, H, Q * P, S]` int32 of every head, or of every group of heads with `share_selection`.

    The sum of a group's scores is the score of the sum of its queries.
    """
    repeats = query.shape[1] // key.shape[1] if settings.share_selection else 1
    if settings.share_selection:
        query = query.unflatten(1, (-1, repeats)).sum(2, dtype=wide(query.dtype))
    every = slice(0, layout.n_query_blocks)
    if _head_by_head(query, backend):
        ratio = query.shape[1] // key.shape[1]
        some = [(slice(b, b + 1), slice(h, h + 1), slice(h // ratio, h // ratio + 1)) for b, h in product(*map(range, query.shape[:2]))]
    else:
        some = [(rows, slice(None), slice(None)) for rows in launches(*query.shape[:2])]

    def choose(piece: tuple[slice, slice, slice]) -> Tensor:
        rows, heads, groups = piece
        return backend.choose(query[rows, heads], key[rows, groups], layout.part(rows, every), settings)

    parts = list(side_by_side(choose, some, query.device))
    chosen = parts[0] if len(parts) == 1 else torch.cat(parts).view(*query.shape[:3], -1)
    return chosen.repeat_interleave(repeats, 1) if settings.share_selection else chosen


def route(chosen: Tensor, key: Tensor, blocks: slice, layout: BlockLayout, settings: AttentionSettings, backend: Backend) -> Routes | None:
    """Step 2: a row for each pair of `chosen [B, H, *, S]`, which are those of the query blocks `blocks`; None if there can be no pair."""
    pairs = chosen.shape[0] * chosen.shape[1] * layout.max_pairs(settings.n_routed, settings.causal, blocks)
    return backend.route(chosen, key.shape[1], layout.n_key_blocks, pairs) if pairs else None


def planned_pieces(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings, backend: Backend
) -> list[Piece]:
    """The pieces of a call, worked out once for all calls with the same layout and shapes."""
    most, alone = backend.MAX_TENSOR_ELEMENTS, _head_by_head(query, backend)
    name = ("pieces", query.shape, key.shape[1], value.shape[-1], query.dtype, settings.n_routed, settings.working_memory, most, alone)
    return layout.cached(name, lambda: pieces(chunks(query, key, value, layout, settings, most, alone)))


def _head_by_head(query: Tensor, backend: Backend) -> bool:
    """Whether each query head is a piece of its own. Small calls are sooner done in one."""
    return backend.HEAD_BY_HEAD and query.numel() >= HEAD_BY_HEAD_FROM


def _is_small(query: Tensor, key: Tensor, settings: AttentionSettings, backend: Backend) -> bool:
    """Whether one thread is to compute the whole call, which is many operations too small to wait for others at the end of each."""
    if not (backend.HEAD_BY_HEAD and max(query.numel(), key.numel()) < HEAD_BY_HEAD_FROM):
        return False
    return query.numel() * min(key.shape[2], settings.block_size * settings.top_k) < _ONE_THREAD_BELOW
