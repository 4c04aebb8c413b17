"""The forward pass in one kernel: the own block and all routed rows, queries read in place.

The program of a block holds its keys and values and computes the partial output of every query that reads it, with its log-sum-exp.
A query reads the whole block at once, so no running softmax is needed. `merge` then combines the partial outputs of each query.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, K keys per program, M queries per turn (loop
iteration), R routed rows, D and Dv head dimensions; Nq queries and Nk keys, tokens or slots.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from ...core.settings import AttentionSettings
from ..routing import Routes
from .backward import dot_precision
from .block_programs import base2_scores, columns, own_queries, part_of_program, place_of_turn, row_queries, rows_of_turn, windows
from .sizes import gpu_memory, next_power_of_2, padded_width

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["N_TOKENS", "N_WINDOWS", "WINDOW", "C", "Q"])
def _forward_kernel(
    QUERY, KEY, VALUE, ROW_QUERY, FIRST, TILES, ROWS, BLOCK_OF_TILE, OWN, QUERY_START, QUERY_STOP, QUERY_TOKEN,
    KEY_TOKEN, BLOCK_KEYS,
    OUT, LSE, ROW_OUT, ROW_LSE,
    query_b, query_h, query_n, key_b, key_g, key_n, value_b, value_g, value_n, out_b, out_h, out_n,
    scale, softcap, G, C, Q, N_TOKENS, N_WINDOWS, WINDOW,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, ROUTED: tl.constexpr, PRECISION: tl.constexpr, REPEATS: tl.constexpr,
    TILE: tl.constexpr, P: tl.constexpr, K: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    # One program: the keys of a block, and a part of the queries that read it.
    block, begin, stop = tl.program_id(0), 0, 0
    if ROUTED:
        block, begin, stop, _ = part_of_program(block, FIRST, TILES, ROWS, BLOCK_OF_TILE, N_WINDOWS, WINDOW, TILE)
        if begin < 0:
            return
    group, c = block // C, block % C
    b, g = group // G, group % G
    d, dv, j, m = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, K), tl.arange(0, M)
    n_keys = tl.load(BLOCK_KEYS + b * C + c)
    key = tl.load(KEY_TOKEN + b * C + c).to(tl.int64) + j
    k = KEY + b.to(tl.int64) * key_b + g.to(tl.int64) * key_g + key * key_n
    k = tl.load(k[:, None] + d[None, :], mask=columns(j < n_keys, d, D, DP), other=0.0)
    v = VALUE + b.to(tl.int64) * value_b + g.to(tl.int64) * value_g + key * value_n
    v = tl.load(v[:, None] + dv[None, :], mask=columns(j < n_keys, dv, DV, DVP), other=0.0)

    own_turns, query_start, query_stop, first_token = 0, 0, 0, 0
    turns_per_head: tl.constexpr = (P + M - 1) // M
    if CAUSAL:
        _, there, query_start, query_stop, first_token = own_queries(OWN, QUERY_START, QUERY_STOP, QUERY_TOKEN, b, c, Q)
        own_turns = tl.where(there & (begin == 0), turns_per_head * REPEATS, 0)
    turns, first_row = own_turns, tl.full([], 0, tl.int64)
    if ROUTED:
        first_row = tl.load(FIRST + block).to(tl.int64) * TILE
        turns += tl.cdiv(stop - begin, M)
    heads = (b * G + g).to(tl.int64) * REPEATS
    queries = QUERY + b.to(tl.int64) * query_b + (g * REPEATS).to(tl.int64) * query_h
    outs = OUT + b.to(tl.int64) * out_b + (g * REPEATS).to(tl.int64) * out_h

    routed = rows_of_turn(0, own_turns, ROW_QUERY, first_row, begin, stop, M, ROUTED)
    late = 0  # the same as `turn`: see the backward kernel
    for turn in tl.range(0, turns, num_stages=STAGES):
        own, repeat, slot0, i = place_of_turn(turn, own_turns, turns_per_head, 0, begin, M, REPEATS)
        real = (m >= tl.where(own, query_start - slot0, 0)) & (m < tl.where(own, query_stop - slot0, stop - i))
        n, r = tl.where(own, first_token + slot0 + m, routed // REPEATS).to(tl.int64), tl.where(own, repeat, routed % REPEATS)
        routed = rows_of_turn(turn + 1, own_turns, ROW_QUERY, first_row, begin, stop, M, ROUTED)
        at = r.to(tl.int64) * query_h + n * query_n
        q = tl.load(queries + at[:, None] + d[None, :], mask=columns(real, d, D, DP), other=0.0)

        score = base2_scores(q, k, scale, softcap, CAPPED, PRECISION)
        own, repeat, slot0, i = place_of_turn(late, own_turns, turns_per_head, 0, begin, M, REPEATS)
        real = (m >= tl.where(own, query_start - slot0, 0)) & (m < tl.where(own, query_stop - slot0, stop - i))
        last = tl.where(real, tl.where(own, slot0 + m, n_keys - 1), -1)
        score = tl.where(j[None, :] <= last[:, None], score, float("-inf"))
        most = tl.max(score, 1)
        most = tl.where(most == float("-inf"), 0.0, most)  # a query that reads nothing
        weight = tl.exp2(score - most[:, None])
        total = tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) * (1.0 / tl.where(total == 0, 1.0, total))[:, None]

        query = (heads + repeat) * N_TOKENS + first_token + slot0
        to = outs + tl.cast(repeat, tl.int64) * out_h + (first_token + slot0).to(tl.int64) * out_n
        to_lse, step = LSE + query, tl.cast(out_n, tl.int64)
        if ROUTED:
            to, to_lse = tl.where(own, to, ROW_OUT + (first_row + i) * DV), tl.where(own, to_lse, ROW_LSE + (first_row + i))
            step = tl.where(own, step, DV)
        tl.store((to + m * step)[:, None] + dv[None, :], out.to(v.dtype), mask=columns(real, dv, DV, DVP))
        tl.store(to_lse + m, (most + tl.log2(total)) * _LN2, mask=real)
        late += 1  # noqa: SIM113


def one_pass_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor] | None:
    """Computes partial outputs for `merge`. Writes those of own blocks to `into`, if causal, and returns those of routed rows.

    `query [B, H, Nq, D]`, `key [B, G, Nk, D]`, `value [B, G, Nk, Dv]` and the output in `into`, `[B, H, Nq, Dv]`: any strides, last
    dimension contiguous. The log-sum-exp in `into` is float32 `[B, H, Nq]`. Returns output `[R, Dv]` and log-sum-exp, float32 `[R]`, or
    None without `routes`. Memory between the tokens of `layout` is neither read nor written.
    """
    (rows, heads, n_tokens, width), groups, value_width = query.shape, key.shape[1], value.shape[-1]
    keys, queries, warps, stages = program(query.dtype, layout.width, width, value_width, *gpu_memory(query.device))
    n_windows, window, tile, lists, row_out, row_lse = 0, 1, 1, (layout.own,) * 5, *into
    if routes is not None:
        n_windows, window = windows(routes.block_of_tile.numel())
        row_query, tile = row_queries(routes, layout, query.shape, groups), routes.tile
        lists = (row_query, routes.first_tile, routes.tiles_of_block, routes.rows_of_block, routes.block_of_tile)
        row_out, row_lse = value.new_empty(routes.n_rows, value_width), into[1].new_empty(routes.n_rows)
    strides = [s for x in (query, key, value, into[0]) for s in x.stride()[:3]]
    _forward_kernel[(n_windows + rows * groups * layout.n_key_blocks,)](
        query, key, value, *lists, layout.own, layout.query_start, layout.query_stop, layout.query_token,
        layout.key_token, layout.block_keys, *into, row_out, row_lse,
        *strides, settings.scale, settings.softcap or 0.0, groups, layout.n_key_blocks, layout.n_query_blocks, n_tokens, n_windows, window,
        CAUSAL=settings.causal, CAPPED=settings.softcap is not None, ROUTED=routes is not None, PRECISION=dot_precision(query.dtype),
        REPEATS=heads // groups, TILE=tile, P=layout.width, K=keys, M=queries, STAGES=stages,
        D=width, DP=padded_width(width), DV=value_width, DVP=padded_width(value_width), num_warps=warps,
    )  # fmt: skip
    return None if routes is None else (row_out, row_lse)


def fits(query: Tensor, value: Tensor, slots: int) -> bool:
    """Whether the keys and values of a block of `slots` slots fit into shared memory. AMD GPUs: False, Triton cannot compile it."""
    room, major = gpu_memory(query.device)
    padded = sum(padded_width(x.shape[-1]) for x in (query, value))
    return major > 0 and padded * 2 * (next_power_of_2(slots) + 64) + (4 << 10) <= room


@lru_cache(maxsize=256)
def program(dtype: torch.dtype, slots: int, width: int, value_width: int, room: int, major: int) -> tuple[int, int, int, int]:
    """Keys per program, queries per turn, warps and pipeline stages: see `backward.program`."""
    padded, value_padded = (padded_width(x) for x in (width, value_width))
    keys, size = next_power_of_2(slots), dtype.itemsize
    queries = 64 if slots >= 64 else 32
    warps = 8 if keys * queries > 64 * 128 or value_padded > 128 else 4
    stages = 3

    def shared(stages: int) -> int:
        return size * ((padded + value_padded) * keys + stages * queries * padded + queries * max(keys, value_padded)) + (1 << 10)

    while stages > 1 and shared(stages) * (2 if warps == 4 else 1) > room:  # two programs of four warps share a multiprocessor
        stages -= 1
    return keys, queries, warps, stages
