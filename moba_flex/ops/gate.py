"""The gate: which past blocks each query reads (report, equations 5 and 6), in plain PyTorch.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, S blocks to choose, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings

# Scores that are held at a time: all of them (queries x blocks) would grow with the square of the number of tokens.
_SCORES_AT_ONCE = 1 << 19
_FACTOR = -7046029254386353131  # odd, without a pattern in its bits: products wrap around and spread over all int64


def block_means(key: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, G, C * P, D]` -> `[B, G, C, D]`: the mean of each block's real keys, in at least float32 (equation 6)."""
    blocks = key.unflatten(2, (layout.n_key_blocks, layout.width))
    return means_of(blocks, layout.block_keys.clamp(min=1)[:, None, :, None])


def means_of(blocks: Tensor, count: Tensor | int) -> Tensor:
    """`[..., P, D]`, 0 in empty slots -> the means `[..., D]` of `count` keys each, in at least float32.

    Equal blocks have bitwise equal means in all callers: the order of a sum depends on strides, so the input is made contiguous.
    """
    return blocks.contiguous().sum(-2, dtype=accumulation_dtype(blocks.dtype)) / count


def some_are_equal(mean: Tensor, exists: Tensor) -> bool:
    """Whether two of the means `[B, G, C, D]` of blocks that `exists [B, C]` may be equal. Cheap: it compares two elements of each."""
    two = (mean[..., :2] + 0.0).contiguous()
    key = (two.view(torch.int64) if two.shape[-1] == 2 else two)[..., 0]
    key = torch.where(exists[:, None], key, torch.arange(mean.shape[2], device=mean.device)).sort(-1).values
    return bool((key[..., 1:] == key[..., :-1]).any())


def first_of_equals(mean: Tensor) -> Tensor:
    """`[B, G, C, D]` -> `[B, G, C]` int64: the first block with the same mean, bit for bit, which may be the block itself.

    Scores of equal blocks may be rounded differently, so all of them get the score of the first, and tie.
    """
    block = torch.arange(mean.shape[2], device=mean.device)
    place = _mixed(torch.arange(mean.shape[3], device=mean.device))
    key, order = _mixed(_bits(mean) ^ place).sum(-1).sort(dim=-1, stable=True)  # equal means become adjacent, the first block in front
    new = torch.nn.functional.pad(key[..., 1:] != key[..., :-1], (1, 0), value=True)
    first = order.gather(-1, torch.where(new, block, 0).cummax(-1).values)
    first = torch.zeros_like(order).scatter(-1, order, first)
    same = (mean.gather(2, first[..., None].expand_as(mean)) == mean).all(-1)
    return torch.where(same, first, block)


def with_ties(score: Tensor, mean: Tensor) -> Tensor:
    """Scores `[B, H, n, C]` in which blocks with the same mean `[B, G, C, D]` have the same score."""
    first = first_of_equals(mean).repeat_interleave(score.shape[1] // mean.shape[1], 1)
    return score.gather(-1, first[:, :, None].expand_as(score))


def _mixed(x: Tensor) -> Tensor:
    """An int64 hash of each element: different elements have different ones."""
    for _ in range(2):
        x = (x ^ _high_half(x)) * _FACTOR
    return x ^ _high_half(x)


def _high_half(x: Tensor) -> Tensor:
    """The upper 32 bits of int64. A shift alone would repeat the sign."""
    return (x >> 32) & 0xFFFFFFFF


def _bits(x: Tensor) -> Tensor:
    """Float32 or float64 as int64, the same for 0 and -0."""
    return (x + 0.0).contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32).long()


def candidates(layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """Two `[B, Q]` int32: a query block may be routed to the blocks from the first to before the second."""
    return layout.first, layout.own if settings.causal else layout.end


def best_blocks(score: Tensor, candidate: Tensor, count: int, finite: bool) -> Tensor:
    """`[..., C]` scores -> `[..., count]` int32: the best candidate blocks in no particular order, padded with -1.

    Ties go to the earlier block. NaN counts as infinity, so that it reaches the outputs that can see it. `finite` says that all scores
    are finite. `score` is modified.
    """
    kept = min(count, score.shape[-1])
    if not finite:  # after this, -inf means only: no candidate
        score.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(score.dtype).min)
    if not candidate.all():
        score.masked_fill_(~candidate, -torch.inf)
    value, block = score.topk(min(kept + 1, score.shape[-1]), dim=-1)
    tied = (value[..., kept - 1] == value[..., -1]) & (value[..., -1] > -torch.inf) if value.shape[-1] > kept else None
    value, block = value[..., :kept], block[..., :kept]
    block = block.int().masked_fill_(value == -torch.inf, -1)
    if tied is not None and tied.any():  # topk breaks ties arbitrarily
        order = score[tied].argsort(dim=-1, descending=True, stable=True)
        block[tied] = order[..., :kept].int()
    return torch.nn.functional.pad(block, (0, count - kept), value=-1)


