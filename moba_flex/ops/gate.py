"""The gate: which past blocks each query reads (report, equations 5 and 6), in plain PyTorch.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, S blocks to choose, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings

# How many scores are held at a time. Scores are queries x blocks: all of them at once would grow with the square of the tokens.
_SCORES_AT_ONCE = 1 << 19


def block_means(key: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, G, C * P, D]` -> `[B, G, C, D]`: the mean of each block's real keys, in float32 at least (equation 6)."""
    wide = torch.promote_types(key.dtype, torch.float32)
    total = key.unflatten(2, (layout.n_key_blocks, layout.width)).sum(3, dtype=wide)
    return total / layout.block_keys.clamp(min=1)[:, None, :, None]


def candidates(layout: BlockLayout, spec: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`[B, Q]` int32 twice: a query block may be routed to the blocks from the first to before the second."""
    return layout.first, layout.own if spec.causal else layout.end


def best_blocks(score: Tensor, candidate: Tensor, count: int, finite: bool) -> Tensor:
    """`[..., C]` scores -> `[..., count]` int32: the best candidate blocks in no particular order, -1 where there are fewer.

    Among equals the earlier block is better. NaN counts as infinity, so that it reaches the outputs that can see it. `finite` says
    that there are no such scores. `score` is changed.
    """
    kept = min(count, score.shape[-1])
    if not finite:  # afterwards -inf means one thing only: no candidate
        score.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(score.dtype).min)
    if not candidate.all():
        score.masked_fill_(~candidate, -torch.inf)
    value, block = score.topk(min(kept + 1, score.shape[-1]), dim=-1)
    tied = (value[..., kept - 1] == value[..., -1]) & (value[..., -1] > -torch.inf) if value.shape[-1] > kept else None
    value, block = value[..., :kept], block[..., :kept]
    block = block.int().masked_fill_(value == -torch.inf, -1)
    if tied is not None and tied.any():  # topk takes any of the equals
        order = score[tied].argsort(dim=-1, descending=True, stable=True)
        block[tied] = order[..., :kept].int()
    return torch.nn.functional.pad(block, (0, count - kept), value=-1)


def forced_blocks(layout: BlockLayout, spec: AttentionSettings) -> Tensor:
    """`[B, Q, sink_blocks + recent_blocks]` int32: the blocks that a query block reads whatever the scores, -1 for none."""
    first, own = layout.first[..., None], layout.own[..., None]
    step = torch.arange(spec.sink_blocks + spec.recent_blocks, device=own.device, dtype=torch.int32)
    sink, recent = first + step[: spec.sink_blocks], own - 1 - step[: spec.recent_blocks]
    return torch.cat([torch.where(sink < own, sink, -1), torch.where(recent >= first + spec.sink_blocks, recent, -1)], -1)


def _largest(x: Tensor) -> float:
    return max(abs(float(bound)) for bound in torch.aminmax(x))


def choose(query: Tensor, key: Tensor, layout: BlockLayout, spec: AttentionSettings) -> Tensor:
    """`[B, H, Q * P, D]`, `[B, G, C * P, D]` -> `[B, H, Q * P, S]` int32, the chosen blocks, -1 where there are fewer.

    Sink and recent blocks are the last of them; the scores choose among the others.
    """
    rows, heads, slots = query.shape[:3]
    groups, n_blocks = key.shape[1], layout.n_key_blocks
    chosen = torch.full((rows, heads, slots, spec.routed), -1, dtype=torch.int32, device=query.device)
    if spec.routed == 0:
        return chosen
    free = spec.routed - spec.sink_blocks - spec.recent_blocks
    mean = block_means(key, layout)
    first, last = candidates(layout, spec)
    begin, stop = first[..., None] + spec.sink_blocks, last[..., None] - spec.recent_blocks
    block = torch.arange(n_blocks, device=query.device)
    offset = torch.arange(layout.width, device=query.device)
    real = (offset >= layout.query_start[..., None]) & (offset < layout.query_stop[..., None])  # [B, Q, P]
    out = chosen.unflatten(2, (-1, layout.width))  # [B, H, Q, P, S]
    if free < spec.routed:
        out[..., free:] = torch.where(real[..., None], forced_blocks(layout, spec)[:, :, None], -1)[:, None]

    finite = _largest(query) * _largest(mean) * query.shape[-1] < torch.finfo(torch.float32).max  # False for NaN too
    of_head = mean.repeat_interleave(heads // groups, 1)
    step = max(1, _SCORES_AT_ONCE // max(1, rows * heads * layout.width * n_blocks))
    for start in range(0, layout.n_query_blocks if free else 0, step):
        part = slice(start, min(start + step, layout.n_query_blocks))
        seen = min(n_blocks, layout.last_own(part.stop - 1)) if spec.causal else n_blocks
        if seen:
            candidate = (block[:seen] >= begin[:, part]) & (block[:seen] < stop[:, part])
            candidate = (candidate[:, :, None] & real[:, part, :, None])[:, None]  # [B, 1, q, P, seen]
            q = query[:, :, part.start * layout.width : part.stop * layout.width].to(mean.dtype)
            score = (q @ of_head[:, :, :seen].mT).unflatten(2, (-1, layout.width))
            out[:, :, part, :, :free] = best_blocks(score, candidate, free, finite)
    return chosen
