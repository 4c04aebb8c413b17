"""How it works: read this file first.

Queries are sent to key blocks as a mixture of experts sends tokens to experts, in four steps:

1. `choose`  the gate: which past blocks each query reads (mean of a block's keys, inner product, top-k);
2. `local`   causal attention to the query's own block: known without looking at data;
3. `route`   every (query, chosen block) pair is a row; rows are ordered by block, so that each tile of them meets one whole block;
4. `merge_routed`   attention of the rows; a query's output is the softmax-weighted sum of its partial outputs, by their
   log-sum-exps.

The steps come from a backend, `eager` (any device) or `flex` (CUDA), each a module with the same function names. Here they are put
together, worked through in chunks of a bounded size, and made one differentiable operator that torch.compile sees as a whole. For a short
prompt the last three are one dense call under a mask: `masked.py` says where. Small calls whose shape keeps coming are launched as a
whole: `cache.py`.

B rows, H query heads, G key heads, N tokens, Q query blocks, C key blocks, P slots a block, S chosen blocks a query, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .backends import eager, flex
from .backends.dense_mask import few_blocks
from .core.autocast import without_autocast
from .core.chunking import Chunk, chunks, launches
from .core.layout import BlockLayout, dense_layout, one_block, packed_layout, padded_layout, slots_per_block
from .core.settings import AttentionSettings
from .core.strides import empty_with_strides_of, keep_strides
from .cuda_graphs import cache
from .ops.rows import write

_BACKENDS: dict[str, ModuleType] = {"eager": eager, "flex": flex}


@torch.no_grad()
def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: AttentionSettings, backend: ModuleType, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, Nq, Dv]`, log-sum-exp `[B, H, Nq]` and the chosen blocks `[B, H, Q * P, S]`."""
    if masks(query, key, value, layout, spec, backend):
        query, key, value = (keep_strides(x) for x in (query, key, value))
        chosen = choose(layout.query_slots(query), layout.key_slots(key), layout, spec, backend)
        return *backend.masked(query, key, value, chosen, layout, spec), chosen

    q = keep_strides(layout.query_slots(query, keep_strides=True)) if backend is flex else layout.query_slots(query).contiguous()
    k, v = layout.key_slots(key).contiguous(), layout.key_slots(value).contiguous()
    plan = planned(q, k, v, layout, spec, budget, backend.MAX_TENSOR_ELEMENTS)
    chosen = choose(q, k, layout, spec, backend)

    out, lse = empty_with_strides_of(q, q.shape[2], v.shape[-1]), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))
    for rows, groups, parts in plan:
        for heads, blocks in parts:
            part, at = layout.part(rows, blocks), (rows, heads, layout.slots(blocks))
            operands, into = (q[at], k[rows, groups], v[rows, groups]), (out[at], lse[at])
            local = backend.local if spec.causal else nothing_local
            partial = local(*operands, part, spec, into)
            if pairs := max_pairs(operands[0], layout, blocks, spec):
                routes = backend.route(chosen[at], operands[1].shape[1], layout.n_key_blocks, pairs)
                backend.merge_routed(*partial, *operands, routes, part, spec, into)
            else:
                write(partial, into)
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
    spec: AttentionSettings,
    backend: ModuleType,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Rows are gathered again, chunk by chunk, and come back by gathering too."""
    grad = grad.contiguous()
    delta = backend.delta(out, grad, grad_lse)
    if masks(query, key, value, layout, spec, backend):
        query, key, value = (x.contiguous() for x in (query, key, value))
        return backend.masked_backward(query, key, value, grad, lse, delta, chosen, layout, spec)

    q, k, v = (x.contiguous() for x in (layout.query_slots(query), layout.key_slots(key), layout.key_slots(value)))
    grad, lse, delta = (layout.query_slots(x).contiguous() for x in (grad, lse, delta))

    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, groups, parts in planned(q, k, v, layout, spec, budget, backend.MAX_TENSOR_ELEMENTS):
        of_keys, totals = (grad_k[rows, groups], grad_v[rows, groups]), None
        if len(parts) > 1:  # the gradients of a key are then a sum over parts, in float32 at least
            totals = tuple(torch.zeros_like(x, dtype=_wide(x.dtype)) for x in of_keys)
        for heads, blocks in parts:
            part, at = layout.part(rows, blocks), (rows, heads, layout.slots(blocks))
            operands, into = (q[at], k[rows, groups], v[rows, groups], *(x[at] for x in (grad, lse, delta))), (grad_q[at], *of_keys)
            local_backward = backend.local_backward if spec.causal else nothing_local_backward
            partial = local_backward(*operands, part, spec)
            if pairs := max_pairs(operands[0], layout, blocks, spec):
                routes = backend.route(chosen[at], operands[1].shape[1], layout.n_key_blocks, pairs)
                backend.merge_routed_backward(partial, *operands, routes, part, spec, into)
            else:
                write(partial, into)
            for total, x in zip(totals or (), of_keys):
                total += x
        if totals is not None:
            write(totals, of_keys)
    return layout.query_tokens(grad_q), layout.key_tokens(grad_k), layout.key_tokens(grad_v)


def choose(query: Tensor, key: Tensor, layout: BlockLayout, spec: AttentionSettings, backend: ModuleType) -> Tensor:
    """The gate of every head, or of every group of heads: the sum of scores is the score of the sum of the queries."""
    repeats = query.shape[1] // key.shape[1] if spec.share_selection else 1
    if spec.share_selection:
        query = query.unflatten(1, (-1, repeats)).sum(2, dtype=_wide(query.dtype))
    some, every = launches(*query.shape[:2]), slice(0, layout.n_query_blocks)
    if len(some) == 1:
        chosen = backend.choose(query, key, layout, spec)
    else:
        chosen = torch.cat([backend.choose(query[rows], key[rows], layout.part(rows, every), spec) for rows in some])
    return chosen.repeat_interleave(repeats, 1) if spec.share_selection else chosen


def masks(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: AttentionSettings, backend: ModuleType) -> bool:
    """Whether steps 2 to 4 are one dense call under a mask. Shapes alone decide."""
    return backend is flex and layout.dense and few_blocks(query, key, value, spec)


def planned(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: AttentionSettings, budget: int, reach: int
) -> list[Chunk]:
    """The chunks of a call, worked out once for all calls with the same layout and shapes."""
    name = ("chunks", query.shape, key.shape[1], value.shape[-1], query.dtype, spec.routed, budget, reach)
    return layout.cached(name, lambda: list(chunks(query, key, value, layout, spec, budget, reach)))


def nothing_local(query: Tensor, key: Tensor, value: Tensor, *_) -> tuple[Tensor, Tensor]:
    """What `local` is when no block is a query's own: an output over no keys."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=_wide(query.dtype))
    return out, torch.full_like(out[..., 0], -torch.inf)


