"""The gate without a score matrix in memory: scores of a tile of queries against the block means, and a running top-k.

Precision: means are float32, and choices are those of float32 scores. Only scores that are equal up to float32 rounding may be ordered
differently. float32 queries use float32 products. Scores of bfloat16 or float16 queries are sums of tensor-core products:

- The lane search multiplies the high and the low part of a mean in the query's dtype. Together these have at least 17 bits, fewer in
  float16 if means are far below 0.01. The norms of the query and of the rest of the mean bound the error. If it could change the choice
  between two blocks, their float32 means decide.
- The exact search runs if more blocks are in doubt, or if too many are to be chosen. It multiplies three parts of a mean, which hold all
  bits of float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from ...core.settings import AttentionSettings
from ..gate import candidates
from .block_means import BlockMeans, block_means, norm, rest_scale
from .sizes import cdiv, gpu_memory, next_power_of_2, padded_width

# With more blocks to choose, five of them too often share a lane. With more bits for the index, too many scores look equal.
_MOST_IN_LANES, _MOST_BITS = 16, 8


@triton.jit
def _scores(q, MEAN, HIGH, LOW, REST, at, mask):
    # From the high and low parts only if REST is None.
    if HIGH is None:
        score = tl.dot(q, tl.load(MEAN + at, mask=mask, other=0.0), input_precision="ieee")
    else:
        score = tl.zeros([q.shape[0], at.shape[1]], tl.float32)
        if REST is not None:
            score = tl.dot(q, tl.load(REST + at, mask=mask, other=0.0)) * (1 / rest_scale(q.dtype))
        score = tl.dot(q, tl.load(LOW + at, mask=mask, other=0.0), score)
        score = tl.dot(q, tl.load(HIGH + at, mask=mask, other=0.0), score)
    return score


@triton.jit
def _bound(x, bits: tl.constexpr, upper: tl.constexpr):
    """The smallest or largest float32 that differs from `x` only in its last bits."""
    x_bits = x.to(tl.int32, bitcast=True)
    return tl.where((x < 0) != upper, x_bits | bits, x_bits & ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _lead(queries, MEAN, chosen, rival, wanted, D: tl.constexpr):
    # By how much the query at each address scores `chosen` higher than `rival`; 0 if not `wanted`.
    lead = tl.zeros_like(wanted.to(tl.float32))
    at_once: tl.constexpr = 16 if D <= 256 else 64  # limits the number of unrolled copies
    for start in tl.static_range(0, D, at_once):
        d = start + tl.arange(0, at_once)[None, :]
        mask = wanted[:, None] & (d < D)
        difference = tl.load(MEAN + chosen[:, None] * D + d, mask=mask, other=0.0)
        difference -= tl.load(MEAN + rival[:, None] * D + d, mask=mask, other=0.0)
        lead += tl.sum(tl.load(queries[:, None] + d, mask=mask, other=0.0).to(tl.float32) * difference, 1)
    return lead


@triton.jit
def _turn(q, MEAN, HIGH, LOW, base, c, end, turn, bits: tl.constexpr, since, until, R: tl.constexpr, D: tl.constexpr, d):
    # The scores of blocks c, one per lane, with the index of the turn in their last bits; the lowest float if not a candidate.
    at = (base + c.to(tl.int64))[None, :] * D + d[:, None]
    score = _scores(q, MEAN, HIGH, LOW, None, at, (c[None, :] < end) & (d[:, None] < D))
    score = ((score.to(tl.int32, bitcast=True) & ~bits) | turn).to(tl.float32, bitcast=True)
    candidate = c[None, :] < until
    if R > 1:
        candidate = candidate & (c[None, :] >= since)
    return tl.where(candidate, score, -3.4028234e38)


@triton.jit
def _largest(ERROR, begin, end):
    at_once: tl.constexpr = 1024
    largest = tl.zeros([at_once], tl.float32)
    for start in range(begin, end, at_once):
        block = start + tl.arange(0, at_once)
        largest = tl.maximum(largest, tl.load(ERROR + block, mask=block < end, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def _to_query(OUT, bh, N_BLOCKS, P: tl.constexpr, slot, S: tl.constexpr):
    return OUT + (bh.to(tl.int64) * N_BLOCKS * P + slot.to(tl.int64)) * S


@triton.jit
def _flags(REDO, bh, tile, PER_TILE: tl.constexpr):
    # Of a program, one for each exact search that it may request.
    return REDO + (bh * tl.num_programs(0) * PER_TILE + tile * PER_TILE + tl.arange(0, PER_TILE))


@triton.jit
def _store_forced(out, first, last, real, here, SINK: tl.constexpr, RECENT: tl.constexpr):
    for s in tl.static_range(SINK):
        tl.store(out + s, tl.where(real & (first + s < last), first + s, -1), mask=here)
    for r in tl.static_range(RECENT):
        tl.store(out + SINK + r, tl.where(real & (last - 1 - r >= first + SINK), last - 1 - r, -1), mask=here)


@triton.jit
def _lanes_kernel(
    QUERY, MEAN, HIGH, LOW, ERROR, OUT, REDO, FIRST, LAST, START, STOP, TOKEN, stride_b, stride_h, stride_n, H, G, C, N_BLOCKS,
    SINK: tl.constexpr, RECENT: tl.constexpr, FREE: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BITS: tl.constexpr, TURNS: tl.constexpr, REDO_M: tl.constexpr,
):  # fmt: skip
    # One program: M queries. Lane i gets the blocks begin + i, begin + i + T, and so on, and keeps its best four, so nothing is compared
    # across lanes until the end. The index of a block within its lane replaces the last BITS bits of its score. The choice is certain
    # if neither these bits nor the rest of a mean can change it, and no lane dropped a block that might have been chosen. If two blocks
    # are in doubt, they are compared once more. If more are, or a score is infinite or NaN, REDO requests an exact search.
    tile, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    group = (b * G + h // (H // G)).to(tl.int64)
    slot = tile * M + tl.arange(0, M)
    block = (tile * M + tl.arange(0, R)) // P  # R is 1 if all queries share a block: derived values are then scalars
    meta, exists = b * N_BLOCKS + block, block < N_BLOCKS
    first, last = tl.load(FIRST + meta, mask=exists, other=C), tl.load(LAST + meta, mask=exists, other=0)
    start, stop = tl.load(START + meta, mask=exists, other=0), tl.load(STOP + meta, mask=exists, other=0)
    real = (slot - block * P >= start) & (slot - block * P < stop)
    token = tl.load(TOKEN + meta, mask=exists, other=0) + slot - block * P
    if tl.max(last - first, 0) <= FREE + SINK + RECENT:  # all candidates are chosen
        out, here = _to_query(OUT, bh, N_BLOCKS, P, slot, FREE + SINK + RECENT), slot < N_BLOCKS * P
        for j in tl.static_range(FREE):
            tl.store(out + j, tl.where(real & (first + SINK + j < last - RECENT), first + SINK + j, -1), mask=here)
        _store_forced(out + FREE, first, last, real, here, SINK, RECENT)
        tl.store(_flags(REDO, bh, tile, M // REDO_M), tl.zeros([M // REDO_M], tl.int32))
        return
    d, lane = tl.arange(0, DP), tl.arange(0, T)
    queries = QUERY + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + token.to(tl.int64) * stride_n
    q = tl.load(queries[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)

    none: tl.constexpr = -3.4028234e38
    turn_bits: tl.constexpr = (1 << BITS) - 1
    nan: tl.constexpr = tl.PropagateNan.ALL  # NaN stays in the lanes, and so does infinity, which the index bits turn into NaN
    best1 = tl.full([M, T], none, tl.float32)
    best2, best3, best4, left = best1, best1, best1, best1
    begin, end = tl.min(first, 0) + SINK, tl.max(last, 0) - RECENT
    since, until = first[:, None] + SINK, last[:, None] - RECENT
    doubt = tl.zeros([M], tl.float32)  # two scores that differ by more are ordered correctly
    if ERROR is not None:
        doubt = 2.001 * norm(q.to(tl.float32), 1, DP)
        if TURNS == 1:  # otherwise after the loop, which then needs fewer registers
            doubt *= _largest(ERROR + group * C, begin, end)
    for turn in tl.range(0, tl.cdiv(end - begin, T), TURNS):
        score = _turn(q, MEAN, HIGH, LOW, group * C, begin + turn * T + lane, end, turn, turn_bits, since, until, R, D, d)
        if TURNS == 1:
            best1, score = tl.maximum(best1, score, nan), tl.minimum(best1, score, nan)
            best2, score = tl.maximum(best2, score, nan), tl.minimum(best2, score, nan)
            best3, score = tl.maximum(best3, score, nan), tl.minimum(best3, score, nan)
            best4, score = tl.maximum(best4, score, nan), tl.minimum(best4, score, nan)
            left = tl.maximum(left, score, nan)
        else:
            # 16 comparisons for two scores instead of 18: the better one competes with the fourth, the other with the third. The best
            # four of six remain, and are sorted again.
            turn += 1
            other = _turn(q, MEAN, HIGH, LOW, group * C, begin + turn * T + lane, end, turn, turn_bits, since, until, R, D, d)
            score, other = tl.maximum(score, other, nan), tl.minimum(score, other, nan)
            left = tl.maximum(left, tl.maximum(tl.minimum(best3, other, nan), tl.minimum(best4, score, nan), nan), nan)
            best3, best4 = tl.maximum(best3, other, nan), tl.maximum(best4, score, nan)
            best1, best3 = tl.maximum(best1, best3, nan), tl.minimum(best1, best3, nan)
            best2, best4 = tl.maximum(best2, best4, nan), tl.minimum(best2, best4, nan)
            best1, best2 = tl.maximum(best1, best2, nan), tl.minimum(best1, best2, nan)
            best3, best4 = tl.maximum(best3, best4, nan), tl.minimum(best3, best4, nan)

    out = _to_query(OUT, bh, N_BLOCKS, P, slot, FREE + SINK + RECENT)
    here = slot < N_BLOCKS * P
    found = tl.zeros([M], tl.int32)
    normal = tl.full([M], 1, tl.int32)
    most = tl.full([M], float("inf"), tl.float32)
    for j in tl.static_range(FREE):
        before, most = most, tl.max(best1, 1)
        of_lane = tl.min(tl.where(best1 == most[:, None], lane[None, :], T), 1)
        some = most > none
        chosen = begin + (most.to(tl.int32, bitcast=True) & turn_bits) * T + of_lane
        chosen = tl.where(real & some, chosen, -1)
        if j < FREE - 1:
            tl.store(out + j, chosen, mask=here)
        found += some.to(tl.int32)
        normal &= (tl.abs(most) > 1.2e-38).to(tl.int32)  # subnormal values may lose their last bits
        taken = lane[None, :] == of_lane[:, None]
        best1 = tl.where(taken, best2, best1)
        best2 = tl.where(taken, best3, best2)
        best3 = tl.where(taken, best4, best3)
        best4 = tl.where(taken, none, best4)
    _store_forced(out + FREE, first, last, real, here, SINK, RECENT)

    if ERROR is not None and TURNS > 1:
        doubt *= _largest(ERROR + group * C, begin, end)
    second, dropped = tl.max(best1, 1), tl.max(left, 1)
    ahead = _bound(most, turn_bits, False)
    certain = (ahead - _bound(tl.maximum(second, dropped), turn_bits, True) > doubt) | ((second == none) & (dropped == none))
    if BITS > 0 or ERROR is not None:
        rival_lane = tl.min(tl.where(best1 == second[:, None], lane[None, :], T), 1)
        third = tl.maximum(tl.max(tl.where(lane[None, :] == rival_lane[:, None], best2, best1), 1), dropped)
        pair = real & ~certain & (second > none) & (ahead - _bound(third, turn_bits, True) > doubt)
        pair = pair & (_bound(before, turn_bits, False) - _bound(second, turn_bits, True) > doubt)
        if tl.max(pair.to(tl.int32), 0) > 0:
            rival = begin + (second.to(tl.int32, bitcast=True) & turn_bits) * T + rival_lane
            lead = _lead(queries, MEAN, group * C + chosen, group * C + rival, pair, D)
            chosen = tl.where(pair & ((lead < 0) | ((lead == 0) & (rival < chosen))), rival, chosen)
        certain = certain | pair
    tl.store(out + FREE - 1, chosen, mask=here)
    wanted = tl.minimum(tl.maximum(last - RECENT - first - SINK, 0), FREE)
    finite = tl.min((left == left).to(tl.int32), 1)
    certain = certain & (found == wanted) & (normal > 0) & (finite > 0)
    redo = tl.reshape((real & ~certain).to(tl.int32), [M // REDO_M, REDO_M])
    tl.store(_flags(REDO, bh, tile, M // REDO_M), tl.max(redo, 1))


@triton.jit
def _search_kernel(
    QUERY, MEAN, HIGH, LOW, REST, OUT, REDO, FIRST, LAST, START, STOP, TOKEN, stride_b, stride_h, stride_n, H, G, C, N_BLOCKS,
    TILES, M_OF_TILE, SINK: tl.constexpr, RECENT: tl.constexpr, FREE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    # One program: M queries of one query block and head, which all choose from the same blocks. Longest searches start first.
    tile, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    if REDO is not None:  # noqa: SIM102 -- `and` in a kernel does not skip the load
        if tl.load(REDO + bh * TILES + tile * M // M_OF_TILE) == 0:
            return
    b, h = bh // H, bh % H
    group = (b * G + h // (H // G)).to(tl.int64)
    block = tile * M // P
    slot = tile * M + tl.arange(0, M)
    in_block, d = slot - block * P, tl.arange(0, DP)
    meta = b * N_BLOCKS + block
    first, last = tl.load(FIRST + meta), tl.load(LAST + meta)
    real = (in_block >= tl.load(START + meta)) & (in_block < tl.load(STOP + meta))
    token = (tl.load(TOKEN + meta) + in_block).to(tl.int64)
    q = tl.load(
        QUERY + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + token[:, None] * stride_n + d[None, :],
        mask=real[:, None] & (d[None, :] < D),
        other=0.0,
    )

    # Entries beyond FREE hold infinity, so they are never replaced. Empty entries have distinct negative block indices.
    j, column = tl.arange(0, K), tl.arange(0, T)
    best = tl.zeros([M, K], tl.float32) + tl.where(j < FREE, float("-inf"), float("inf"))[None, :]
    chosen = tl.zeros([M, K], tl.int32) - 1 - j[None, :]
    least = tl.min(best, 1)
    for start in range(first + SINK, last - RECENT if FREE > 0 else first, T):
        c = start + column
        ok = c < last - RECENT
        at = (group * C + c.to(tl.int64))[None, :] * D + d[:, None]
        mask = ok[None, :] & (d[:, None] < D)
        score = _scores(q, MEAN, HIGH, LOW, REST, at, mask)
        score = tl.where(score != score, float("inf"), tl.maximum(score, -3.4028234e38))
        score = tl.where(ok[None, :], score, float("-inf"))
        # Most tiles hold nothing better than what a query has: extract the best of the tile as long as any query takes it. Blocks come in
        # ascending order, and only a higher score displaces an entry, the latest block first, so ties go to the earlier block.
        most, place = tl.max(score, 1, return_indices=True)
        while tl.max((most > least).to(tl.int32), 0) > 0:
            latest = tl.max(tl.where(best == least[:, None], chosen, -K - 1), 1)
            displaced = (chosen == latest[:, None]) & (most > least)[:, None]
            best = tl.where(displaced, most[:, None], best)
            chosen = tl.where(displaced, (start + place)[:, None], chosen)
            least = tl.min(best, 1)
            score = tl.where(column[None, :] == place[:, None], float("-inf"), score)
            most, place = tl.max(score, 1, return_indices=True)

    out = _to_query(OUT, bh, N_BLOCKS, P, slot, FREE + SINK + RECENT)
    chosen = tl.where(real[:, None] & (chosen >= 0), chosen, -1)
    tl.store(out[:, None] + j[None, :], chosen, mask=(j[None, :] < FREE) & (slot[:, None] >= 0))
    _store_forced(out + FREE, first, last, real, None, SINK, RECENT)


@lru_cache(maxsize=256)
def _program(dtype: torch.dtype, free: int, slots: int, width: int, room: int, in_registers: int) -> tuple[int, int, int, dict[str, int]]:
    """Queries and lanes per program, turns per loop iteration, and compile options, to choose `free` blocks per query.

    The fastest configuration that needs at most `room` bytes of shared memory for queries and means of head dimension `width`.
    `slots`: slots per query block. `in_registers`: how many of the loop's pipeline stages hold their means in registers.
    """
    halves, fastest = (1 if dtype == torch.float32 else 2), []
    if dtype != torch.float32 and free <= 8:
        fastest = [(128, 32, 1, 8), (64, 32, 1, 4)]
    elif dtype != torch.float32:
        fastest = [(64, 64, 1, 4)]
        if slots % 128 == 0:  # all queries of a program may choose the same blocks
            fastest = [(128, 64, 2, 8), *fastest]
    for queries, lanes, turns, warps in (*fastest, (32, 32, 1, 4), (16, 16, 1, 4)):
        stages = min(3, (room // (width * dtype.itemsize) - queries) // (halves * lanes * turns) + in_registers)
        options = {"num_warps": warps, "num_stages": max(stages, 1)}
        if stages > turns:  # one more than an iteration reads, so that loads overlap products
            break
    if (queries, lanes) == (128, 32):  # two programs share a multiprocessor, and the loop spills nothing
        options["maxnreg"] = 128
    return queries, lanes, turns, options


def choose(query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings) -> Tensor:
    """`[B, H, Nq, D]`, `[B, G, Nk, D]` -> `[B, H, Q * P, S]` int32, the chosen blocks, -1 if there are fewer.

    Queries and keys are tokens or slots: `layout` says where blocks begin.
    """
    (rows, heads, _, width), slots = query.shape, layout.n_query_blocks * layout.query_width
    chosen = torch.empty(rows, heads, slots, settings.n_routed, dtype=torch.int32, device=query.device)
    if settings.n_routed == 0:
        return chosen
    free = settings.n_free
    shape = heads, key.shape[1], layout.n_key_blocks, layout.n_query_blocks
    sizes = {"D": width, "DP": padded_width(width), "P": layout.query_width}
    forced = {"SINK": settings.sink_blocks, "RECENT": settings.recent_blocks, "FREE": free}
    means = block_means(key, layout, query.dtype) if free else BlockMeans(query)  # no block is chosen by score then
    halves = query, means.mean, means.high, means.low
    places = *candidates(layout, settings), layout.query_start, layout.query_stop, layout.query_token, *query.stride()[:3], *shape

    room, major = gpu_memory(query.device)
    in_registers = 0 if major >= 9 else 1  # pipeline stages with means in registers: Hopper multiplies from shared memory
    tile, lanes, turns, options = _program(query.dtype, free, layout.query_width, sizes["DP"], room, in_registers)
    if not major:  # supported only by NVIDIA's compiler
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    searched = min(tile, 64)
    bits = (cdiv(layout.n_key_blocks, lanes) - 1).bit_length()
    tiles, redo, searches = cdiv(slots, tile), None, {"num_warps": 4, "num_stages": 3}
    if 0 < free <= _MOST_IN_LANES and bits <= _MOST_BITS:
        redo = chosen.new_empty(rows * heads * tiles * tile // searched)
        if major in (9, 10) and query.dtype != torch.float32 and sizes["DP"] <= 128:  # others multiply from registers
            searches["maxnreg"] = 128  # most programs exit at once, and four share a multiprocessor
        spans = 1 if layout.query_width % tile == 0 else tile
        forms = {"M": tile, "R": spans, "T": lanes, "BITS": bits, "TURNS": turns, "REDO_M": searched}
        _lanes_kernel[(tiles, rows * heads)](*halves, means.error, chosen, redo, *places, **sizes, **forced, **forms, **options)
    m = math.gcd(layout.query_width, searched)
    forms = {"K": next_power_of_2(max(free, 2)), "M": m, "T": searched}
    operands = *halves, means.rest, chosen, redo, *places, tiles * tile // searched, searched
    _search_kernel[(slots // m, rows * heads)](*operands, **sizes, **forced, **forms, **searches)
    return chosen
