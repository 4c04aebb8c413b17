"""The operators that PyTorch sees: `moba_flex::attention` and its backward pass.

Autograd and torch.compile see a call as one node, so the steps in `attention.py` may compile, loop and allocate freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import backward, forward, is_small
from .backends import backend_of, paths
from .core.autocast import without_autocast
from .core.dtypes import accumulation_dtype
from .core.layout import BlockLayout
from .core.layout_builders import layout_of, n_query_slots
from .core.parallel import one_thread
from .core.settings import AttentionSettings
from .core.strides import empty_with_strides_of
from .cuda_graphs import cache
from .cuda_graphs.capture import Function


def _run(function: Function, tensors: tuple[Tensor | None, ...], layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, ...]:
    """`function(*tensors, layout, settings)`, replayed from a CUDA graph where that is faster."""
    if paths.capture_obstacle(tensors, settings) is None:
        return cache.run(function, tensors, layout, settings)
    return function(*tensors, layout, settings)


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

    `cu_seqlens` is `[n + 1]`, or `[2, n + 1]` if queries and keys have different ones: one more argument would slow down every call.
    """
    settings = AttentionSettings.from_arguments(sizes, causal, share_selection, scale, softcap, implementation)
    query, key, value = query.detach(), key.detach(), value.detach()
    layout = layout_of(query, key, padding_mask, cu_seqlens, settings.block_size, backend_of(settings))
    # The gate compares float32 scores. Triton launches on the current GPU, which may differ from the GPU of this layer.
    with without_autocast(query), torch.cuda.device_of(query), one_thread(is_small(query, key, settings)):
        out, lse, chosen = _run(forward, (query, key, value), layout, settings)
        return out, lse, chosen


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    settings = AttentionSettings.from_arguments(*arguments)
    slots = n_query_slots(query, key, padding_mask, cu_seqlens, settings.block_size, backend_of(settings))
    lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    chosen = query.new_empty(*query.shape[:2], slots, settings.n_routed, dtype=torch.int32)
    return _empty_like(query, value.shape[-1], settings), lse, chosen


def _empty_like(x: Tensor, width: int, settings: AttentionSettings) -> Tensor:
    """An empty `[B, H, N, width]` for an output or gradient of `x [B, H, N, D]`, with the strides that the backend returns."""
    if backend_of(settings).READS_STRIDES:
        return empty_with_strides_of(x, x.shape[2], width)
    return x.new_empty(*x.shape[:3], width)


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
    settings = AttentionSettings.from_arguments(sizes, causal, share_selection, scale, softcap, implementation)
    grad, query, key, value, out, lse = (x.detach() for x in (grad, query, key, value, out, lse))
    layout = layout_of(query, key, padding_mask, cu_seqlens, settings.block_size, backend_of(settings))
    with without_autocast(query), torch.cuda.device_of(query), one_thread(is_small(query, key, settings)):
        dq, dk, dv = _run(backward, (grad, grad_lse, query, key, value, out, lse, chosen), layout, settings)
        return dq, dk, dv


@attention_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    settings = AttentionSettings.from_arguments(*rest[5:])  # after out, lse, chosen, padding_mask and cu_seqlens
    dq, dk, dv = (_empty_like(x, x.shape[3], settings) for x in (query, key, value))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, padding_mask, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, padding_mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, chosen, padding_mask, cu_seqlens = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    saved = (query, key, value, out, lse, chosen, padding_mask, cu_seqlens)
    return *attention_backward(grad, grad_lse, *saved, *ctx.settings), None, None, *(None for _ in ctx.settings)


attention.register_autograd(_backward, setup_context=_setup_context)


def _second_backward(*_: object) -> tuple[Tensor | None, ...]:
    raise NotImplementedError('second derivatives need implementation="naive"')


attention_backward.register_autograd(_second_backward)
