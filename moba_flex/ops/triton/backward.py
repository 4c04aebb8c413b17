"""The one-pass backward: one kernel for the own block and all routed rows, with five products, no copied rows and no atomics.

A row reads exactly one whole block, so the program of a block computes the complete query gradient of its rows together with the
gradients of its keys and values. FlexAttention's backward computes these separately, in seven products, from rows that are copied first.
Two more kernels sum a query's rows, and the parts of blocks that many queries chose. All sums have a fixed order, so two runs give
the same bits.

A block of more than `K` keys is split into sub-blocks, with a program each; a query then gets a gradient row from each of them.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, K keys per program, M queries per turn (loop
iteration), N query slots (Q * P), R routed rows, S chosen blocks per query, D and Dv head dimensions; Nq queries and Nk keys, tokens or
slots.
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
from .block_programs import columns, own_queries, part_of_program, place_of_turn, row_queries, row_statistics, rows_of_turn, windows
from .sizes import cdiv, gpu_memory, next_power_of_2, padded_width

_LOG2E = tl.constexpr(1.4426950408889634)
_LENGTHS = ["N", "N_ROWS", "N_QUERIES", "N_WINDOWS", "WINDOW", "C", "Q"]  # a new length must not cause a compilation


@triton.jit(do_not_specialize=_LENGTHS)
def _backward_kernel(
    QUERY, KEY, VALUE, GRAD, ROW_QUERY, ROW_LSE, ROW_DELTA, FIRST, TILES, ROWS, BLOCK_OF_TILE,
    OWN, QUERY_START, QUERY_STOP, QUERY_TOKEN, KEY_TOKEN, BLOCK_KEYS, ROW_GRAD, TO_KEY, TO_VALUE, PART_KEY, PART_VALUE,
    query_b, query_h, query_n, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_n,
    to_key_b, to_key_g, to_key_n, to_value_b, to_value_g, to_value_n,
    scale, softcap, G, C, Q, N, N_ROWS, N_QUERIES, N_WINDOWS, WINDOW,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, ROUTED: tl.constexpr, PRECISION: tl.constexpr, REPEATS: tl.constexpr,
    TILE: tl.constexpr, P: tl.constexpr, SUBS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    # One program: K keys of a block, and a part of the queries that read it. Sub-blocks have adjacent program ids, so that they read
    # the same queries from the cache.
    sub = tl.program_id(0) % SUBS
    block, begin, stop, window = tl.program_id(0) // SUBS, 0, 0, -1
    if ROUTED:
        block, begin, stop, window = part_of_program(block, FIRST, TILES, ROWS, BLOCK_OF_TILE, N_WINDOWS, WINDOW, TILE)
        if begin < 0:
            return
    group, c = block // C, block % C
    b, g = group // G, group % G
    d, dv, j = tl.arange(0, DP), tl.arange(0, DVP), sub * K + tl.arange(0, K)
    n_keys = tl.load(BLOCK_KEYS + b * C + c)
    key = tl.load(KEY_TOKEN + b * C + c).to(tl.int64) + j
    k = KEY + b.to(tl.int64) * key_b + g.to(tl.int64) * key_g + key * key_n
    k = tl.load(k[:, None] + d[None, :], mask=columns(j < n_keys, d, D, DP), other=0.0)
    v = VALUE + b.to(tl.int64) * value_b + g.to(tl.int64) * value_g + key * value_n
    v = tl.load(v[:, None] + dv[None, :], mask=columns(j < n_keys, dv, DV, DVP), other=0.0)
    grad_k, grad_v = tl.zeros([K, DP], tl.float32), tl.zeros([K, DVP], tl.float32)

    own_turns, query_block, query_start, query_stop, first_token = 0, c, 0, 0, 0
    first_slot = sub * K // M * M  # queries before this sub-block see none of its keys
    turns_per_head: tl.constexpr = (P + M - 1) // M
    turns_left = turns_per_head - sub * K // M
    if CAUSAL:
        query_block, there, query_start, query_stop, first_token = own_queries(OWN, QUERY_START, QUERY_STOP, QUERY_TOKEN, b, c, Q)
        own_turns = tl.where(there & (begin == 0), turns_left * REPEATS, 0)
    turns, first_row = own_turns, tl.full([], 0, tl.int64)
    if ROUTED:
        first_row = tl.load(FIRST + block).to(tl.int64) * TILE
        turns += tl.cdiv(stop - begin, M)
    first_query = query_block * P
    heads = (b * G + g).to(tl.int64) * REPEATS
    queries = QUERY + b.to(tl.int64) * query_b + (g * REPEATS).to(tl.int64) * query_h
    grads = GRAD + b.to(tl.int64) * grad_b + (g * REPEATS).to(tl.int64) * grad_h
    to_rows = ROW_GRAD + sub.to(tl.int64) * (N_ROWS.to(tl.int64) + N_QUERIES) * D

    m = tl.arange(0, M)
    routed = rows_of_turn(0, own_turns, ROW_QUERY, first_row, begin, stop, M, ROUTED)
    late = 0  # Equals `turn`. Loads run ahead of products, which recompute indices from their own variable instead of holding registers.
    for turn in tl.range(0, turns, num_stages=STAGES):
        own, repeat, slot0, i = place_of_turn(turn, own_turns, turns_left, first_slot, begin, M, REPEATS)
        real = (m >= tl.where(own, query_start - slot0, 0)) & (m < tl.where(own, query_stop - slot0, stop - i))
        n, r = tl.where(own, first_token + slot0 + m, routed // REPEATS).to(tl.int64), tl.where(own, repeat, routed % REPEATS)
        routed = rows_of_turn(turn + 1, own_turns, ROW_QUERY, first_row, begin, stop, M, ROUTED)
        at = r.to(tl.int64) * query_h + n * query_n
        q = tl.load(queries + at[:, None] + d[None, :], mask=columns(real, d, D, DP), other=0.0)
        at = r.to(tl.int64) * grad_h + n * grad_n
        do = tl.load(grads + at[:, None] + dv[None, :], mask=columns(real, dv, DV, DVP), other=0.0)
        row = tl.where(own, N_ROWS + (heads + repeat) * N + first_query + slot0, first_row + i)
        row = tl.multiple_of(row, 16) + m
        if P % M == 0 and (TILE % M == 0 or not ROUTED):  # then all rows of a turn have values, spare ones too
            lse, delta = tl.load(ROW_LSE + row), tl.load(ROW_DELTA + row)
        else:
            lse, delta = tl.load(ROW_LSE + row, mask=real, other=float("inf")), tl.load(ROW_DELTA + row, mask=real, other=0.0)

        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [K, M]
        if CAPPED:
            tanh = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * _LOG2E * scale / softcap)))
            weight = tl.exp2(tanh * (softcap * _LOG2E) - lse[None, :])
        else:
            weight = tl.exp2(score * (scale * _LOG2E) - lse[None, :])
        own, repeat, slot0, i = place_of_turn(late, own_turns, turns_left, first_slot, begin, M, REPEATS)
        last = tl.where(own, slot0 + m, n_keys - 1)
        weight = tl.where(j[:, None] <= last[None, :], weight, 0.0)
        grad_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        grad_v = tl.dot(weight.to(do.dtype), do, grad_v, input_precision=PRECISION)
        grad_score = weight * (grad_weight - delta[None, :])
        if CAPPED:
            grad_score *= 1.0 - tanh * tanh
        grad_score = grad_score.to(q.dtype)
        grad_k = tl.dot(grad_score, q, grad_k, input_precision=PRECISION)
        if TRANSPOSED:
            grad_q = tl.trans(tl.dot(tl.trans(k), grad_score, input_precision=PRECISION)) * scale
        else:
            grad_q = tl.dot(tl.trans(grad_score), k, input_precision=PRECISION) * scale
        row = tl.where(own, N_ROWS + (heads + repeat) * N + first_query + slot0, first_row + i)
        written = m < tl.where(own, P - slot0, stop - i)
        tl.store(to_rows + (row + m)[:, None] * D + d[None, :], grad_q.to(q.dtype), mask=columns(written, d, D, DP))
        late += 1  # noqa: SIM113

    grad_k *= scale
    if window < 0:
        to = TO_KEY + b.to(tl.int64) * to_key_b + g.to(tl.int64) * to_key_g + key * to_key_n
        tl.store(to[:, None] + d[None, :], grad_k.to(k.dtype), mask=columns(j < n_keys, d, D, DP))
        to = TO_VALUE + b.to(tl.int64) * to_value_b + g.to(tl.int64) * to_value_g + key * to_value_n
        tl.store(to[:, None] + dv[None, :], grad_v.to(v.dtype), mask=columns(j < n_keys, dv, DV, DVP))
    else:
        at = tl.cast(window, tl.int64) * P + j
        tl.store(PART_KEY + at[:, None] * D + d[None, :], grad_k, mask=columns(j < P, d, D, DP))
        tl.store(PART_VALUE + at[:, None] * DV + dv[None, :], grad_v, mask=columns(j < P, dv, DV, DVP))


@triton.jit
def _sum_windows(PART, TO, window, last, j, n_keys, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    d = tl.arange(0, DP)
    mask = columns(j < P, d, D, DP)
    total = tl.zeros([M, DP], tl.float32)
    for w in tl.range(window, last, num_stages=3):
        at = tl.cast(w, tl.int64) * P + j
        total += tl.load(PART + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(TO[:, None] + d[None, :], total.to(TO.dtype.element_ty), mask=columns(j < n_keys, d, D, DP))


@triton.jit(do_not_specialize=["WINDOW", "C"])
def _sum_parts_kernel(
    PART_KEY, PART_VALUE, FIRST, TILES, BLOCK_OF_TILE, KEY_TOKEN, BLOCK_KEYS, TO_KEY, TO_VALUE,
    to_key_b, to_key_g, to_key_n, to_value_b, to_value_g, to_value_n, G, C, WINDOW,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # One program: M keys of the block whose first part has this window, if there is one.
    window, j = tl.program_id(0), tl.program_id(1) * M + tl.arange(0, M)
    block = tl.load(BLOCK_OF_TILE + window * WINDOW)
    first = tl.load(FIRST + block)
    end = first + tl.load(TILES + block)
    if (tl.cdiv(first, WINDOW) != window) | ((window + 1) * WINDOW >= end):
        return
    group, c, last = block // C, block % C, tl.cdiv(end, WINDOW)
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    key, n_keys = tl.load(KEY_TOKEN + b * C + c).to(tl.int64) + j, tl.load(BLOCK_KEYS + b * C + c)
    _sum_windows(PART_KEY, TO_KEY + b * to_key_b + g * to_key_g + key * to_key_n, window, last, j, n_keys, P, D, DP, M)
    _sum_windows(PART_VALUE, TO_VALUE + b * to_value_b + g * to_value_g + key * to_value_n, window, last, j, n_keys, P, DV, DVP, M)


@triton.jit(do_not_specialize=["N", "N_ROWS", "N_QUERIES", "Q"])
def _sum_rows_kernel(
    ROW_GRAD, ROW_OF_PAIR, QUERY_START, QUERY_STOP, QUERY_TOKEN, TO, to_b, to_h, to_n, H, N, Q, N_ROWS, N_QUERIES,
    CAUSAL: tl.constexpr, S: tl.constexpr, UNROLLED: tl.constexpr, P: tl.constexpr, SUBS: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # One program: M queries of a query block of a head.
    head, i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, DP)
    block = (head // H) * Q + tl.program_id(0) * M // P
    here = (i % P >= tl.load(QUERY_START + block)) & (i % P < tl.load(QUERY_STOP + block))
    query, token = head * N + i, (tl.load(QUERY_TOKEN + block) + i % P).to(tl.int64)
    # Pairs are read without waiting for `here`: a slot without a query has none.
    rows = N_ROWS.to(tl.int64) + N_QUERIES
    total = tl.zeros([M, DP], tl.float32)
    for sub in tl.static_range(SUBS):
        part = ROW_GRAD + sub * rows * D
        if CAUSAL:  # a sub-block wrote rows only for queries from its first key on
            own = here & (i % P >= sub * K)
            total += tl.load(part + (N_ROWS + query)[:, None] * D + d[None, :], mask=columns(own, d, D, DP), other=0.0).to(tl.float32)
        for s in range(0, S, UNROLLED):
            for u in tl.static_range(UNROLLED):
                row = tl.load(ROW_OF_PAIR + query * S + s + u, mask=(i < N) & (s + u < S), other=-1).to(tl.int64)
                x = tl.load(part + row[:, None] * D + d[None, :], mask=columns(row >= 0, d, D, DP), other=0.0)
                total += x.to(tl.float32)
    at = (head // H) * to_b + (head % H) * to_h + token * to_n
    tl.store(TO + at[:, None] + d[None, :], total.to(TO.dtype.element_ty), mask=columns(here, d, D, DP))


def one_pass_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value through the own block and along `routes` to `into`.

    `query [B, H, Nq, D]`, `key [B, G, Nk, D]`, `value [B, G, Nk, Dv]`, `grad [B, H, Nq, Dv]` and `into`: any strides, last dimension
    contiguous. `lse` (over all blocks of a query) and `delta` (`out . grad - grad_lse`): float32 `[B, H, Nq]`, contiguous. `routes` is
    None if no query is routed. Memory between the tokens of `layout` is neither read nor written.
    """
    (rows, heads, _, width), groups, value_width = query.shape, key.shape[1], value.shape[-1]
    slots = layout.n_query_blocks * layout.width
    keys, queries, warps, stages, transposed = program(query.dtype, layout.width, width, value_width, *gpu_memory(query.device))
    subs, n_queries, device = cdiv(layout.width, keys), rows * heads * slots, query.device
    padded, value_padded = padded_width(width), padded_width(value_width)

    n_rows, n_windows, window, tile, nothing = 0, 0, 1, 1, layout.own
    lists = (nothing,) * 4
    if routes is not None:
        n_rows, tile = routes.n_rows, routes.tile
        n_windows, window = windows(routes.block_of_tile.numel())
        lists = (routes.first_tile, routes.tiles_of_block, routes.rows_of_block, routes.block_of_tile)
    row_query = row_queries(routes, layout, query.shape, groups)
    of_rows = row_query, *row_statistics(routes, layout, row_query, lse, delta, groups)
    row_grad = query.new_empty(subs, n_rows + n_queries, width)
    parts = [torch.empty(n_windows, layout.width, x.shape[-1], dtype=torch.float32, device=device) for x in (key, value)]
    of_queries, of_keys = (layout.query_start, layout.query_stop, layout.query_token), (layout.key_token, layout.block_keys)
    strides = [s for x in (query, key, value, grad) for s in x.stride()[:3]]
    into_strides = [s for x in into[1:] for s in x.stride()[:3]]

    _backward_kernel[((n_windows + rows * groups * layout.n_key_blocks) * subs,)](
        query, key, value, grad, *of_rows, *lists, layout.own, *of_queries, *of_keys, row_grad, *into[1:], *parts, *strides, *into_strides,
        settings.scale, settings.softcap or 0.0, groups, layout.n_key_blocks, layout.n_query_blocks, slots,
        n_rows, n_queries, n_windows, window,
        CAUSAL=settings.causal, CAPPED=settings.softcap is not None, ROUTED=routes is not None, PRECISION=dot_precision(query.dtype),
        REPEATS=heads // groups, TILE=tile, P=layout.width, SUBS=subs, K=keys, M=queries, STAGES=stages,
        TRANSPOSED=transposed, D=width, DP=padded, DV=value_width, DVP=value_padded, num_warps=warps,
    )  # fmt: skip
    if n_windows:
        at_once = min(16, layout.width)
        _sum_parts_kernel[(n_windows, cdiv(layout.width, at_once))](
            *parts, *lists[:2], lists[3], *of_keys, *into[1:], *into_strides, groups, layout.n_key_blocks, window,
            layout.width, width, padded, value_width, value_padded, at_once, num_warps=4,
        )  # fmt: skip
    pairs = nothing if routes is None else routes.row_of_pair
    count, at_once = 0 if routes is None else pairs.shape[-1], 16
    _sum_rows_kernel[(cdiv(slots, at_once), rows * heads)](
        row_grad, pairs, *of_queries, into[0], *into[0].stride()[:3], heads, slots, layout.n_query_blocks, n_rows, n_queries,
        settings.causal, count, max(1, count if count <= 16 else 8), layout.width, subs, keys, width, padded, at_once, num_warps=4,
    )  # fmt: skip


