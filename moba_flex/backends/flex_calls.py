"""Compiled FlexAttention under a `Mask`, forward and backward: one compilation per combination of settings.

Queries are `[b, h, q, D]`, keys `[b, 1, k, D]` and values `[b, 1, k, Dv]`; the caller defines the meaning of these axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..core.chunking import QUERY_TILE
from ..core.settings import AttentionSettings
from ..core.upstream import flex_attention_backward
from .block_masks import Mask, block_mask
from .compilation import any_length, compiled
from .flex_options import OPERATOR_OPTIONS, kernel_options

T = TypeVar("T")


def by_group(x: Tensor, groups: int) -> Tensor:
    """`[B, H, ...]` -> `[B * G, H / G, ...]`: one key head becomes one batch element."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def make_constants(strides: tuple[int, ...], *tensors: Tensor) -> None:
    """Within a traced function: makes token strides constants of the kernel, by comparing them.

    Those of a transposed `[B, N, H, D]` would be variables otherwise, whose registers spill: routed rows took up to 2.7 times as long.
    """
    for x, stride in zip(tensors, strides):
        if x.stride(2) != stride:
            raise AssertionError("the tensors have other strides than those that this kernel is for")


def flex_forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`flex_attention` under `mask`: the output and its log-sum-exp."""
    strides = query.stride(2), key.stride(2), value.stride(2)
    call: Callable[..., tuple[Tensor, Tensor]] = _forward_call(*_kernel_key(query, value, mask, settings), strides)
    return call(*any_length(query, key, value, *mask.lists, *mask.buffers))


def flex_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, mask: Mask, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients through `flex_forward`, given `lse`, the log-sum-exp over all blocks of the merged output.

    FlexAttention's backward operator accepts any log-sum-exp. It gets that of the merged output instead of the partial one, and
    `delta` (`out . grad - grad_lse`) as a gradient of it. Partial outputs need neither be stored nor recomputed.
    """
    call: Callable[..., tuple[Tensor, Tensor, Tensor]] = _backward_call(*_kernel_key(query, value, mask, settings))
    return call(*any_length(query, key, value, grad, lse, delta, *mask.lists, *mask.buffers))


def _kernel_key(query: Tensor, value: Tensor, mask: Mask, settings: AttentionSettings) -> tuple[Any, ...]:
    """Everything that a kernel is compiled for, but for token strides. Only lengths and data vary between calls that share it."""
    widths = query.shape[-1], value.shape[-1]
    return mask.kernel_key, mask.tiles, mask.rule, widths, query.dtype, settings.scale, settings.softcap, query.is_cuda


def compile_on_gpu(call: Callable[..., T], key: tuple[Any, ...], is_cuda: bool) -> Callable[..., T]:
    if not is_cuda:  # only tests run this on a CPU: they compare the masks with the specification, on dense scores
        return call
    return compiled(call, key)


@cache
def _forward_call(mask_key, tiles, rule, widths, dtype, scale, softcap, is_cuda, strides) -> Callable[..., Any]:
    options = kernel_options(mask_key[0] == "routed", tiles, widths, dtype)
    score_mod = None if softcap is None else softcap_score(softcap)

    def moba_flex_forward(query, key, value, *tensors):
        lists, buffers = tensors[:8], tensors[8:]
        make_constants(strides, query, key, value)

        def mask_mod(b, h, q, kv):
            return rule(b, h, q, kv, *buffers)

        mask = block_mask(tiles, mask_mod, lists, query.shape[2], key.shape[2])
        operands = (query, key, value, score_mod, mask, scale)
        out, aux = flex_attention(*operands, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return compile_on_gpu(moba_flex_forward, (mask_key, tiles, widths, dtype, scale, softcap, strides), is_cuda)


@cache
def _backward_call(mask_key, tiles, rule, widths, dtype, scale, softcap, is_cuda) -> Callable[..., Any]:
    # The lowering drops a configuration whose default tiles do not divide these sizes, before it reads our smaller tiles from the
    # options. The mask therefore gets larger sizes, and the options have the true ones.
    sizes = tuple(math.lcm(tile, QUERY_TILE) for tile in tiles)
    options = kernel_options(mask_key[0] == "routed", tiles, widths, dtype) | OPERATOR_OPTIONS
    options |= {"SPARSE_Q_BLOCK_SIZE": tiles[0], "SPARSE_KV_BLOCK_SIZE": tiles[1]}
    score_mod = _same if softcap is None else softcap_score(softcap)
    joint = _same_joint if softcap is None else _softcap_joint(softcap)

    @torch.compiler.allow_in_graph  # the operator takes functions, which torch.compile cannot pass from a traced call
    def operator(query, key, value, grad, lse, delta, *tensors):
        lists, buffers = tensors[:8], tensors[8:]
        mask = block_mask(sizes, rule, lists, query.shape[2], key.shape[2])
        # In the operator's units, `lse` is base 2. Its delta, `out . grad - grad_lse / ln 2`, equals ours with these operands.
        lse, grad_lse, out = lse / math.log(2), delta * -math.log(2), torch.zeros_like(grad)
        operands = (query, key, value, out, lse, grad, grad_lse, score_mod, joint, mask.as_tuple(), scale, options, (), buffers)
        return flex_attention_backward(*operands)[:3]

    def moba_flex_backward(*tensors):
        return operator(*tensors)

    return compile_on_gpu(moba_flex_backward, (mask_key, tiles, widths, dtype, scale, softcap), is_cuda)


def _same(score, b, h, q, kv):
    return score.clone()


def _same_joint(score, b, h, q, kv, grad):
    return [grad.clone(), None, None, None, None]


def softcap_score(softcap: float) -> Callable[..., Any]:
    def score_mod(score, b, h, q, kv):
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _softcap_joint(softcap: float) -> Callable[..., Any]:
    """The backward function of `softcap_score`: the gradient of the score, and none of the indices."""

    def joint(score, b, h, q, kv, grad):
        return [grad * (1 - torch.tanh(score / softcap) ** 2), None, None, None, None]

    return joint