def nothing_local_backward(query: Tensor, key: Tensor, value: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `nothing_local`."""
    return tuple(torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (query, key, value))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def max_pairs(query: Tensor, layout: BlockLayout, blocks: slice, spec: AttentionSettings) -> int:
    """A bound on the routed rows of `query [B, H, *, D]`, those of the query blocks `blocks`, known from shapes alone."""
    return query.shape[0] * query.shape[1] * layout.max_pairs(spec.routed, spec.causal, blocks)


def layout_of(
    query: Tensor, key: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, spec: AttentionSettings, implementation: str
) -> BlockLayout:
    block_size, width = _sizes(spec.block_size, key.shape[2], implementation)
    if cu_seqlens is not None:
        return packed_layout(cu_seqlens, key.shape[2], block_size, width)
    if padding_mask is not None:
        return padded_layout(padding_mask, query.shape[2], block_size, width)
    return dense_layout(query.shape[0], query.shape[2], key.shape[2], block_size, width, query.device)


def _sizes(block_size: int, n_key: int, implementation: str) -> tuple[int, int]:
    """Tokens and slots of a block. Only tiles of a GPU need blocks of particular widths."""
    block_size = one_block(block_size, n_key)
    return block_size, slots_per_block(block_size) if implementation == "flex" else block_size


# The operator. To autograd and torch.compile it is one node, so the steps above may compile, loop and allocate as they like.
# What PyTorch does around it grows with the square of the number of arguments, so all whole numbers are one.
@torch.library.custom_op("moba_flex::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sizes: Sequence[int],
    causal: bool,
    share_selection: bool,
    scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, H, Nq, D]`, `[B, G, Nk, D]`, `[B, G, Nk, Dv]` -> output, log-sum-exp and the chosen blocks.

    `sizes`: `block_size`, `top_k`, `sink_blocks`, `recent_blocks` and the `budget` in bytes.
    """
    *blocks, budget = sizes
    spec = AttentionSettings(*blocks, causal, scale, softcap, share_selection)
    query, key, value = query.detach(), key.detach(), value.detach()
    layout = layout_of(query, key, padding_mask, cu_seqlens, spec, implementation)
    # The gate is a matter of float32. Triton launches on the current GPU, which need not be the one that holds this layer.
    with without_autocast(query), torch.cuda.device_of(query):
        return cache.call(forward, (query, key, value), layout, spec, _BACKENDS[implementation], budget)


@attention.register_fake
def _(query, key, value, padding_mask, cu_seqlens, sizes, causal, share_selection, scale, softcap, implementation):
    spec = AttentionSettings(*sizes[:-1], causal, scale, softcap, share_selection)
    n_query, n_key = query.shape[2], key.shape[2]
    block_size, width = _sizes(spec.block_size, n_key, implementation)
    if cu_seqlens is not None:
        blocks = n_key // block_size + cu_seqlens.shape[0] - 1
    elif padding_mask is not None and n_query != n_key:
        blocks = min(-(-n_key // block_size), (n_query + block_size - 2) // block_size + 1)
    else:
        blocks = -(-n_key // block_size) - (n_key - n_query) // block_size
    lse = query.new_empty(query.shape[:3], dtype=_wide(query.dtype))
    chosen = query.new_empty(*query.shape[:2], blocks * width, spec.routed, dtype=torch.int32)
    dense = padding_mask is None and cu_seqlens is None
    if implementation == "flex" and dense:
        return empty_with_strides_of(query, n_query, value.shape[-1]), lse, chosen
    return query.new_empty(*query.shape[:3], value.shape[-1]), lse, chosen


@torch.library.custom_op("moba_flex::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sizes: Sequence[int],
    causal: bool,
    share_selection: bool,
    scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    *blocks, budget = sizes
    spec = AttentionSettings(*blocks, causal, scale, softcap, share_selection)
    grad, query, key, value, out, lse = (x.detach() for x in (grad, query, key, value, out, lse))
    layout = layout_of(query, key, padding_mask, cu_seqlens, spec, implementation)
    tensors = grad, grad_lse, query, key, value, out, lse, chosen
    with without_autocast(query), torch.cuda.device_of(query):
        return cache.call(backward, tensors, layout, spec, _BACKENDS[implementation], budget)


@attention_backward.register_fake
def _(grad, grad_lse, query, key, value, *args):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, padding_mask, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, padding_mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse, _):
    query, key, value, out, lse, chosen, padding_mask, cu_seqlens = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    saved = (query, key, value, out, lse, chosen, padding_mask, cu_seqlens)
    return *attention_backward(grad, grad_lse, *saved, *ctx.settings), None, None, *(None for _ in ctx.settings)


attention.register_autograd(_backward, setup_context=_setup_context)
