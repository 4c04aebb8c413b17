"""Runs one call with validated arguments, on the path that `backends/paths.py` selects.

Model adapters call this for every layer. B batch, H query heads, N tokens, n new tokens, D and Dv head dimensions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operator
from .backends import varlen
from .backends.paths import Path, one_pass_obstacle, path_of
from .core.autocast import without_autocast
from .core.dtypes import accumulation_dtype
from .core.layout import clamp_block_size, slots_per_block
from .core.memo import remember
from .core.settings import AttentionSettings
from .core.strides import aligned, has_address
from .core.validation import check_not_onnx, check_not_transformed, check_values
from .decoding import decode, decode_pages
from .ops.pages import Pages
from .reference import reference_attention

_LEAST_WIDTH = {"flex": 16, "triton": 16, "eager": 1}  # of a GPU's tiles; 1, since even values of width 0 have a log-sum-exp
LARGE_TOP_K = 64  # a larger `top_k` is bounded by the number of blocks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: AttentionSettings,
    *,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`moba_flex.moba_attention` with validated settings: the output, and the log-sum-exp with `return_lse`, else None.

    With `cu_seqlens [n + 1]`, the batch size is 1 and the tokens are packed sequences; `longest` is the maximum length, if known.
    With `cu_seqlens [2, n + 1]`, for queries and for keys, the queries of a sequence are its last tokens.
    """
    mask_or_bounds = padding_mask if cu_seqlens is None else cu_seqlens
    if mask_or_bounds is not None:
        remember(mask_or_bounds)
    path = path_of(
        query,
        key,
        value,
        settings,
        padded=padding_mask is not None,
        cu_seqlens=cu_seqlens,
        longest=longest,
        sinks=sinks is not None,
        return_lse=return_lse,
    )
    if path is Path.DENSE:
        return _dense(query, key, value, settings, cu_seqlens, longest), None
    check_not_onnx()
    if path is Path.EMPTY:
        out, lse = _nothing(query, key, value)
    elif path is Path.REFERENCE:
        if cu_seqlens is not None:
            check_values('implementation="naive"', cu_seqlens=cu_seqlens)
        with without_autocast(query):
            out, lse = reference_attention(query, key, value, settings, padding_mask=padding_mask, cu_seqlens=cu_seqlens, sinks=sinks)
    else:
        out, lse = _operator(query, key, value, settings, padding_mask, cu_seqlens, longest)
    if sinks is not None and path is not Path.REFERENCE:  # the reference adds them as one more key
        out, lse = with_sinks(out, lse, sinks)
    return out, lse if return_lse else None


def attend_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    length: Tensor | None,
    start: Tensor | None,
    settings: AttentionSettings,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend` for the last tokens of a cache with block means, see `moba_flex.decoding.decode`: `[B, H, n, Dv]`."""
    check_not_onnx()
    check_not_transformed(query, key, value, but='need decode="full"')
    settings = with_bounded_top_k(settings, means.shape[2] + 1)  # + 1: the own block
    out, lse = decode(query, key, value, means, length, start, settings)
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


def attend_decoding_pages(query: Tensor, pages: Pages, settings: AttentionSettings, *, sinks: Tensor | None = None) -> Tensor:
    """`attend_decoding` with a paged cache, see `moba_flex.decoding.decode_pages`: `[B, H, n, Dv]`."""
    settings = with_bounded_top_k(settings, pages.n_blocks(settings.block_size) + 1)
    out, lse = decode_pages(query, pages, settings)
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    nothing = (query.sum() + key.sum() + value.sum()) * 0  # so that all inputs have gradients
    out = nothing + query.new_zeros(*query.shape[:3], value.shape[-1])
    return out, nothing + query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, cu_seqlens: Tensor | None, longest: int | None
) -> Tensor:
    if cu_seqlens is None:
        grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210  # a bool, also of symbolic sizes
        operands = aligned(query), aligned(key), aligned(value)
        with without_autocast(query):
            out = F.scaled_dot_product_attention(*operands, is_causal=True, scale=settings.scale, enable_gqa=grouped)
    else:
        assert longest is not None  # or the path would be another one
        check_not_onnx()
        check_not_transformed(query, key, value)
        with without_autocast(query), torch.cuda.device_of(query):
            out = varlen.attend(query, key, value, cu_seqlens, longest, settings.scale)
    if out.requires_grad and has_address(out):
        out.register_hook(_aligned_gradient)  # the backward pass loads gradients alike
    return out


def _aligned_gradient(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else aligned(grad)


def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: AttentionSettings,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, Tensor]:
    check_not_transformed(query, key, value)
    if longest is not None:  # so that short sequences are not padded to a long block each
        settings = replace(settings, block_size=clamp_block_size(settings.block_size, longest))
    block_size = clamp_block_size(settings.block_size, key.shape[2])
    settings = with_bounded_top_k(settings, -(-key.shape[2] // settings.block_size))
    width, least = value.shape[-1], _LEAST_WIDTH[settings.implementation]
    narrow = min(query.shape[-1], width) < least
    if narrow:  # zeros change neither scores nor outputs
        query, key, value = (F.pad(x, (0, max(0, least - x.shape[-1]))) for x in (query, key, value))
    if settings.implementation == "triton" and (
        reason := one_pass_obstacle(query, value, slots_per_block(block_size), cu_seqlens is not None and cu_seqlens.dim() == 2)
    ):
        raise ValueError(
            f'implementation="triton" cannot take query {tuple(query.shape)} of {query.dtype} with block_size={block_size}: {reason}; '
            'use "flex" or "auto"'
        )
    out, lse, _ = operator.attention(query, key, value, padding_mask, cu_seqlens, *settings.to_arguments())
    return out[..., :width] if narrow else out, lse


def with_bounded_top_k(settings: AttentionSettings, n_blocks: int) -> AttentionSettings:
    """Equivalent settings with smaller counts if these are far above the number of blocks: time and memory grow with them."""
    if settings.top_k <= LARGE_TOP_K:
        return settings
    enough = LARGE_TOP_K
    while enough < n_blocks:
        enough *= 2
    sink_blocks = min(settings.sink_blocks, enough - 1)  # that many cover all past blocks already
    recent_blocks = min(settings.recent_blocks, enough - 1 - sink_blocks)
    return replace(settings, top_k=min(settings.top_k, enough), sink_blocks=sink_blocks, recent_blocks=recent_blocks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp with one more logit per head in the softmax's denominator."""
    sink = sinks.to(lse.dtype)[:, None]
    empty = lse == -torch.inf
    safe = lse.masked_fill(empty, 0)  # otherwise, with a sink of -inf (no sink), the difference below would be NaN
    share = torch.sigmoid(safe - sink)
    out = torch.where(empty[..., None], 0, out * share[..., None]).to(out.dtype)
    return out, torch.where(empty, lse, torch.logaddexp(safe, sink))
