"""The gate in one kernel: scores of a tile of queries against the block means and a running top-k; no score matrix in memory.

Precision: means are float32. The product of bfloat16 or float16 queries with a float32 mean is the sum of two products on the matrix
units, with the mean's high and low half in the queries' dtype; float32 queries use float32 products. So choices are those of float32,
but for scores that are equal to within its rounding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BlockLayout
from ..gate import candidates
from ..spec import Spec


@triton.jit
def _means_kernel(
    KEY,
    HIGH,
    LOW,
    COUNT,
    stride_b,
    stride_g,
    stride_n,
    G,
    C,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    # One program: the mean of one block's keys.
    c, bg = tl.program_id(0), tl.program_id(1)
    b, g = bg // G, bg % G
    d, slot = tl.arange(0, DP), tl.arange(0, STEP)
    keys = tl.load(COUNT + b * C + c)
    base = KEY + b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g + c.to(tl.int64) * P * stride_n
    total = tl.zeros([STEP, DP], tl.float32)
    for start in range(0, keys, STEP):
        at = start + slot
        x = tl.load(base + at[:, None] * stride_n + d[None, :], mask=(at[:, None] < keys) & (d[None, :] < D), other=0.0)
        total += x.to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(keys, 1)
    high = mean.to(HIGH.dtype.element_ty)
    out = (bg.to(tl.int64) * C + c) * D + d
    tl.store(HIGH + out, high, mask=d < D)
    if LOW is not None:
        tl.store(LOW + out, (mean - high.to(tl.float32)).to(LOW.dtype.element_ty), mask=d < D)


def block_means(key: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor | None]:
    """`[B, G, C * P, D]` -> the mean of each block's real keys, `[B, G, C, D]`, as a high and a low half in the key's dtype."""
    rows, groups, _, width = key.shape
    high = key.new_empty(rows, groups, layout.n_key_blocks, width)
    low = None if key.dtype == torch.float32 else torch.empty_like(high)
    padded = triton.next_power_of_2(width)
    _means_kernel[(layout.n_key_blocks, rows * groups)](
        key,
        high,
        low,
        layout.block_keys,
        *key.stride()[:3],
        groups,
        layout.n_key_blocks,
        layout.width,
        width,
        padded,
        min(triton.next_power_of_2(layout.block_size), 64),
    )
    return high, low


@triton.jit
def _choose_kernel(
    QUERY, HIGH, LOW, OUT, FIRST, LAST, START, STOP, stride_b, stride_h, stride_n, H, G, C, N_BLOCKS,
    SINK: tl.constexpr, RECENT: tl.constexpr, FREE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    # One program: M queries of one query block and head, which all choose from the same blocks. Longest searches start first.
    tile, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    group = (b * G + h // (H // G)).to(tl.int64)
    block = tile * M // P
    slot = tile * M + tl.arange(0, M)
    in_block, d = slot - block * P, tl.arange(0, DP)
    meta = b * N_BLOCKS + block
    first, last = tl.load(FIRST + meta), tl.load(LAST + meta)
    real = (in_block >= tl.load(START + meta)) & (in_block < tl.load(STOP + meta))
    q = tl.load(
        QUERY + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + slot.to(tl.int64)[:, None] * stride_n + d[None, :],
        mask=real[:, None] & (d[None, :] < D),
        other=0.0,
    )

    # Places beyond FREE hold infinity, so nothing ever takes them. Empty places have block numbers of their own below 0.
    j, column = tl.arange(0, K), tl.arange(0, T)
    best = tl.zeros([M, K], tl.float32) + tl.where(j < FREE, float("-inf"), float("inf"))[None, :]
    chosen = tl.zeros([M, K], tl.int32) - 1 - j[None, :]
    least = tl.min(best, 1)
    for start in range(first + SINK, last - RECENT, T):
        c = start + column
        ok = c < last - RECENT
        at = (group * C + c.to(tl.int64))[None, :] * D + d[:, None]
        mask = ok[None, :] & (d[:, None] < D)
        if LOW is None:
            score = tl.dot(q, tl.load(HIGH + at, mask=mask, other=0.0), input_precision="ieee")
        else:
            score = tl.dot(q, tl.load(LOW + at, mask=mask, other=0.0))
            score = tl.dot(q, tl.load(HIGH + at, mask=mask, other=0.0), score)
        score = tl.where(score != score, float("inf"), tl.maximum(score, -3.4028234e38))
        score = tl.where(ok[None, :], score, float("-inf"))
        # Most tiles hold nothing better than what a query has: take the best of the tile out as long as any query wants it. Blocks come
        # in rising order and only a higher score displaces, the latest block first, so that among equals the earlier one stays.
        most, place = tl.max(score, 1, return_indices=True)
        while tl.max((most > least).to(tl.int32), 0) > 0:
            latest = tl.max(tl.where(best == least[:, None], chosen, -K - 1), 1)
            displaced = (chosen == latest[:, None]) & (most > least)[:, None]
            best = tl.where(displaced, most[:, None], best)
            chosen = tl.where(displaced, (start + place)[:, None], chosen)
            least = tl.min(best, 1)
            score = tl.where(column[None, :] == place[:, None], float("-inf"), score)
            most, place = tl.max(score, 1, return_indices=True)

    out = OUT + (bh.to(tl.int64) * N_BLOCKS * P + slot.to(tl.int64)) * (FREE + SINK + RECENT)
    chosen = tl.where(real[:, None] & (chosen >= 0), chosen, -1)
    tl.store(out[:, None] + j[None, :], chosen, mask=(j[None, :] < FREE) & (slot[:, None] >= 0))
    for s in tl.static_range(SINK):
        tl.store(out + FREE + s, tl.where(real & (first + s < last), first + s, -1))
    for r in tl.static_range(RECENT):
        tl.store(out + FREE + SINK + r, tl.where(real & (last - 1 - r >= first + SINK), last - 1 - r, -1))


def choose(query: Tensor, key: Tensor, layout: BlockLayout, spec: Spec) -> Tensor:
    """`[B, H, Q * P, D]`, `[B, G, C * P, D]` -> `[B, H, Q * P, S]` int32, the chosen blocks, -1 where there are fewer."""
    rows, heads, slots, width = query.shape
    chosen = torch.empty(rows, heads, slots, spec.routed, dtype=torch.int32, device=query.device)
    if spec.routed == 0:
        return chosen
    high, low = block_means(key, layout)
    first, last = candidates(layout, spec)
    free = spec.routed - spec.sink_blocks - spec.recent_blocks
    most = 64 if query.dtype != torch.float32 else 32
    tile = math.gcd(layout.width, most)
    _choose_kernel[(slots // tile, rows * heads)](
        query,
        high,
        low,
        chosen,
        first,
        last,
        layout.query_start,
        layout.query_stop,
        *query.stride()[:3],
        heads,
        key.shape[1],
        layout.n_key_blocks,
        layout.n_query_blocks,
        spec.sink_blocks,
        spec.recent_blocks,
        free,
        triton.next_power_of_2(max(free, 2)),
        layout.width,
        tile,
        most,
        width,
        max(16, triton.next_power_of_2(width)),
        num_warps=4,
        num_stages=3,
    )
    return chosen
