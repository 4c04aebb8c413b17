"""Attention of new tokens to keys that are distributed over processes.

Every process computes the new tokens, and attends to the keys that it holds. Partial outputs and their log-sum-exps are sent to all
processes in one message and merged there. If blocks are chosen, every process makes the same choice, from the means of all blocks, and
reads the chosen blocks that it holds.

Partial sums are computed in plain PyTorch, in float32 or wider, on any device.

W processes. B rows, H query heads, G key heads, R = H / G, n new tokens, N tokens held here, K blocks read, D and Dv widths.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.hidden import all_finite, visible_product
from ..core.settings import AttentionSettings
from ..dispatch import with_bounded_top_k, with_sinks
from ..ops.decoding import KeyValueReader, attend_to_blocks, blocks_to_read
from ..ops.rows import weights_of_parts
from .cache import SharedLayer
from .collectives import gathered
from .placement import Placement

_QUERIES_AT_ONCE = 1024  # tokens whose partial outputs are sent in one message
_SCORES_AT_ONCE = 1 << 25


@torch.no_grad()
def attend_shared(
    query: Tensor, layer: SharedLayer, settings: AttentionSettings, sinks: Tensor | None, reads_all: bool, group: dist.ProcessGroup
) -> Tensor:
    """`[B, H, n, Dv]`: the last n of all cached tokens, `query [B, H, n, D]`, read all keys up to themselves, or their chosen blocks."""
    shared, placement = layer.shared, layer.shared.placement
    assert placement is not None and layer.keys is not None and layer.values is not None  # after the new tokens' update
    n = query.shape[2]
    by_group = query.unflatten(1, (layer.keys.shape[1], -1)).to(accumulation_dtype(query.dtype))  # [B, G, R, n, D]
    token = torch.arange(shared.length - n, shared.length, device=query.device)
    means = None if reads_all else layer.block_means(group)
    outs = []
    for q, t in zip(by_group.split(_QUERIES_AT_ONCE, 3), token.split(_QUERIES_AT_ONCE)):
        last = placement.held(t + 1) - 1  # index of the last local key up to each query
        if means is None:
            part = _to_all(q, layer.keys, layer.values, last, settings)
        else:
            part = _to_chosen(q, layer.keys, layer.values, means, t, last, placement, settings)
        outs.append(_across(*part, sinks, group))
    return torch.cat(outs, 2).to(query.dtype)


def _across(out: Tensor, lse: Tensor, sinks: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Partial `[B, H, n, Dv]`, `[B, H, n]` of each process -> the merged `[B, H, n, Dv]`, the same on all."""
    parts = gathered(torch.cat([out, lse[..., None]], -1)[None], group)
    out, lse = merged(parts[..., :-1], parts[..., -1])
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax-weighted sum of partial outputs `[W, ..., Dv]` by their log-sum-exps `[W, ...]`, -inf for a part without keys."""
    weight, whole = weights_of_parts(lse, 0)
    return (weight[..., None] * out.masked_fill((lse == -torch.inf)[..., None], 0)).sum(0), whole


def _to_all(query: Tensor, key: Tensor, value: Tensor, last: Tensor, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`query [B, G, R, n, D]` reads `key [B, G, N, D]` up to `last [n]`: partial `[B, H, n, Dv]`, `[B, H, n]`, a few keys at a time."""
    heads = query.flatten(2, 3)  # [B, G, R * n, D]: keys need no copies
    total = _nothing(heads, value)
    step = max(1, _SCORES_AT_ONCE // max(1, heads[..., 0].numel()))
    for first in range(0, key.shape[2], step):
        k, v = (x[:, :, first : first + step].to(query.dtype) for x in (key, value))
        score = settings.cap_(heads @ k.mT * settings.scale)
        seen = torch.arange(first, first + k.shape[2], device=last.device) <= last[:, None]  # [n, step]
        seen = seen.repeat(query.shape[2], 1)  # [R * n, step]
        score = score.masked_fill_(~seen, -torch.inf)
        lse = score.logsumexp(-1)
        weight = score.masked_fill((lse == -torch.inf)[..., None], 0).softmax(-1).masked_fill(~seen, 0)
        out = weight @ v if all_finite(v) else visible_product(weight, seen, v)
        total = merged(torch.stack([total[0], out]), torch.stack([total[1], lse]))
    return _by_head(query, *total)


def _to_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    token: Tensor,
    last: Tensor,
    placement: Placement,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor]:
    """As `_to_all`, for the blocks that each query, `token [n]` of the sequence, chooses by the means `[B, G, C, D]` of all blocks."""
    settings = with_bounded_top_k(settings, means.shape[2] + 1)  # and the query's own block
    blocks = blocks_to_read(query, means, token.expand(query.shape[0], -1), settings)  # [B, G, F, n, K]
    blocks = placement.local(blocks).sort(-1, descending=True).values  # -1 for blocks of other processes, at the end
    most = int((blocks >= 0).sum(-1).max())
    if not most:
        return _by_head(query, *_nothing(query.flatten(2, 3), value))
    start = token.new_zeros(query.shape[0], 1)
    return attend_to_blocks(query, KeyValueReader.of(key, value), blocks[..., :most], start, last, settings)


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and log-sum-exps of queries `[..., D]` that read no key."""
    return query.new_zeros(*query.shape[:-1], value.shape[-1]), query.new_full(query.shape[:-1], -torch.inf)


def _by_head(query: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, G, R * n, Dv]`, `[B, G, R * n]` -> `[B, H, n, Dv]`, `[B, H, n]` for `query [B, G, R, n, D]`."""
    return out.unflatten(2, query.shape[2:4]).flatten(1, 2), lse.unflatten(2, query.shape[2:4]).flatten(1, 2)
