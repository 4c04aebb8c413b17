"""Decoding in three kernels: scores and a top-k per part of the means, attention to the chosen blocks in parts, sum of the parts.

Work is spread over blocks, because a few new tokens alone would leave a GPU idle. The kernels read the number of tokens from device
memory, so one CUDA graph serves all later tokens.

Keys are in a contiguous cache or in pages: only the slot of a token (`_slot`) and the mean of a block (`_means`) differ.

B batch, H query heads, G key heads, R = H / G, F selections per group (R, or 1 if its heads share one), n new tokens, C blocks, P tokens
per block, W pages of a row, D and Dv head dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.settings import AttentionSettings
from ..pages import Pages
from .sizes import cdiv, gpu_memory, next_power_of_2, padded_width

_NONE = tl.constexpr(-(1 << 63))  # below every score
_TILE = 64  # means that a program scores, keys that it reads at a time; fewer for large head dimensions
_PROGRAMS = 1024  # enough to fill a GPU several times
_SHARED_BYTES = 150_000  # maximum for keys and values in flight


@triton.jit
def _place(LENGTH, START, N, b, length_b):
    """The number of tokens including the new ones, and the row's first real token."""
    length = tl.full([], N, tl.int64) if LENGTH is None else tl.load(LENGTH + b * length_b)
    start = tl.full([], 0, tl.int64) if START is None else tl.load(START + b)
    return length, start


