"""The specification: MoBA as one dense mask, to be read beside equations 2 to 6 of the report (arXiv 2502.13189).

Plain PyTorch, quadratic in tokens, differentiable, float64-exact. Every faster implementation is tested against it.

B batch, H query heads, G key heads, N tokens (Nq queries, Nk keys), D head dimension, C blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_of_key(key: Tensor, padding_mask: Tensor | None, block_size: int) -> Tensor:
    """`[B, Nk]` int64: the block of each key, counted from its row's first real token; -1 for padding (equation 4)."""
    real = padding_mask if padding_mask is not None else key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    position = real.cumsum(1) - 1
    return torch.where(real, position // block_size, -1)


def gate_scores(query: Tensor, key: Tensor, of_key: Tensor, n_blocks: int) -> Tensor:
    """`[B, H, Nq, C]`: the inner product of each query with the mean key of each block, in float32 (equation 6)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    of_key = torch.where(of_key < 0, n_blocks, of_key)[:, None, :, None].expand_as(key)  # padding to a block that is cut off
    zeros = key.new_zeros(*key.shape[:2], n_blocks + 1, key.shape[3], dtype=wide)
    total, count = zeros.scatter_add(2, of_key, key.to(wide)), zeros.scatter_add(2, of_key, torch.ones_like(key, dtype=wide))
    mean = (total / count.clamp(min=1))[:, :, :n_blocks].repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query.to(wide) @ mean.mT


def best(score: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Bool like `score`: the `count` best candidates of each row; among equals the earlier block; NaN counts as infinity."""
    order = torch.where(score.isnan(), math.inf, score).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, candidate.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(candidate).scatter(-1, order[..., :count], True) & candidate


def reference_selection(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    causal: bool = True,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gate (equation 5): `[B, H, Nq, C]` bool, the blocks each query reads, and `[B, Nk]`, the block of each key."""
    n_query, n_key = query.shape[2], key.shape[2]
    n_blocks = -(-n_key // block_size)
    of_key = block_of_key(key, padding_mask, block_size)
    block = torch.arange(n_blocks, device=key.device)
    score = gate_scores(query, key, of_key, n_blocks)
    if share_selection:  # the heads of a group choose together, by the sum of their scores
        repeats = query.shape[1] // key.shape[1]
        score = score.unflatten(1, (-1, repeats)).sum(2).repeat_interleave(repeats, 1)
    own = of_key[:, None, n_key - n_query :, None]  # [B, 1, Nq, 1]
    exists = (of_key[..., None] == block).any(1)[:, None, None, :]
    if causal:
        past = (block < own) & exists
        forced = past & ((block < sink_blocks) | (block >= own - recent_blocks))
        free = best(score, (past & ~forced).expand_as(score), top_k - 1 - sink_blocks - recent_blocks)
        selected = free | forced | (block == own)
    else:
        selected = best(score, exists.expand_as(score), top_k)
    return selected & (own >= 0), of_key


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    causal: bool = True,
    scale: float,
    padding_mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the chosen blocks alone (equations 2 and 3). Returns the output and its log-sum-exp.

    Shapes as in `moba_flex.moba_attention`. Outputs of queries that read nothing are 0, their log-sum-exp is -inf.
    """
    selected, of_key = reference_selection(
        query.detach(),
        key.detach(),
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
        padding_mask=padding_mask,
    )
    n_query, n_key = query.shape[2], key.shape[2]
    real = of_key >= 0
    visible = selected.gather(-1, of_key.clamp(min=0)[:, None, None].expand(*selected.shape[:3], n_key))
    visible = visible & real[:, None, None]
    if causal:
        visible = visible.tril(n_key - n_query)
    if padding_mask is not None:
        key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (key, value))

    wide, repeats = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    q, k, v = query.to(wide), key.to(wide).repeat_interleave(repeats, 1), value.to(wide).repeat_interleave(repeats, 1)
    score = q @ k.mT * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible, -math.inf)
    some = visible.any(-1)
    lse = score.masked_fill(~some[..., None], 0).logsumexp(-1)  # finite where nothing is read, so that gradients are 0
    weight = torch.exp(score - lse[..., None])
    return torch.where(some[..., None], weight @ v, 0).to(query.dtype), torch.where(some, lse, -math.inf)
