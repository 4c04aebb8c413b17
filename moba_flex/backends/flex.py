"""The implementation for CUDA: compiled FlexAttention on block-sparse tiles.

The local call has the query heads of one key head as the heads of one element of the batch, and so has the masked call, which does all of
attention where there are few blocks; the routed call has all rows and all blocks in one line. So one compilation of each serves any
length and any batch.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, R routed rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention_backward
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..core.strides import keep_strides
from ..ops import rows as plain
from ..ops.routing import Routes
from . import flash
from .block_masks import QUERY_TILE, Mask, bits_mask, block_mask, local_mask, routed_mask
from .compilation import any_length, compiled

__all__ = [
    "MAX_TENSOR_ELEMENTS",
    "TILE",
    "choose",
    "delta",
    "local",
    "local_backward",
    "masked",
    "masked_backward",
    "merge_routed",
    "merge_routed_backward",
    "route",
]

TILE = QUERY_TILE

# How many numbers a tensor may hold: FlexAttention's kernels take the number of a key, and backward that of a row, times the
# width in 32 bits.
MAX_TENSOR_ELEMENTS = 2**31 - 1

try:
    from ..ops import triton as kernels
except ImportError:  # no Triton, so no CUDA either
    kernels = None


def _steps(x: Tensor):
    """The steps around attention: Triton kernels on a GPU, their plain twins elsewhere."""
    return kernels if x.is_cuda else plain


def route(chosen: Tensor, groups: int, n_blocks: int, max_pairs: int) -> Routes:
    """Rows for all pairs, ordered by block in whole tiles: see `moba_flex.ops.routing.route`."""
    return _steps(chosen).route(chosen, groups, n_blocks, TILE, max_pairs)


def choose(query: Tensor, key: Tensor, layout: BlockLayout, spec: AttentionSettings) -> Tensor:
    """The gate: see `moba_flex.ops.gate.choose`."""
    return _steps(query).choose(query, key, layout, spec)


def local(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: AttentionSettings, *_) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block. Returns `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`."""
    mask = local_mask(layout, query.shape[1], key.shape[1])
    operands = _by_group(query, key.shape[1]), _by_group(key, key.shape[1]), _by_group(value, key.shape[1])
    out, lse = _forward(*operands, mask, spec)
    return out.reshape(*query.shape[:3], -1), lse.view(query.shape[:3])