@triton.jit
def _slot(TABLE, b, W, token, there, page_stride, PAGE: tl.constexpr):
    """The slots of those tokens of a row that are `there`, from its page table. In a contiguous cache, a token's slot is its index."""
    if TABLE is None:
        return token
    else:
        return tl.load(TABLE + b * W + token // PAGE, mask=there, other=0) * page_stride + token % PAGE


@triton.jit
def _means(
    MEANS, TABLE, bg, b, g, G, C, W, block, length,
    P: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The means of `block [T]` as columns, undefined for incomplete blocks. Pages store the means of runs of tokens."""
    d = tl.arange(0, DP)
    if TABLE is None:
        mask = (block < C)[None, :] & (d < D)[:, None]
        return tl.load(MEANS + bg.to(tl.int64) * C * D + block[None, :].to(tl.int64) * D + d[:, None], mask=mask, other=0.0)
    else:
        there = block.to(tl.int64) * P + P <= length
        mask = there[None, :] & (d < D)[:, None]
        total = tl.zeros([DP, block.shape[0]], tl.float32)
        for i in range(P // RUN):
            token = block.to(tl.int64) * P + i * RUN
            run = _slot(TABLE, b, W, token, there, PAGE, PAGE) // RUN
            total += tl.load(MEANS + (run * G + g)[None, :] * D + d[:, None], mask=mask, other=0.0)
        return total / (P // RUN)


@triton.jit
def _rank(score, block):
    """Scores and blocks packed into integers that sort by preference: NaN counts as infinity, ties go to the earlier block."""
    score = tl.where(score != score, float("inf"), tl.maximum(score, -3.4028234e38))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)


@triton.jit(do_not_specialize=["N", "C", "W"])
def _choose_kernel(
    QUERY, KEY, MEANS, BEST, LENGTH, START, TABLE, query_b, query_h, query_n, key_b, key_g, key_n, N, G, length_b, W, C,
    NEW: tl.constexpr, R: tl.constexpr, F: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr,
    RUN: tl.constexpr, KEEP: tl.constexpr, T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    # One program: T blocks of one row and key head, and M queries. It first writes the means of blocks that the new tokens complete; most
    # programs have none, and programs of other queries write the same values. The means of pages are already written.
    part, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    length, start = _place(LENGTH, START, N, b, length_b)
    d, column, slot = tl.arange(0, DP), tl.arange(0, T), tl.arange(0, S)
    if TABLE is None:
        keys = KEY + b * key_b + g * key_g + start * key_n
        means = MEANS + bg.to(tl.int64) * C * D
        first = tl.maximum(length - NEW - start, 0) // P
        stop = tl.maximum(length - start, 0) // P
        for c in range(tl.maximum(first, part * T), tl.minimum(tl.minimum(stop, C), part * T + T)):
            total = tl.zeros([S, DP], tl.float32)
            for at in range(0, P, S):
                token = c * P + at + slot
                mask = (at + slot < P)[:, None] & (d < D)[None, :]
                total += tl.load(keys + token[:, None] * key_n + d[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(means + c * D + d, tl.sum(total, 0) / P, mask=d < D)
        tl.debug_barrier()

    row = tl.program_id(2) * M + tl.arange(0, M)
    new, f = row % NEW, row // NEW
    position = length - NEW + new - start
    own = tl.where(position < 0, -1, position // P)
    query = QUERY + b * query_b + new[:, None] * query_n + d[None, :]
    real = (row < F * NEW)[:, None] & (d < D)[None, :]
    q = tl.zeros([M, DP], tl.float32)
    for r in tl.static_range(R // F):  # heads that choose together: the sum of scores is the score of the sum
        q += tl.load(query + (g * R + f[:, None] + r) * query_h, mask=real, other=0.0).to(tl.float32)
    block = part * T + column
    mean = _means(MEANS, TABLE, bg, b, g, G, C, W, block, length, P, PAGE, RUN, D, DP)
    score = tl.dot(q, mean, input_precision="ieee")
    candidate = (block >= SINK)[None, :] & (block[None, :] < (own - RECENT)[:, None]) & (block < C)[None, :]
    rank = tl.where(candidate, _rank(score, block[None, :] + 0 * row[:, None]), _NONE)

    best = BEST + ((bg.to(tl.int64) * F + f) * NEW + new) * tl.num_programs(0) * KEEP + part * KEEP
    for s in range(KEEP):
        most = tl.max(rank, 1)
        tl.store(best + s, most, mask=row < F * NEW)
        rank = tl.where(rank == most[:, None], _NONE, rank)


@triton.jit(do_not_specialize=["N", "W", "found"])
def _attend_kernel(
    QUERY, KEY, VALUE, BEST, OUT, LSE, LENGTH, START, TABLE, query_b, query_h, query_n, key_b, key_g, key_n, value_b, value_g, value_n,
    N, G, length_b, W, page_stride, found, scale, softcap,
    NEW: tl.constexpr, R: tl.constexpr, F: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr,
    CAPPED: tl.constexpr, PER: tl.constexpr, PART: tl.constexpr, FOUND: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    # One program: a part of one block that one new token reads, for the R / F heads that read it together.
    part, bgfn = tl.program_id(0), tl.program_id(1)
    new, f, bg = bgfn % NEW, bgfn // NEW % F, bgfn // (NEW * F)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    length, start = _place(LENGTH, START, N, b, length_b)
    position = length - NEW + new - start
    own = tl.where(position < 0, -1, position // P)
    which = part // PER
    block = own
    if which > 0:
        block = tl.where(which - 1 < own, which - 1, -1).to(tl.int64)
    if which > SINK:
        block = own - (which - SINK)
        block = tl.where(block >= SINK, block, -1).to(tl.int64)
    if which > SINK + RECENT:
        each = tl.arange(0, FOUND)
        rank = tl.load(BEST + bgfn.to(tl.int64) * found + each, mask=each < found, other=_NONE)
        for _ in range(which - SINK - RECENT - 1):
            rank = tl.where(rank == tl.max(rank, 0), _NONE, rank)
        most = tl.max(rank, 0)
        block = tl.where(most == _NONE, -1, 0x7FFFFFFF - (most & 0xFFFFFFFF)).to(tl.int64)

    head, d, dv, column = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, T)
    h = g * R + f + head
    some = head < R // F
    query = QUERY + b * query_b + h[:, None] * query_h + new.to(tl.int64) * query_n + d[None, :]
    q = tl.load(query, mask=some[:, None] & (d < D)[None, :], other=0.0)
    keys = KEY + b * key_b + g * key_g + start * key_n
    values = VALUE + b * value_b + g * value_g + start * value_n
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    begin = block * P + (part % PER) * PART
    end = tl.where(block < 0, begin, tl.minimum(tl.minimum(begin + PART, block * P + P), position + 1))
    for at in range(begin, end, T):
        token = at + column
        seen = token < end
        slot = _slot(TABLE, b, W, token, seen, page_stride, PAGE)
        k = tl.load(keys + slot[None, :] * key_n + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0.0).to(q.dtype)
        v = tl.load(values + slot[:, None] * value_n + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (2.0 / (1.0 + tl.exp(-2.0 * score / softcap)) - 1.0)
        score = tl.where(seen[None, :], score, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        shrink = tl.exp(most - above)
        weight = tl.exp(score - above[:, None])
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = above

    to = ((b * G * R + h) * NEW + new) * tl.num_programs(0) + part
    tl.store(LSE + to, tl.where(total == 0, float("-inf"), most + tl.log(total)), mask=some)
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(OUT + to[:, None] * DV + dv[None, :], out, mask=some[:, None] & (dv < DV)[None, :])


@triton.jit
def _sum_kernel(PART_OUT, PART_LSE, OUT, LSE, PARTS, T: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    # One program: one head of one new token.
    bhn = tl.program_id(0).to(tl.int64)
    part, dv = tl.arange(0, T), tl.arange(0, DVP)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    out = tl.zeros([DVP], tl.float32)
    for at in range(0, PARTS, T):
        lse = tl.load(PART_LSE + bhn * PARTS + at + part, mask=at + part < PARTS, other=float("-inf"))
        there = lse != float("-inf")
        above = tl.maximum(most, tl.max(lse, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        shrink = tl.exp(most - base)
        weight = tl.exp(lse - base)
        mask = there[:, None] & (dv < DV)[None, :]
        x = tl.load(PART_OUT + (bhn * PARTS + at + part)[:, None] * DV + dv[None, :], mask=mask, other=0.0)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(weight[:, None] * x, 0)
        most = above
    tl.store(OUT + bhn * DV + dv, (out / tl.where(total == 0, 1.0, total)).to(OUT.dtype.element_ty), mask=dv < DV)
    tl.store(LSE + bhn, most + tl.log(total))


def decode(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """See `moba_flex.decoding.decode`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    strides = key.stride()[:3] + value.stride()[:3]
    return _decode(query, key, value, strides, means, means.shape[2], length, start, key.shape[2], None, settings)


def decode_pages(query: Tensor, pages: Pages, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """See `moba_flex.ops.pages.decode_pages`. Keys, values and means are read in place."""
    key, value, n_blocks = pages.key, pages.value, pages.n_blocks(settings.block_size)
    assert key.stride(-1) == value.stride(-1) == 1 and pages.means.is_contiguous() and pages.table.is_contiguous()
    strides = 0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0)
    return _decode(query, key, value, strides, pages.means, n_blocks, pages.length, None, pages.longest, pages, settings)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strides: tuple[int, ...],
    means: Tensor,
    n_blocks: int,
    length: Tensor | None,
    start: Tensor | None,
    n_tokens: int,
    pages: Pages | None,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor]:
    """Decoding with a contiguous or paged cache. `strides`: those of rows, heads and tokens of keys, then of values."""
    (rows, heads, new, width), groups, value_width = query.shape, means.shape[1], value.shape[-1]
    query = query if query.stride(-1) == 1 else query.contiguous()
    repeats = heads // groups
    choosers = 1 if settings.share_selection else repeats
    free = settings.n_free
    padded, value_padded = (padded_width(x) for x in (width, value_width))
    tile = _TILE if padded <= 256 else 16
    parts_of_means, keep = cdiv(n_blocks, tile), min(free, tile)
    best = torch.empty(rows * groups * choosers * new, parts_of_means * keep, dtype=torch.int64, device=query.device)
    table, page, run = (None, 1, 1) if pages is None else (pages.table, pages.size, pages.run)
    places = n_tokens, groups, *((0, 0) if pages is None else (1, pages.table.shape[1]))
    shared = new, repeats, choosers, settings.block_size, settings.sink_blocks, settings.recent_blocks, page
    queries = min(64, max(16, next_power_of_2(choosers * new)))
    _choose_kernel[(parts_of_means, rows * groups, cdiv(choosers * new, queries))](
        query, key, means, best, length, start, table, *query.stride()[:3], *strides[:3], *places, n_blocks, *shared, run,
        keep, tile, min(64, next_power_of_2(settings.block_size)), queries, width, padded,
        num_warps=4,
    )  # fmt: skip

    blocks, readers, found = settings.top_k, best.shape[0], best.shape[1]
    room, token_bytes = min(_SHARED_BYTES, gpu_memory(query.device)[0] - (8 << 10)), (padded + value_padded) * key.element_size()
    while tile > 16 and tile * token_bytes > room:
        tile //= 2
    per = max(1, min(_PROGRAMS // (blocks * readers), cdiv(settings.block_size, tile)))
    if pages is not None:  # the number of rows changes: powers of two limit the number of compiled kernels
        per = next_power_of_2(per + 1) // 2
    part = cdiv(cdiv(settings.block_size, per), tile) * tile
    part_out = torch.empty(rows, heads, new, blocks * per, value_width, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(rows, heads, new, blocks * per, dtype=torch.float32, device=query.device)
    stages = max(1, min(3, room // (tile * token_bytes)))
    _attend_kernel[(blocks * per, readers)](
        query, key, value, best, part_out, part_lse, length, start, table, *query.stride()[:3], *strides, *places,
        0 if pages is None else pages.stride, found, settings.scale, settings.softcap or 0.0, *shared,
        settings.softcap is not None, per, part, next_power_of_2(max(found, 1)), tile,
        max(16, next_power_of_2(repeats // choosers)), width, padded, value_width, value_padded,
        num_warps=4, num_stages=stages,
    )  # fmt: skip

    out = query.new_empty(rows, heads, new, value_width)
    lse = torch.empty(rows, heads, new, dtype=torch.float32, device=query.device)
    _sum_kernel[(rows * heads * new,)](part_out, part_lse, out, lse, blocks * per, 16, value_width, value_padded, num_warps=4)
    return out, lse
