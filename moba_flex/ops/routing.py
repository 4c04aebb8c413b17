"""Routing: every (query, chosen block) pair becomes one row, sorted by block, as a mixture of experts sends tokens to experts.

Each block's rows are padded to whole tiles, so each tile of rows reads exactly one whole block. The number of rows is bounded by
shapes alone, so nothing is read back to the host.

B batch, H query heads, G key heads, C key blocks, N query slots, S chosen blocks per query, R routed rows, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.chunking import tiles_needed


def order_pairs(chosen: Tensor, groups: int, n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The (query, block) pairs of `chosen [B, H, N, S]` (-1: none), sorted by block, and within a block by query. Deterministic.

    Blocks are numbered across batch and key heads: `(b * G + g) * C + c`. Returns the sorted blocks `[pairs]` (`B * G * C` for none),
    the indices of the pairs in that order `[pairs]` int64, and where each block's pairs begin `[B * G * C + 1]`.
    """
    rows, heads = chosen.shape[:2]
    device, total = chosen.device, rows * groups * n_blocks
    group = torch.arange(rows * heads, device=device, dtype=torch.int32) // (heads // groups)
    block = torch.where(chosen < 0, total, chosen + (group * n_blocks).view(rows, heads, 1, 1)).flatten()
    small = torch.int16 if total <= torch.iinfo(torch.int16).max else torch.int32  # int16 sorts in half the time
    ordered, order = torch.sort(block.to(small), stable=True)
    first = torch.searchsorted(ordered, torch.arange(total + 1, device=device, dtype=small), out_int32=True)
    return ordered.int(), order, first


@dataclass(frozen=True, eq=False)
class Routes:
    """The row of each pair. Blocks are numbered as in `order_pairs`. All tensors are int32."""

    tile: int
    row_of_pair: Tensor  # [B, H, N, S] the row of each pair, -1 if the query chose fewer blocks
    block_of_tile: Tensor  # [T] the block that each tile of rows reads; any valid block for spare tiles
    tile_in_use: Tensor  # [T] 1 or 0
    first_tile: Tensor  # [B * G * C] the first tile of each block; any valid tile if it has none
    tiles_of_block: Tensor  # [B * G * C] number of tiles
    rows_of_block: Tensor  # [B * G * C] number of rows; the rest of the last tile is spare

    @property
    def n_rows(self) -> int:
        """R: rows of all tiles, spare ones included."""
        return self.block_of_tile.numel() * self.tile

    @property
    def n_blocks(self) -> int:
        return self.first_tile.numel()


def route(chosen: Tensor, groups: int, n_blocks: int, tile: int, max_pairs: int) -> Routes:
    """One row per pair of `chosen [B, H, N, S]`, at most `max_pairs` of which are real. Each block's rows are padded to whole tiles."""
    device = chosen.device
    ordered, order, first = order_pairs(chosen, groups, n_blocks)
    total = first.numel() - 1
    rows_of_block = first.diff()
    tiles_of_block = (rows_of_block + (tile - 1)) // tile
    end_tile = tiles_of_block.cumsum(0, dtype=torch.int32)
    first_tile = end_tile - tiles_of_block
    n_tiles = tiles_needed(max_pairs, total, tile)

    used = ordered < total
    block = ordered.clamp(max=total - 1)
    position = torch.arange(ordered.numel(), device=device, dtype=torch.int32)
    row_of_pair = torch.empty_like(chosen).flatten()
    row_of_pair[order] = torch.where(used, position + (first_tile * tile - first[:-1])[block], -1)

    t = torch.arange(n_tiles, device=device, dtype=torch.int32)
    block_of_tile = torch.searchsorted(end_tile, t, right=True, out_int32=True)
    return Routes(
        tile,
        row_of_pair.view(chosen.shape),
        block_of_tile.clamp_(max=total - 1),
        (t < end_tile[-1]).int(),
        first_tile.clamp(max=n_tiles - 1),
        tiles_of_block,
        rows_of_block,
    )
