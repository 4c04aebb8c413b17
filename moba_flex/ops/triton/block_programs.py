"""What the one-pass kernels share: the part of a block that a program computes, and the queries of one turn (loop iteration).

A routed row reads exactly one block. One program holds a block's keys (or `K` of them) and reads the queries in place: first those of the
block itself, then those that were routed to it.

A block that many queries chose would keep one program busy long after the others. The list of tiles is therefore cut at every multiple of
`WINDOW` tiles, and another program continues a block after a cut. A block's first part has at least `WINDOW` tiles, so only blocks of more
than `WINDOW` tiles are cut. The cuts follow from `Routes`: they need no list, and the number of programs does not depend on data.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, N query slots, T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from ..routing import Routes
from .sizes import cdiv

_LEAST_WINDOW, _MOST_WINDOWS = 16, 1024  # tiles; windows: so many that one is a small part of a multiprocessor's work


def windows(n_tiles: int) -> tuple[int, int]:
    """The number of windows of `n_tiles` tiles (0 if no block can be cut), and the tiles per window."""
    window = max(_LEAST_WINDOW, cdiv(n_tiles, _MOST_WINDOWS))
    return (cdiv(n_tiles, window) if n_tiles > window else 0), window


@triton.jit
def part_of_program(item, FIRST, TILES, ROWS, BLOCK_OF_TILE, N_WINDOWS, WINDOW, TILE: tl.constexpr):
    """The block of program `item`, its rows from `begin` to `stop` (counted from the block's first) and the window of this part.

    The first `N_WINDOWS` programs continue a block after a cut; `begin` is -1 if no block is cut there. The others start a block each.
    The window is -1 for a block that is not cut.
    """
    continues = item < N_WINDOWS
    block = tl.load(BLOCK_OF_TILE + item * WINDOW, mask=continues, other=0)
    block = tl.where(continues, block, item - N_WINDOWS)
    first, tiles, rows = tl.load(FIRST + block), tl.load(TILES + block), tl.load(ROWS + block)
    second = (tl.cdiv(first, WINDOW) + 1) * WINDOW  # where the block's second part begins, if it has one
    tile = tl.where(continues, item * WINDOW, first)
    end = tl.where(continues, tile + WINDOW, second)
    begin = tl.where(continues & ((tile < second) | (tile >= first + tiles)), -1, (tile - first) * TILE)
    window = tl.where(second < first + tiles, tl.where(continues, item, second // WINDOW - 1), -1)
    return block, begin, tl.minimum(rows, (end - first) * TILE), window


@triton.jit
def own_queries(OWN, QUERY_START, QUERY_STOP, QUERY_TOKEN, b, c, Q):
    """The query block whose own block is key block `c` of batch row `b`, whether it exists, the slots of its real queries (none if it
    does not exist), and the query of its first slot."""
    query_block = c - tl.load(OWN + b * Q)
    there = (query_block >= 0) & (query_block < Q)
    start = tl.load(QUERY_START + b * Q + query_block, mask=there, other=0)
    stop = tl.load(QUERY_STOP + b * Q + query_block, mask=there, other=0)
    token = tl.load(QUERY_TOKEN + b * Q + query_block, mask=there, other=0)
    return query_block, there, start, stop, token


@triton.jit
def place_of_turn(turn, own_turns, turns_per_head, first_slot, begin, M: tl.constexpr, REPEATS: tl.constexpr):
    """The `M` queries of a turn: whether they are the block's own; if so, their head and first slot; if not, the first of its routed rows.

    Own and routed queries share one loop, so that loads are pipelined across all of it. They differ only in scalars per turn.
    """
    repeat = turn // turns_per_head if REPEATS > 1 else turn * 0
    slot = first_slot + (turn - repeat * turns_per_head) * M
    return turn < own_turns, repeat, slot, begin + (turn - own_turns) * M


@triton.jit
def rows_of_turn(turn, own_turns, ROW_QUERY, first_row, begin, stop, M: tl.constexpr, ROUTED: tl.constexpr):
    """The query of each routed row of a turn. Other loads depend on this load, so it is issued one turn ahead."""
    if ROUTED:
        i = begin + (turn - own_turns) * M + tl.arange(0, M)
        return tl.load(ROW_QUERY + first_row + i, mask=(turn >= own_turns) & (i < stop), other=0)
    else:
        return tl.zeros([M], tl.int32)


@triton.jit
def base2_scores(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """The scores `[M, K]` of queries `[M, D]` and keys `[K, D]`, times log2(e)."""
    log2e: tl.constexpr = 1.4426950408889634
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * log2e)
    if CAPPED:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 / softcap)))
        score = tanh * (softcap * log2e)
    return score


@triton.jit
def columns(real, d, D: tl.constexpr, DP: tl.constexpr):
    """The mask of real rows and of the first `D` of `DP` columns."""
    if D == DP:
        return real[:, None]
    else:
        return real[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=["N", "N_QUERIES", "Q"])
def _row_queries_kernel(
    ROW_OF_PAIR, QUERY_TOKEN, ROW_QUERY, H, N, N_QUERIES, Q, S, REPEATS: tl.constexpr, P: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    # One program: M queries, each written to its rows.
    query = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here, head, n = query < N_QUERIES, (query // N).to(tl.int32), (query % N).to(tl.int32)
    token = tl.load(QUERY_TOKEN + (head // H) * Q + n // P, mask=here, other=0) + n % P
    for s in range(S):
        row = tl.load(ROW_OF_PAIR + query * S + s, mask=here, other=-1).to(tl.int64)
        tl.store(ROW_QUERY + row, token * REPEATS + head % REPEATS, mask=row >= 0)


@triton.jit(do_not_specialize=["N", "N_TOKENS", "N_QUERIES", "N_TILES", "C", "Q"])
def _row_statistics_kernel(
    LSE, DELTA, ROW_QUERY, BLOCK_OF_TILE, FIRST, ROWS, QUERY_START, QUERY_STOP, QUERY_TOKEN, ROW_LSE, ROW_DELTA,
    H, N, N_TOKENS, N_QUERIES, N_TILES, C, Q, REPEATS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # One program: the M rows of a tile, or M query slots. Rows gather their values, since scattered writes are slower.
    tile, m = tl.program_id(0), tl.arange(0, M)
    to = tile.to(tl.int64) * M + m
    if tile < N_TILES:
        here = to >= 0
        block = tl.load(BLOCK_OF_TILE + tile)
        real = (tile - tl.load(FIRST + block)) * M + m < tl.load(ROWS + block)
        of_row = tl.load(ROW_QUERY + to, mask=real, other=0)
        head, token = block // C * REPEATS + of_row % REPEATS, of_row // REPEATS
    else:
        query = to - N_TILES.to(tl.int64) * M
        here, head, n = query < N_QUERIES, (query // N).to(tl.int32), (query % N).to(tl.int32)
        of_query, slot = head // H * Q + n // P, n % P
        token = tl.load(QUERY_TOKEN + of_query, mask=here, other=0) + slot
        real = here & (slot >= tl.load(QUERY_START + of_query, mask=here, other=0))
        real &= slot < tl.load(QUERY_STOP + of_query, mask=here, other=0)
    at = head.to(tl.int64) * N_TOKENS + token
    lse = tl.load(LSE + at, mask=real, other=float("inf")) * 1.4426950408889634
    tl.store(ROW_LSE + to, tl.where(lse == float("-inf"), float("inf"), lse), mask=here)  # -inf: reads nothing
    tl.store(ROW_DELTA + to, tl.load(DELTA + at, mask=real, other=0.0), mask=here)


def row_queries(routes: Routes | None, layout: BlockLayout, shape: torch.Size, groups: int) -> Tensor:
    """The query of each routed row, `n * (H / G) + h % (H / G)`, int32 `[R]`. `shape` is the query's. Spare rows are uninitialized."""
    if routes is None:
        return layout.own  # not read
    rows, heads = shape[:2]
    slots, step = layout.n_query_blocks * layout.width, 256
    n_queries, row_query = rows * heads * slots, routes.row_of_pair.new_empty(routes.n_rows)
    _row_queries_kernel[(cdiv(n_queries, step),)](
        routes.row_of_pair, layout.query_token, row_query,
        heads, slots, n_queries, layout.n_query_blocks, routes.row_of_pair.shape[-1], heads // groups, layout.width, step, num_warps=4,
    )  # fmt: skip
    return row_query


def row_statistics(
    routes: Routes | None, layout: BlockLayout, row_query: Tensor, lse: Tensor, delta: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The values of `lse` and `delta [B, H, N]` for each routed row, then for each query slot: float32 `[R + B * H * Q * P]`.

    `row_query` is from `row_queries`. The returned `lse` is in base 2, and infinite for spare rows and for queries that read nothing, so
    that their weights are 0. `delta` is 0 for spare rows. A block's program loads these values contiguously, so it gathers only tensors
    with a head dimension.
    """
    rows, heads, n_tokens = lse.shape
    slots = layout.n_query_blocks * layout.width
    n_queries, n_tiles, tile, lists = rows * heads * slots, 0, 128, (layout.own,) * 3
    if routes is not None:
        n_tiles, tile = routes.block_of_tile.numel(), routes.tile
        lists = routes.block_of_tile, routes.first_tile, routes.rows_of_block
    row_lse, row_delta = lse.new_empty(2, n_tiles * tile + n_queries).unbind()
    _row_statistics_kernel[(n_tiles + cdiv(n_queries, tile),)](
        lse, delta, row_query, *lists, layout.query_start, layout.query_stop, layout.query_token, row_lse, row_delta,
        heads, slots, n_tokens, n_queries, n_tiles, layout.n_key_blocks, layout.n_query_blocks, heads // groups, layout.width, tile,
        num_warps=1,
    )  # fmt: skip
    return row_lse, row_delta
