"""The gate: which past blocks each query reads (report, equations 5 and 6), in plain PyTorch.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, S blocks to choose, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BlockLayout
from .spec import Spec

# How many scores are held at a time. Scores are queries x blocks: all of them at once would grow with the square of the tokens.
_SCORES_AT_ONCE = 1 << 22
_NONE = torch.iinfo(torch.int64).min
_LAST = torch.iinfo(torch.int32).max
_FORCED = _LAST << 32  # above every score, infinity too


def block_means(key: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, G, C * P, D]` -> `[B, G, C, D]`: the mean of each block's real keys, in float32 at least (equation 6)."""
    wide = torch.promote_types(key.dtype, torch.float32)
    total = key.unflatten(2, (layout.n_key_blocks, layout.width)).sum(3, dtype=wide)
    return total / layout.block_keys.clamp(min=1)[:, None, :, None]


def candidates(layout: BlockLayout, spec: Spec) -> tuple[Tensor, Tensor]:
    """`[B, Q]` int32 twice: a query block chooses among the blocks from the first to before the second."""
    return layout.first, layout.own if spec.causal else layout.end


def sortable(score: Tensor) -> Tensor:
    """float32 `[..., C]` -> int64 keys, all different, in the order of choice: higher score first, then the earlier block.

    NaN counts as infinity, so that it reaches the outputs that can see it; -0.0 equals 0.0.
    """
    bits = torch.where(score.isnan(), torch.inf, score + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & _LAST)
    block = torch.arange(score.shape[-1], device=score.device)
    return (ordered.long() << 32) | (_LAST - block)


def best_blocks(score: Tensor, candidate: Tensor, forced: Tensor | None, count: int) -> Tensor:
    """`[..., C]` scores -> `[..., count]` int32: the best candidate blocks in no particular order, -1 where there are fewer.

    Blocks that are `forced` come first; they too must be candidates.
    """
    kept = min(count, score.shape[-1])
    if score.dtype == torch.float64:  # does not fit a 64-bit key beside its block: only checks use it, so full sorts will do
        rank = candidate.int() if forced is None else candidate.int() + (candidate & forced)
        order = torch.where(score.isnan(), torch.inf, score).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        block = order[..., :kept]
        block = torch.where(candidate.gather(-1, block), block, -1)
    else:
        key = sortable(score)
        if forced is not None:
            key = torch.where(forced, (key & 0xFFFFFFFF) | _FORCED, key)
        key = key.masked_fill_(~candidate, _NONE).topk(kept, dim=-1, sorted=False).values
        block = torch.where(key == _NONE, -1, _LAST - (key & 0xFFFFFFFF))
    return torch.nn.functional.pad(block.int(), (0, count - kept), value=-1)


def choose(query: Tensor, key: Tensor, layout: BlockLayout, spec: Spec) -> Tensor:
    """`[B, H, Q * P, D]`, `[B, G, C * P, D]` -> `[B, H, Q * P, S]` int32, the chosen blocks, -1 where there are fewer.

    Sink and recent blocks are among them: they are chosen before the scores are asked.
    """
    rows, heads, slots, width = query.shape
    groups, n_blocks, count = key.shape[1], layout.n_key_blocks, spec.routed
    chosen = torch.full((rows, heads, slots, count), -1, dtype=torch.int32, device=query.device)
    if count == 0:
        return chosen
    mean = block_means(key, layout)
    first, last = candidates(layout, spec)
    block = torch.arange(n_blocks, device=query.device)
    offset = torch.arange(layout.width, device=query.device)
    by_group = query.unflatten(1, (groups, heads // groups)).unflatten(3, (-1, layout.width))  # [B, G, H/G, Q, P, D]
    out = chosen.unflatten(1, (groups, heads // groups)).unflatten(3, (-1, layout.width))

    done = 0
    while done < layout.n_query_blocks:
        n = max(1, _SCORES_AT_ONCE // max(1, rows * heads * layout.width * n_blocks))
        part = slice(done, min(done + n, layout.n_query_blocks))
        seen = min(n_blocks, layout.last_own(part.stop - 1)) if spec.causal else n_blocks
        if seen:
            real = (offset >= layout.query_start[:, part, None]) & (offset < layout.query_stop[:, part, None])
            begin, stop = first[:, part, None], last[:, part, None]
            candidate = (block[:seen] >= begin) & (block[:seen] < stop)
            candidate = (candidate[:, :, None] & real[..., None])[:, None, None]  # [B, 1, 1, q, P, seen]
            forced = None
            if spec.sink_blocks or spec.recent_blocks:
                forced = (block[:seen] < begin + spec.sink_blocks) | (block[:seen] >= stop - spec.recent_blocks)
                forced = forced[:, None, None, :, None]
            q = by_group[:, :, :, part].to(mean.dtype)
            score = (q.flatten(2, 4) @ mean[:, :, :seen].mT).view(*q.shape[:-1], seen)
            out[:, :, :, part] = best_blocks(score, candidate.expand_as(score), forced, count)
        done = part.stop
    return chosen
