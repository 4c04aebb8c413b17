"""What the one-pass kernels share: the part of a block that a program works on, and the queries that it meets in one turn.

A routed row meets exactly one block. So one program holds a block's keys (or `K` of them) and reads the queries where they are:
first those of the block itself, then those that were routed to it.

A block that many queries chose would keep one program busy long after the others. So the axis of tiles is cut at every multiple of
`WINDOW` tiles, and a block that goes on after a cut is continued by another program. A block's first part has at least `WINDOW`
tiles, so that only blocks of more than `WINDOW` tiles are cut. The cuts depend on `Routes` alone: no list is made for them, and the
number of programs is known before the data is.

B rows of the batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, N query slots, T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from ..routing import Routes
from .sizes import cdiv

_LEAST_WINDOW, _MOST_WINDOWS = 16, 1024  # tiles; windows: enough that one of them is a small part of what a multiprocessor does


def windows(n_tiles: int) -> tuple[int, int]:
    """How many windows `n_tiles` tiles have, and how many tiles one has. No windows where no block can be cut."""
    window = max(_LEAST_WINDOW, cdiv(n_tiles, _MOST_WINDOWS))
    return (cdiv(n_tiles, window) if n_tiles > window else 0), window


@triton.jit
def part_of_program(item, FIRST, TILES, ROWS, BLOCK_OF_TILE, N_WINDOWS, WINDOW, TILE: tl.constexpr):
    """The block of program `item`, its rows from `begin` to `stop` (counted from the block's first) and the window of this part.

    The first `N_WINDOWS` programs continue a block after a cut; `begin` is -1 where there is none. The others start a block each.
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
    """The query block whose own block is key block `c` of row `b`, the slots of its real queries and the query of the first slot. No
    slots if there is none."""
    query_block = c - tl.load(OWN + b * Q)
    there = (query_block >= 0) & (query_block < Q)
    start = tl.load(QUERY_START + b * Q + query_block, mask=there, other=0)
    stop = tl.load(QUERY_STOP + b * Q + query_block, mask=there, other=0)
    token = tl.load(QUERY_TOKEN + b * Q + query_block, mask=there, other=0)
    return query_block, there, start, stop, token


@triton.jit
def place_of_turn(turn, own_turns, turns_per_head, first_slot, begin, M: tl.constexpr, REPEATS: tl.constexpr):
    """What the `M` queries of a turn are: whether they are the block's own, and then of which of its heads and from which slot on, or
    else its routed rows from which on.

    Own and routed queries share one loop, so that loads are pipelined across all of it. All that tells them apart is a number per turn.
    """
    repeat = turn // turns_per_head if REPEATS > 1 else turn * 0
    slot = first_slot + (turn - repeat * turns_per_head) * M
    return turn < own_turns, repeat, slot, begin + (turn - own_turns) * M


@triton.jit
def rows_of_turn(turn, own_turns, ROW_QUERY, first_row, begin, stop, M: tl.constexpr, ROUTED: tl.constexpr):
    """The query of each routed row of a turn: a load that other loads depend on, so it is made a turn ahead."""
    if ROUTED:
        i = begin + (turn - own_turns) * M + tl.arange(0, M)
        return tl.load(ROW_QUERY + first_row + i, mask=(turn >= own_turns) & (i < stop), other=0)
    else:
        return tl.zeros([M], tl.int32)


@triton.jit
def columns(real, d, D: tl.constexpr, DP: tl.constexpr):
    """The mask of `DP` columns, of which `D` exist, of real rows."""
    if D == DP:
        return real[:, None]
    else:
        return real[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=["N", "N_TOKENS", "N_QUERIES", "N_ROWS", "Q"])
def _row_indices_kernel(
    LSE, DELTA, ROW_OF_PAIR, FIRST, TILES, ROWS, QUERY_START, QUERY_STOP, QUERY_TOKEN, ROW_QUERY, ROW_LSE, ROW_DELTA,
    H, N, N_TOKENS, N_QUERIES, N_ROWS, Q, S,
    REPEATS: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, BACKWARD: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(N_QUERIES, M)
    if tl.program_id(0) < programs:  # M queries
        query = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        here, head, n = query < N_QUERIES, (query // N).to(tl.int32), (query % N).to(tl.int32)
        block, slot = (head // H) * Q + n // P, n % P
        token = tl.load(QUERY_TOKEN + block, mask=here, other=0) + slot
        lse, delta = 0.0, 0.0
        if BACKWARD:
            real = here & (slot >= tl.load(QUERY_START + block, mask=here, other=0))
            real &= slot < tl.load(QUERY_STOP + block, mask=here, other=0)
            at = head.to(tl.int64) * N_TOKENS + token
            lse = tl.load(LSE + at, mask=real, other=float("inf")) * 1.4426950408889634
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # reads nothing
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            tl.store(ROW_LSE + N_ROWS + query, lse, mask=here)
            tl.store(ROW_DELTA + N_ROWS + query, delta, mask=here)
        for s in range(S):
            row = tl.load(ROW_OF_PAIR + query * S + s, mask=here, other=-1).to(tl.int64)
            tl.store(ROW_QUERY + row, token * REPEATS + head % REPEATS, mask=row >= 0)
            if BACKWARD:
                tl.store(ROW_LSE + row, lse, mask=row >= 0)
                tl.store(ROW_DELTA + row, delta, mask=row >= 0)
    elif BACKWARD:  # the spare rows of one block
        of_block, i = tl.program_id(0) - programs, tl.arange(0, TILE)
        used = tl.load(ROWS + of_block)
        spare_row = tl.load(FIRST + of_block).to(tl.int64) * TILE + used + i
        spare = used + i < tl.load(TILES + of_block) * TILE
        tl.store(ROW_LSE + spare_row, tl.full([TILE], float("inf"), tl.float32), mask=spare)
        tl.store(ROW_DELTA + spare_row, tl.zeros([TILE], tl.float32), mask=spare)


def row_indices(
    routes: Routes | None, layout: BlockLayout, shape: torch.Size, groups: int, lse: Tensor | None = None, delta: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of each routed row its query, `n * (H / G) + h % (H / G)`, int32 `[R]`; and of each row its query's `lse` and `delta`, if given.

    `shape` is that of the query, and `lse` and `delta` are `[B, H, N]`. Those of rows are float32 `[R + B * H * Q * P]`: one for each slot
    follows the routed ones. `lse` is in base 2, and infinite where a row is spare or
    its query reads nothing, so that its weights are 0; `delta` is then 0. A block's program loads these numbers in order, so that it
    looks up only what is as wide as a head.
    """
    rows, heads, n_tokens = shape[:3]
    slots = layout.n_query_blocks * layout.width
    n_queries, n_rows, step, backward = rows * heads * slots, 0 if routes is None else routes.n_rows, 256, lse is not None
    row_query = layout.own if routes is None else routes.row_of_pair.new_empty(n_rows)
    row_lse, row_delta = (None, None) if lse is None else lse.new_empty(2, n_rows + n_queries).unbind()
    lists, count, blocks, tile = (layout.own,) * 4, 0, 0, 1
    if routes is not None:
        lists = routes.row_of_pair, routes.first_tile, routes.tiles_of_block, routes.rows_of_block
        count, blocks, tile = routes.row_of_pair.shape[-1], routes.n_blocks if backward else 0, routes.tile
    _row_indices_kernel[(cdiv(n_queries, step) + blocks,)](
        lse, delta, *lists, layout.query_start, layout.query_stop, layout.query_token, row_query, row_lse, row_delta,
        heads, slots, n_tokens, n_queries, n_rows, layout.n_query_blocks, count,
        heads // groups, tile, layout.width, backward, step, num_warps=4,
    )  # fmt: skip
    return row_query, row_lse, row_delta
