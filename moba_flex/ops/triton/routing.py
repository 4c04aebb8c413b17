"""Routing as a counting sort of (query, block) pairs: count, prefix sum, place. No atomics, so two runs give the same order.

The pairs of a head are split into columns. A column's program ranks its pairs among those of the column that chose the same block,
and counts them. Prefix sums over the columns of a block, and over blocks in whole tiles, turn ranks into rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.chunking import tiles_needed
from ..routing import Routes
from .sizes import cdiv, next_power_of_2

_PAIRS = 256  # sorted at a time by one program of one warp: larger sorts take more instructions per pair, and more warps synchronize
_MOST_COLUMNS, _LEAST_COLUMNS, _MOST_COUNTS = 512, 32, 1 << 24  # columns per head; counts per key head


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _rank_kernel(CHOSEN, RANK, COUNT, N_PAIRS, C, STEPS, P: tl.constexpr, WIDE: tl.constexpr):
    # One program: one column of one head, P pairs at a time, sorted by block.
    column, head, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, P)
    none: tl.constexpr = (1 << 62) - 1 if WIDE else (1 << 30) - 1
    counts = COUNT + (head * tl.num_programs(0) + column) * C
    for step in range(STEPS):
        first = (column * STEPS + step) * P
        at = head * N_PAIRS + first
        block = tl.load(CHOSEN + at + j, mask=first + j < N_PAIRS, other=-1)
        key = tl.sort(tl.where(block >= 0, block.to(tl.int64 if WIDE else tl.int32) * P + j, none))
        real, block, pair = key < none, key // P, (key % P).to(tl.int32)
        begins = (j == 0) | (tl.gather(block, tl.maximum(j - 1, 0), 0) != block)
        ends = (j == P - 1) | (tl.gather(block, tl.minimum(j + 1, P - 1), 0) != block)
        rank = j - tl.associative_scan(tl.where(begins, j, 0), 0, _larger)
        rank += tl.load(counts + block, mask=real, other=0)
        tl.store(RANK + at + pair, rank, mask=real)
        tl.debug_barrier()  # all threads read a count before one updates it, and the next step reads the update
        tl.store(counts + block, rank + 1, mask=real & ends)
        tl.debug_barrier()


@triton.jit
def _sum_columns_kernel(COUNT, ROWS, COLUMNS, C, STEP: tl.constexpr, M: tl.constexpr):
    # One program: replaces the counts of M blocks of a key head, ordered by head and column, by exclusive prefix sums, and stores their
    # totals.
    group, block = tl.program_id(1).to(tl.int64), tl.program_id(0) * M + tl.arange(0, M)
    total = tl.zeros([M], tl.int32)
    for start in range(0, COLUMNS, STEP):
        i = start + tl.arange(0, STEP)
        at = COUNT + (group * COLUMNS + i)[:, None] * C + block[None, :]
        here = (i < COLUMNS)[:, None] & (block < C)[None, :]
        count = tl.load(at, mask=here, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=here)
        total += tl.sum(count, 0)
    tl.store(ROWS + group * C + block, total, mask=block < C)


@triton.jit
def _sum_blocks_kernel(ROWS, FIRST, TILES, USED, N_BLOCKS, N_TILES, TILE: tl.constexpr, STEP: tl.constexpr):
    # One program: exclusive prefix sum of the blocks' numbers of tiles.
    used = 0
    for start in range(0, N_BLOCKS, STEP):
        i = start + tl.arange(0, STEP)
        tiles = (tl.load(ROWS + i, mask=i < N_BLOCKS, other=0) + TILE - 1) // TILE
        tl.store(FIRST + i, tl.minimum(used + tl.cumsum(tiles, 0) - tiles, N_TILES - 1), mask=i < N_BLOCKS)
        tl.store(TILES + i, tiles, mask=i < N_BLOCKS)
        used += tl.sum(tiles, 0)
    tl.store(USED, used)


@triton.jit
def _list_tiles_kernel(FIRST, TILES, USED, BLOCK_OF_TILE, IN_USE, N_TILES, STEP: tl.constexpr):
    # One program: the tiles of one block, and a share of the spare tiles at the end.
    block, i = tl.program_id(0), tl.arange(0, STEP)
    first, tiles, used = tl.load(FIRST + block), tl.load(TILES + block), tl.load(USED)
    for start in range(0, tiles, STEP):
        tl.store(BLOCK_OF_TILE + first + start + i, tl.zeros([STEP], tl.int32) + block, mask=start + i < tiles)
        tl.store(IN_USE + first + start + i, tl.full([STEP], 1, tl.int32), mask=start + i < tiles)
    for start in range(used + block * STEP, N_TILES, tl.num_programs(0) * STEP):
        tl.store(BLOCK_OF_TILE + start + i, tl.zeros([STEP], tl.int32), mask=start + i < N_TILES)
        tl.store(IN_USE + start + i, tl.zeros([STEP], tl.int32), mask=start + i < N_TILES)


@triton.jit
def _place_kernel(CHOSEN, ROW, COUNT, FIRST, N_PAIRS, REPEATS, C, COLUMNS, PAIRS_OF_COLUMN, TILE: tl.constexpr, STEP: tl.constexpr):
    # Elementwise: a pair's rank in its column becomes its row.
    i, head = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.program_id(1).to(tl.int64)
    at = head * N_PAIRS + i
    block = tl.load(CHOSEN + at, mask=i < N_PAIRS, other=-1)
    real = block >= 0
    row = tl.load(FIRST + (head // REPEATS) * C + block, mask=real, other=0) * TILE
    row += tl.load(COUNT + (head * COLUMNS + i // PAIRS_OF_COLUMN) * C + block, mask=real, other=0)
    row += tl.load(ROW + at, mask=real, other=0)
    tl.store(ROW + at, tl.where(real, row, -1), mask=i < N_PAIRS)


def route(chosen: Tensor, groups: int, n_blocks: int, tile: int, max_pairs: int) -> Routes:
    """One row per pair of `chosen [B, H, N, S]`: see `moba_flex.ops.routing.route`."""
    chosen = chosen.contiguous()
    rows, heads, n_query, count = chosen.shape
    n_pairs, total, repeats = n_query * count, rows * groups * n_blocks, heads // groups
    n_tiles = tiles_needed(max_pairs, total, tile)
    most_columns = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, _MOST_COUNTS // (n_blocks * repeats)))
    steps = cdiv(n_pairs, _PAIRS * most_columns)
    columns = cdiv(n_pairs, _PAIRS * steps)

    row_of_pair = torch.empty_like(chosen)
    counts = chosen.new_zeros(total * repeats * columns)
    rows_of_block, first_tile, tiles_of_block, used = chosen.new_empty(4, total).unbind()  # only the first element of `used` is used
    block_of_tile, in_use = chosen.new_empty(2, n_tiles).unbind()
    wide = n_blocks * _PAIRS >= 1 << 30
    _rank_kernel[(columns, rows * heads)](chosen, row_of_pair, counts, n_pairs, n_blocks, steps, _PAIRS, wide, num_warps=1)
    step, at_once = min(64, next_power_of_2(repeats * columns)), min(32, next_power_of_2(n_blocks))
    _sum_columns_kernel[(cdiv(n_blocks, at_once), rows * groups)](
        counts, rows_of_block, repeats * columns, n_blocks, step, at_once, num_warps=4
    )
    _sum_blocks_kernel[(1,)](rows_of_block, first_tile, tiles_of_block, used, total, n_tiles, tile, 4096, num_warps=8)
    _list_tiles_kernel[(total,)](first_tile, tiles_of_block, used, block_of_tile, in_use, n_tiles, 128, num_warps=1)
    _place_kernel[(cdiv(n_pairs, 1024), rows * heads)](
        chosen, row_of_pair, counts, first_tile, n_pairs, repeats, n_blocks, columns, _PAIRS * steps, tile, 1024, num_warps=4
    )
    return Routes(tile, row_of_pair, block_of_tile, in_use, first_tile, tiles_of_block, rows_of_block)