def merge_routed(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    spec: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """What queries read along `routes`, added to an output `[B, H, N, Dv]` and its log-sum-exp `[B, H, N]`, written `into` such."""
    steps = _steps(query)
    row_out, row_lse = routed(steps.dispatch(query, routes), key, value, routes, layout, spec)
    steps.merge(out, lse, row_out, row_lse, routes, into)


def delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`out . grad - grad_lse`: see `moba_flex.ops.rows.delta`."""
    return _steps(out).delta(keep_strides(out), grad, grad_lse)


def routed(
    row_query: Tensor, key: Tensor, value: Tensor, routes: Routes, layout: BlockLayout, spec: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Attention of each row `[R, D]` to its block of `key [B, G, C * P, D]`. Returns `[R, Dv]` and the log-sum-exp `[R]`."""
    operands = row_query[None, None], _in_line(key), _in_line(value)
    if kernel := flash.kernel_for(row_query, value, layout, spec):
        out, lse = kernel(*operands, routes)
    else:
        out, lse = _forward(*operands, routed_mask(routes, layout, key.shape[1], spec.causal), spec)
    return out[0, 0], lse[0, 0]


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, spec: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    mask = local_mask(layout, query.shape[1], key.shape[1])
    dq, dk, dv = _backward(*(_by_group(x, key.shape[1]) for x in (query, key, value, grad, lse, delta)), mask, spec)
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def merge_routed_backward(
    local: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes,
    layout: BlockLayout,
    spec: AttentionSettings,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of query, key and value that come along `routes`, added to those that came otherwise, written `into` such."""
    steps = _steps(query)
    rows = steps.dispatch_backward(query, grad, lse, delta, routes)
    row_dq, dk, dv = routed_backward(*rows, key, value, routes, layout, spec)
    steps.sum_rows(local[0], row_dq, routes, into[0])
    torch.add(local[1], dk, out=into[1])
    torch.add(local[2], dv, out=into[2])


def routed_backward(
    row_query: Tensor,
    row_grad: Tensor,
    row_lse: Tensor,
    row_delta: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    layout: BlockLayout,
    spec: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows `[R, D]`, of key and of value that come through the routed call."""
    mask = routed_mask(routes, layout, key.shape[1], spec.causal)
    query, grad, lse, delta = (x[None, None] for x in (row_query, row_grad, row_lse, row_delta))
    dq, dk, dv = _backward(query, _in_line(key), _in_line(value), grad, lse, delta, mask, spec)
    return dq[0, 0], dk.view(key.shape), dv.view(value.shape)


def masked(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, layout: BlockLayout, spec: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """All of attention in one dense call, for few blocks: tokens `[B, H, Nq, D]` -> `[B, H, Nq, Dv]`, log-sum-exp `[B, H, Nq]`."""
    mask = _mask_of(chosen, layout, key.shape[1])
    out, lse = _forward(*(_by_group(x, key.shape[1]) for x in (query, key, value)), mask, spec)
    return out.reshape(*query.shape[:3], -1), lse.view(query.shape[:3])


def masked_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    chosen: Tensor,
    layout: BlockLayout,
    spec: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through `masked`."""
    mask = _mask_of(chosen, layout, key.shape[1])
    dq, dk, dv = _backward(*(_by_group(x, key.shape[1]) for x in (query, key, value, grad, lse, delta)), mask, spec)
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def _mask_of(chosen: Tensor, layout: BlockLayout, groups: int) -> Mask:
    return bits_mask(_by_group(_steps(chosen).block_bits(chosen, layout), groups), layout)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """`[B, H, ...]` -> `[B * G, H / G, ...]`: one key head is one element of the batch."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def _in_line(x: Tensor) -> Tensor:
    """`[B, G, N, D]` -> `[1, 1, B * G * N, D]`: all blocks of all heads one after another."""
    return x.reshape(1, 1, -1, x.shape[-1])


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, spec: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`flex_attention` under `mask`: the output and its log-sum-exp."""
    call = _forward_call(*_settings(query, value, mask, spec))
    return call(*any_length(query, key, value, *mask.lists, *mask.buffers))


def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, mask: Mask, spec: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_forward`'s share in an output whose log-sum-exp over all blocks is `lse`.

    FlexAttention's backward operator takes any log-sum-exp, so it is given that of the whole output and not the partial one, and
    `delta` (`out . grad`) as a gradient of it. Nothing of the partial outputs has to be known, neither kept nor computed again.
    """
    call = _backward_call(*_settings(query, value, mask, spec))
    return call(*any_length(query, key, value, grad, lse, delta, *mask.lists, *mask.buffers))


def _settings(query: Tensor, value: Tensor, mask: Mask, spec: AttentionSettings) -> tuple:
    """All that a kernel is compiled for. Only lengths and data vary between calls that share it."""
    widths = query.shape[-1], value.shape[-1]
    return mask.settings, mask.tiles, mask.divisible, mask.rule, widths, query.dtype, spec.scale, spec.softcap, query.is_cuda


def _compile(call: Callable, settings: tuple, is_cuda: bool) -> Callable:
    if not is_cuda:  # there only tests come here: they hold the masks against the specification, on dense scores
        return call
    return compiled(call, settings)


@cache
def _forward_call(settings, tiles, divisible, rule, widths, dtype, scale, softcap, is_cuda) -> Callable:
    options = _kernel_options(settings[0] == "routed", tiles, divisible, widths, dtype)
    score_mod = None if softcap is None else _softcap(softcap)

    def moba_flex_forward(query, key, value, *tensors):
        lists, buffers = tensors[:8], tensors[8:]

        def mask_mod(b, h, q, kv):
            return rule(b, h, q, kv, *buffers)

        mask = block_mask(tiles, mask_mod, lists, query.shape[2], key.shape[2])
        operands = (query, key, value, score_mod, mask, scale)
        out, aux = flex_attention(*operands, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return _compile(moba_flex_forward, (settings, tiles, widths, dtype, scale, softcap), is_cuda)


@cache
def _backward_call(settings, tiles, divisible, rule, widths, dtype, scale, softcap, is_cuda) -> Callable:
    # The lowering drops a configuration whose default tiles do not divide these, before it reads our smaller tiles from the
    # options. So the options carry the true sizes.
    sizes = tuple(math.lcm(tile, QUERY_TILE) for tile in tiles)
    options = _kernel_options(settings[0] == "routed", tiles, divisible, widths, dtype) | _OPERATOR_OPTIONS
    options |= {"SPARSE_Q_BLOCK_SIZE": tiles[0], "SPARSE_KV_BLOCK_SIZE": tiles[1]}
    score_mod = _same if softcap is None else _softcap(softcap)
    joint = _same_joint if softcap is None else _softcap_joint(softcap)

    @torch.compiler.allow_in_graph  # the operator takes functions, which torch.compile cannot pass on from a traced call
    def operator(query, key, value, grad, lse, delta, *tensors):
        lists, buffers = tensors[:8], tensors[8:]
        mask = block_mask(sizes, rule, lists, query.shape[2], key.shape[2])
        # In the operator's units: base-2 logarithms, and for its own delta, `out . grad - grad_lse / ln 2`, no `out` at all.
        lse, grad_lse, out = lse / math.log(2), delta * -math.log(2), torch.zeros_like(grad)
        operands = (query, key, value, out, lse, grad, grad_lse, score_mod, joint, mask.as_tuple(), scale, options, (), buffers)
        return flex_attention_backward(*operands)[:3]

    def moba_flex_backward(*tensors):
        return operator(*tensors)

    return _compile(moba_flex_backward, (settings, tiles, widths, dtype, scale, softcap), is_cuda)


# What flex_attention adds to kernel options before it calls its operator.
_OPERATOR_OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


def _same(score, b, h, q, kv):
    return score.clone()


def _same_joint(score, b, h, q, kv, grad):
    return [grad.clone(), None, None, None, None]


def _softcap(softcap: float) -> Callable:
    def score_mod(score, b, h, q, kv):
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _softcap_joint(softcap: float) -> Callable:
    """The derivative of `_softcap`: that of the score, and none for the indices."""

    def joint(score, b, h, q, kv, grad):
        return [grad * (1 - torch.tanh(score / softcap) ** 2), None, None, None, None]

    return joint


def _kernel_options(routed: bool, tiles: tuple[int, int], divisible: bool, widths: tuple[int, int], dtype: torch.dtype) -> dict:
    """PyTorch's own choice where its tile sizes, which divide 128, divide ours; smaller blocks need smaller ones."""
    options: dict[str, int | bool | str] = {"BACKEND": "TRITON", "IS_DIVISIBLE": divisible, "BLOCKS_ARE_CONTIGUOUS": True}
    q, kv = (math.gcd(tile, QUERY_TILE) for tile in tiles)
    half, narrow = dtype != torch.float32, max(widths) <= 64
    # A tile of rows meets so few keys that loading dominates: with four warps two tiles share a multiprocessor. On an H100 23 % faster at
    # block 128 than the default of eight warps, 13 % at 512; at width 64 14 % at block 128 (larger ones were not tried), and 20 % at 64
    # than with 64 rows.
    few_keys = routed and half and max(widths) <= 128 and tiles[1] <= (128 if narrow else 1024)
    if min(q, kv) < QUERY_TILE:
        most = (64 if half else 32) // (1 if max(widths) <= 128 else 2)
        rows = QUERY_TILE if few_keys and narrow and kv == 64 else most
        q, kv = min(q, rows), min(kv, most)
        options |= {"fwd_BLOCK_M": q, "fwd_BLOCK_N": kv, "num_warps": 4, "num_stages": 2}
        if not half:
            q, kv = 16, 16
        less = min(q, kv)  # the kernel wants N1 to be a multiple of M1, and M2 of N2
        options |= {"bwd_BLOCK_M1": less, "bwd_BLOCK_N1": kv, "bwd_BLOCK_M2": q, "bwd_BLOCK_N2": less}
    elif widths[1] > max(widths[0], QUERY_TILE):
        # PyTorch chooses by the width of keys alone; with values this wide its tiles would not fit into shared memory.
        options |= {"fwd_BLOCK_M": 64 if half else 32, "fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 2}
        options |= _square_backward(64 if half else 16, 2 if half else 1)
    elif few_keys:
        options |= {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 2}
        if narrow:  # 7 % faster than the default at block 128; at width 128 they are equal
            options |= _square_backward(64, 2)
    return options


def _square_backward(tile: int, stages: int) -> dict:
    sizes = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), tile)
    return sizes | {"bwd_num_warps": 4, "bwd_num_stages": stages}
