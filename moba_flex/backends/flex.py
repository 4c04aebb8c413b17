"""The implementation for CUDA: compiled FlexAttention on block-sparse tiles.

In the local call, a batch element is one key head with its query heads. In the routed call, all rows and all blocks are concatenated. One
compilation of each serves any length and batch size.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, R routed rows, D and Dv head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.chunking import QUERY_TILE
from ..core.dtypes import accumulation_dtype
from ..core.layout import BlockLayout
from ..core.layout import slots_per_block as slots_per_block
from ..core.settings import AttentionSettings
from ..core.strides import last_dim_contiguous, merge_batch, tokens_first
from ..ops import kernels, ops_for
from ..ops.routing import Routes
from ..ops.rows import copy_into, empty_attention
from . import flash, paths
from .block_masks import local_mask, query_tile, routed_mask
from .flex_calls import by_group, flex_backward, flex_forward

# FlexAttention's kernels compute key index times head dimension, and in backward also row index times head dimension, in 32 bits.
MAX_TENSOR_ELEMENTS = 2**31 - 1
READS_STRIDES = True
HEAD_BY_HEAD = False


def slots_per_query_tile(width: int, n_query: int, sequences: int) -> int:
    """One tile of the local call: see `local_mask`."""
    return query_tile(width)


def reads_tokens(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> bool:
    """Whether tokens are read in place: by the one-kernel backward pass. A BlockMask needs slots."""
    return backward and paths.one_pass_backward_obstacle(query, value, layout.width, layout.tile is not None) is None


def elements_per_row(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> int:
    """Elements per row of query, output and output gradient.

    The one-kernel backward pass holds only query gradients, one per sub-block. Twice that is counted: its other buffers are larger than
    in a forward pass, and larger chunks took more memory in total than copied rows.
    """
    if reads_tokens(query, value, layout, backward):
        return 2 * query.shape[-1] * kernels.backward.sub_blocks(query, value, layout.width)
    return query.shape[-1] + 2 * value.shape[-1]


def route(chosen: Tensor, groups: int, n_blocks: int, max_pairs: int) -> Routes:
    """One row per pair, sorted by block in whole tiles: see `moba_flex.ops.routing.route`."""
    return ops_for(chosen).route(chosen, groups, n_blocks, QUERY_TILE, max_pairs)


def choose(query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings) -> Tensor:
    """The gate: see `moba_flex.ops.gate.choose`."""
    return ops_for(query).choose(query, key, layout, settings)


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
    out, lse = local(query, key, value, layout, settings) if settings.causal else empty_attention(query, value)
    if routes is None:
        copy_into((out, lse), into)
        return
    steps = ops_for(query)
    row_out, row_lse = routed(steps.dispatch(query, routes), key, value, routes, layout, settings)
    steps.merge(out, lse, row_out, row_lse, routes, layout, into)


def local(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block. Returns `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`."""
    (rows, heads, slots), groups = query.shape[:3], key.shape[1]
    # One key head of one batch row becomes a batch element. Several batch rows of a transposed `[B, N, H, D]` have no such view, unless
    # they are concatenated first.
    lined = [merge_batch(x) for x in (query, key, value)] if rows > 1 and tokens_first(query) else []
    line = [x for x in lined if x is not None]
    batch_merged = len(line) == 3 and all(_in_reach(x) for x in line[1:])
    query, key, value = (by_group(x, groups) for x in (line if batch_merged else (query, key, value)))
    key, value = (x if _in_reach(x) else x.contiguous() for x in (key, value))
    out, lse = flex_forward(query, key, value, local_mask(layout, heads, groups, batch_merged), settings)
    if not batch_merged:
        return out.reshape(rows, heads, slots, -1), lse.view(rows, heads, slots)
    out, lse = out.reshape(heads, rows, slots, -1), lse.view(heads, rows, slots)
    return out.transpose(0, 1), lse.transpose(0, 1).contiguous()


def routed(
    row_query: Tensor, key: Tensor, value: Tensor, routes: Routes, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Attention of each row `[R, D]` to its block of `key [B, G, C * P, D]`. Returns `[R, Dv]` and the log-sum-exp `[R]`."""
    operands = row_query[None, None], _concatenated(key), _concatenated(value)
    if kernel := flash.kernel_for(row_query, value, layout, settings):
        out, lse = kernel(*operands, routes)
    else:
        out, lse = flex_forward(*operands, routed_mask(routes, layout, key.shape[1], settings.causal), settings)
    return out[0, 0], lse[0, 0]


def delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`out . grad - grad_lse`: see `moba_flex.ops.rows.delta`."""
    return ops_for(out).delta(last_dim_contiguous(out), grad, grad_lse)


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
    if paths.one_pass_backward_obstacle(query, value, layout.width, layout.tile is not None) is None:
        kernels.one_pass_backward(query, key, value, grad, lse, delta, routes, layout, settings, into)
        return
    query, key, value, grad = (x.contiguous() for x in (query, key, value, grad))
    operands = query, key, value, grad, lse, delta
    if settings.causal:
        partial = local_backward(*operands, layout, settings)
    else:
        dq, dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (query, key, value))
        partial = dq, dk, dv
    if routes is None:
        copy_into(partial, into)
        return
    steps = ops_for(query)
    rows: tuple[Tensor, Tensor, Tensor, Tensor] = steps.dispatch_backward(query, grad, lse, delta, routes)
    row_dq, dk, dv = routed_backward(*rows, key, value, routes, layout, settings)
    steps.sum_rows(partial[0], row_dq, routes, into[0])
    torch.add(partial[1], dk, out=into[1])
    torch.add(partial[2], dv, out=into[2])


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    mask = local_mask(layout, query.shape[1], key.shape[1])
    q, k, v, g, l, d = (by_group(x, key.shape[1]) for x in (query, key, value, grad, lse, delta))
    dq, dk, dv = flex_backward(q, k, v, g, l, d, mask, settings)
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def routed_backward(
    row_query: Tensor,
    row_grad: Tensor,
    row_lse: Tensor,
    row_delta: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows `[R, D]`, of key and of value that come through the routed call."""
    mask = routed_mask(routes, layout, key.shape[1], settings.causal)
    query, grad, lse, delta = (x[None, None] for x in (row_query, row_grad, row_lse, row_delta))
    dq, dk, dv = flex_backward(query, _concatenated(key), _concatenated(value), grad, lse, delta, mask, settings)
    return dq[0, 0], dk.view(key.shape), dv.view(value.shape)


def _in_reach(x: Tensor) -> bool:
    """Whether FlexAttention's 32-bit offsets, token index times stride, reach each token of `[b, h, N, D]` keys or values."""
    return x.shape[2] * x.stride(2) <= MAX_TENSOR_ELEMENTS


def _concatenated(x: Tensor) -> Tensor:
    """`[B, G, N, D]` -> `[1, 1, B * G * N, D]`: all blocks of all heads, concatenated."""
    return x.reshape(1, 1, -1, x.shape[-1])
