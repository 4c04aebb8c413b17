"""Decoding with a paged KV cache, as in a server, in plain PyTorch. The kernels of `triton/decoding.py` read the pages in place.

A page holds consecutive tokens of one sequence, and a page table lists the pages of each sequence.

B batch rows, H query heads, G key heads, n new tokens, C blocks, P tokens per block, W pages of the longest row, D and Dv head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.settings import AttentionSettings
from .decoding import KeyValueReader, Take, decode_blocks
from .gate import means_of


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values of B rows in pages, and the mean keys of runs of tokens, from which block means are computed."""

    key: Tensor  # [slots, G, D]
    value: Tensor  # [slots, G, Dv]
    means: Tensor  # [runs, G, D]: the mean key of each run of tokens, page by page, in at least float32
    table: Tensor  # [B, W] int64: each row's pages in order, then any valid pages
    length: Tensor  # [B] int64: tokens of each row, new ones included
    longest: int  # an upper bound on `length`
    size: int  # tokens per page
    stride: int  # slots from the start of a page to the start of the next
    run: int  # tokens per run; divides the sizes of pages and blocks

    def rows(self, some: slice) -> Pages:
        """The pages of some rows."""
        return replace(self, table=self.table[some], length=self.length[some])

    def slots(self, row: Tensor, token: Tensor) -> Tensor:
        """The slots of tokens of rows."""
        return self.table[row, token // self.size] * self.stride + token % self.size

    def stored(self) -> KeyValueReader:
        """Accessors for `decode_blocks`."""
        width = self.key.shape[-1] + self.value.shape[-1]
        return KeyValueReader(self._taker(self.key), self._taker(self.value), self.longest, width)

    def n_blocks(self, block_size: int) -> int:
        """C: number of complete blocks of the longest row, at least 1."""
        return max(1, self.longest // block_size)

    def block_means(self, block_size: int) -> Tensor:
        """`[B, G, C, D]`: the block means, undefined after a row's last complete block."""
        n_blocks, per_block, per_page = self.n_blocks(block_size), block_size // self.run, self.size // self.run
        run = torch.arange(n_blocks * per_block, device=self.table.device)
        page = self.table[:, (run // per_page).clamp(max=self.table.shape[1] - 1)]
        of_runs = self.means[(page * per_page + run % per_page).flatten()]
        of_runs = of_runs.view(-1, n_blocks, per_block, *self.means.shape[1:]).movedim(3, 1)  # [B, G, C, runs, D]
        return of_runs[:, :, :, 0] if per_block == 1 else means_of(of_runs, per_block)

    def _taker(self, x: Tensor) -> Take:
        flat = x.flatten(0, 1)

        def take(row: Tensor, group: Tensor, at: Tensor) -> Tensor:
            return flat.index_select(0, (self.slots(row, at) * x.shape[1] + group).flatten()).view(*at.shape, -1)

        return take


def decode_pages(query: Tensor, pages: Pages, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`query [B, H, n, D]`, the last n tokens of each row, attends to the blocks that it chooses: `[B, H, n, Dv]`, lse `[B, H, n]`."""
    new = query.shape[2]
    token = pages.length[:, None] - new + torch.arange(new, device=query.device)
    return decode_blocks(query, pages.stored(), pages.block_means(settings.block_size), token, torch.zeros_like(token[:, :1]), settings)
