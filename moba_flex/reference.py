"""The specification: MoBA as one dense mask, following equations 2 to 6 of the report (arXiv 2502.13189).

Plain PyTorch, quadratic in the number of tokens, differentiable, exact in float64. Every faster implementation is tested against it.

B batch, H query heads, G key heads, N tokens (Nq queries, Nk keys), D head dimension, C blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .core.dtypes import accumulation_dtype
from .core.hidden import all_finite, finite, visible_product
from .core.settings import AttentionSettings
from .ops.gate import means_of, with_ties


def block_of_key(key: Tensor, padding_mask: Tensor | None, block_size: int) -> Tensor:
    """`[B, Nk]` int64: the block of each key, counted from its row's first real token; -1 for padding (equation 4)."""
    real = padding_mask if padding_mask is not None else key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    position = real.cumsum(1) - 1
    return torch.where(real, position // block_size, -1)


def gate_scores(query: Tensor, key: Tensor, of_key: Tensor, block_size: int) -> Tensor:
    """`[B, H, Nq, C]`: the inner product of each query with the mean key of each block, in float32 (equation 6).

    Blocks with the same mean have the same score, independent of rounding.
    """
    repeats, n_key = query.shape[1] // key.shape[1], key.shape[2]
    mean = _block_means(key, of_key, -(-n_key // block_size), min(block_size, n_key))
    return with_ties(query.to(mean.dtype) @ mean.repeat_interleave(repeats, 1).mT, mean)


def _block_means(key: Tensor, of_key: Tensor, n_blocks: int, block_size: int) -> Tensor:
    """The mean key of each block, `[B, G, C, D]`, in at least float32."""
    place = torch.arange(n_blocks * block_size, device=key.device) + (of_key >= 0).int().argmax(1, keepdim=True)  # [B, C * P]
    real = (place < key.shape[2]) & (of_key.gather(1, place.clamp(max=key.shape[2] - 1)) >= 0)
    index = torch.where(real, place, 0)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    blocks = key.gather(2, index).masked_fill(~real[:, None, :, None], 0).unflatten(2, (n_blocks, block_size))
    return means_of(blocks, real.unflatten(1, (n_blocks, block_size)).sum(2).clamp(min=1)[:, None, :, None])


def best(score: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Bool mask like `score`: the `count` best candidates of each row. Ties go to the earlier block; NaN counts as infinity."""
    order = torch.where(score.isnan(), math.inf, score).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, candidate.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(candidate).scatter(-1, order[..., :count], True) & candidate


def reference_selection(
    query: Tensor, key: Tensor, settings: AttentionSettings, *, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gate (equation 5): `[B, H, Nq, C]` bool, the blocks each query reads, and `[B, Nk]`, the block of each key."""
    n_query, n_key = query.shape[2], key.shape[2]
    n_blocks = -(-n_key // settings.block_size)
    of_key = block_of_key(key, padding_mask, settings.block_size)
    block = torch.arange(n_blocks, device=key.device)
    repeats = query.shape[1] // key.shape[1] if settings.share_selection else 1
    if settings.share_selection:  # by the sum of their scores, which is the score of their sum: of infinite scores only this is a number
        query = query.unflatten(1, (-1, repeats)).sum(2, dtype=accumulation_dtype(query.dtype))
    score = gate_scores(query, key, of_key, settings.block_size).repeat_interleave(repeats, 1)
    own = of_key[:, None, n_key - n_query :, None]  # [B, 1, Nq, 1]
    exists = (of_key[..., None] == block).any(1)[:, None, None, :]
    if settings.causal:
        past = (block < own) & exists
        forced = past & ((block < settings.sink_blocks) | (block >= own - settings.recent_blocks))
        free = best(score, (past & ~forced).expand_as(score), settings.top_k - 1 - settings.sink_blocks - settings.recent_blocks)
        selected = free | forced | (block == own)
    else:
        selected = best(score, exists.expand_as(score), settings.top_k)
    return selected & (own >= 0), of_key


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: AttentionSettings,
    *,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the chosen blocks only (equations 2 and 3). Returns the output and its log-sum-exp.

    Shapes are those of `moba_flex.moba_attention`. A query that reads nothing has output 0 and log-sum-exp -inf. Packed sequences,
    given by `cu_seqlens [n + 1]`, or `[2, n + 1]` for queries and keys, are computed one by one.
    """
    if cu_seqlens is not None:
        n_query, n_key = cu_seqlens.diff().expand(2, -1).tolist()
        sequences = zip(*(x.split(sizes, dim=2) for x, sizes in ((query, n_query), (key, n_key), (value, n_key))))
        parts = [reference_attention(q, k, v, settings, sinks=sinks) for q, k, v in sequences if q.shape[2]]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    selected, of_key = reference_selection(query.detach(), key.detach(), settings, padding_mask=padding_mask)
    n_query, n_key = query.shape[2], key.shape[2]
    real = of_key >= 0
    visible = selected.gather(-1, of_key.clamp(min=0)[:, None, None].expand(*selected.shape[:3], n_key))
    visible = visible & real[:, None, None]
    if settings.causal:
        visible = visible.tril(n_key - n_query)
    if padding_mask is not None:
        key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (key, value))
        query = query.masked_fill(~real[:, None, n_key - n_query :, None], 0)

    dtype, repeats = accumulation_dtype(query.dtype), query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype).repeat_interleave(repeats, 1), value.to(dtype).repeat_interleave(repeats, 1)
    score = _inner_products(q, k) * settings.scale
    if settings.softcap is not None:
        capped = settings.softcap * torch.tanh(score.double() / settings.softcap)  # a gradient times the softcap may overflow float32
        score = capped.to(dtype)
    some = visible.any(-1, keepdim=True)
    score = score.masked_fill(~visible, -math.inf).masked_fill(~some, 0)  # finite where nothing is read, so that gradients are 0
    if sinks is not None:  # one more key for each head, with a value of 0; an infinite one leaves no weight for others
        sink = sinks.to(dtype)[:, None, None].expand(*score.shape[:3], 1)
        infinite = sink == math.inf
        score = torch.cat([score.masked_fill(infinite & score.isfinite(), -math.inf), sink.masked_fill(infinite, 0)], -1)
    weight = score.softmax(-1)[..., :n_key].masked_fill(~visible, 0)  # a row with NaN is NaN at hidden keys too
    out = weight @ v if all_finite(v) else visible_product(weight, visible, v)
    lse = _log_sum_exp(score)
    if sinks is not None:
        lse = lse + torch.where(infinite, sink, 0)[..., 0]
    lse = torch.where(some[..., 0], lse, -math.inf)
    return torch.where(some, out, 0).to(query.dtype), lse


def _inner_products(query: Tensor, key: Tensor) -> Tensor:
    """`query @ key.mT`. Its gradients do not spread NaN and infinity to rows that cannot see them: 0 * NaN would be NaN."""
    if all_finite(query, key):
        return query @ key.mT
    product = query.detach() @ key.detach().mT
    return torch.where(product.isfinite(), finite(query) @ finite(key).mT, product)


def _log_sum_exp(score: Tensor) -> Tensor:
    """`score.logsumexp(-1)`, whose gradient sums to 1 for large scores too. PyTorch's is `exp(score - lse)` with a rounded `lse`."""
    most = score.detach().amax(-1, keepdim=True)
    most = torch.where(most.isfinite(), most, 0)
    return (score - most).exp().sum(-1).log() + most[..., 0]