def forced_blocks(layout: BlockLayout, settings: AttentionSettings) -> Tensor:
    """`[B, Q, sink_blocks + recent_blocks]` int32: the blocks that a query block reads regardless of scores, -1 for none."""
    first, own = layout.first[..., None], layout.own[..., None]
    step = torch.arange(settings.sink_blocks + settings.recent_blocks, device=own.device, dtype=torch.int32)
    sink, recent = first + step[: settings.sink_blocks], own - 1 - step[: settings.recent_blocks]
    return torch.cat([torch.where(sink < own, sink, -1), torch.where(recent >= first + settings.sink_blocks, recent, -1)], -1)


def _largest(x: Tensor) -> float:
    return max(abs(float(bound)) for bound in torch.aminmax(x))


def choose(query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings) -> Tensor:
    """`[B, H, Q * P, D]`, `[B, G, C * P, D]` -> `[B, H, Q * P, S]` int32, the chosen blocks, -1 if there are fewer.

    Sink and recent blocks come last; the others are chosen by score.
    """
    rows, heads, slots = query.shape[:3]
    groups, n_blocks = key.shape[1], layout.n_key_blocks
    chosen = torch.full((rows, heads, slots, settings.n_routed), -1, dtype=torch.int32, device=query.device)
    if settings.n_routed == 0:
        return chosen
    free = settings.n_free
    query, key = query.contiguous(), key.contiguous()  # otherwise products may round differently, which changes near-ties
    mean = block_means(key, layout)
    first, last = candidates(layout, settings)
    begin, stop = first[..., None] + settings.sink_blocks, last[..., None] - settings.recent_blocks
    block = torch.arange(n_blocks, device=query.device)
    offset = torch.arange(layout.query_width, device=query.device)
    real = (offset >= layout.query_start[..., None]) & (offset < layout.query_stop[..., None])  # [B, Q, P]
    out = chosen.unflatten(2, (-1, layout.query_width))  # [B, H, Q, P, S]
    if free < settings.n_routed:
        out[..., free:] = torch.where(real[..., None], forced_blocks(layout, settings)[:, :, None], -1)[:, None]

    finite = _largest(query) * _largest(mean) * query.shape[-1] < torch.finfo(torch.float32).max  # False for NaN too
    of_head = mean.repeat_interleave(heads // groups, 1)
    some_equal = bool(free) and some_are_equal(mean, layout.block_keys > 0)
    low, high = _blocks_of_sequences(layout, settings)
    step = max(1, _SCORES_AT_ONCE // max(1, rows * heads * layout.query_width * n_blocks))
    for start in range(0, layout.n_query_blocks if free else 0, step):
        part = slice(start, min(start + step, layout.n_query_blocks))
        seen = slice(min(low[part]), max(high[part]))
        if seen.stop > seen.start:
            candidate = (block[seen] >= begin[:, part]) & (block[seen] < stop[:, part])
            candidate = (candidate[:, :, None] & real[:, part, :, None])[:, None]  # [B, 1, q, P, seen]
            q = query[:, :, layout.slots(part)].to(mean.dtype)
            score = q @ of_head[:, :, seen].mT
            if some_equal:
                score = with_ties(score, mean[:, :, seen])
            score = score.unflatten(2, (-1, layout.query_width))
            best = best_blocks(score, candidate, free, finite)
            out[:, :, part, :, :free] = torch.where(best >= 0, best + seen.start, -1) if seen.start else best
    return chosen


def _blocks_of_sequences(layout: BlockLayout, settings: AttentionSettings) -> tuple[list[int], list[int]]:
    """Per query block, the first block and one past the last that it may be routed to in any row. Others are not scored."""
    if layout.dense:
        query_blocks = range(layout.n_query_blocks)
        return [0] * len(query_blocks), [layout.last_own(i) if settings.causal else layout.n_key_blocks for i in query_blocks]
    first, last = candidates(layout, settings)
    return first.amin(0).tolist(), last.amax(0).tolist()