def sub_blocks(query: Tensor, value: Tensor, slots: int) -> int:
    """The number of sub-blocks, one program each, of a block of `slots` slots."""
    keys = program(query.dtype, slots, query.shape[-1], value.shape[-1], *gpu_memory(query.device))[0]
    return cdiv(slots, keys)


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot`: full precision for float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@lru_cache(maxsize=256)
def program(dtype: torch.dtype, slots: int, width: int, value_width: int, room: int, major: int) -> tuple[int, int, int, int, bool]:
    """Keys per program, queries per turn, warps, pipeline stages, and whether query gradients are computed transposed.

    For blocks of `slots` slots, programs of at most `room` bytes of shared memory and GPUs of compute capability `major`. The sizes are
    the largest for which Triton spills no registers in the loop: the gradients of keys and values take half of the registers.
    """
    both, size = sum(padded_width(x) for x in (width, value_width)), dtype.itemsize
    most, wgmma = next_power_of_2(slots), major in (9, 10)
    if dtype == torch.float32:
        keys, queries, warps, stages = 32, 32, 4, 1
    elif both <= 256:
        keys = min(128, most)
        queries, warps, stages = (
            (64 if wgmma and keys >= 64 else 32),
            (8 if keys == 128 or (wgmma and keys == 64) else 4),
            (3 if wgmma else 2),
        )
    else:
        keys, queries, warps, stages = (64, 32, 8, 3) if wgmma else (32, 32, 4, 2)
    keys = min(keys, most)

    def shared(stages: int) -> int:
        buffers = stages if wgmma else stages - 1  # before Hopper, products read from registers
        return size * (both * (keys + max(1, buffers) * queries) + keys * queries) + (2 << 10)

    while stages > 1 and shared(stages) > room:
        stages -= 1
    # Transposed, the product has at least 64 rows even if a turn has fewer queries. On Blackwell all accumulators fit into tensor memory.
    return keys, queries, warps, stages, wgmma and size == 2 and keys >= 64 and (queries < 64 or major == 10)
