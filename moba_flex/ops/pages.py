"""Decoding of keys in pages, as a server keeps them: plain PyTorch. The kernels of `triton/decoding.py` read the pages where they are.

A page holds some tokens of one sequence, one after another, and a table says which pages a sequence has.

B rows, H query heads, G key heads, n new tokens, C blocks, P tokens a block, W pages of the longest row, D and Dv widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.settings import AttentionSettings
from .decoding import Stored, Take, decode_blocks
from .gate import means_of


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values of B rows in pages, and the means of their blocks."""

    key: Tensor  # [slots, G, D]
    value: Tensor  # [slots, G, Dv]
    means: Tensor  # [runs, G, D]: the mean key of each run of tokens, page by page, in float32 at least
    table: Tensor  # [B, W] int64: each row's pages in order, behind its last any that there are
    length: Tensor  # [B] int64: tokens of each row, the new ones among them
    longest: int  # a bound on these
    size: int  # tokens of a page
    stride: int  # slots from the beginning of a page to that of the next
    run: int  # tokens of a run, which divides pages and blocks

    def rows(self, some: slice) -> Pages:
        """The same for some rows."""
        return replace(self, table=self.table[some], length=self.length[some])

    def slots(self, row: Tensor, token: Tensor) -> Tensor:
        """Where tokens of rows lie."""
        return self.table[row, token // self.size] * self.stride + token % self.size

    def stored(self) -> Stored:
        """For `decode_blocks`."""
        width = self.key.shape[-1] + self.value.shape[-1]
        return Stored(self._taker(self.key), self._taker(self.value), self.longest, width)

    def n_blocks(self, block_size: int) -> int:
        """C: the complete blocks of the longest row, and one at least."""
        return max(1, self.longest // block_size)

    def block_means(self, block_size: int) -> Tensor:
        """`[B, G, C, D]`: the means of blocks; what stands behind a row's last complete block is undefined."""
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
    """`query [B, H, n, D]`, the last n tokens of each row, attend to the blocks that they choose: `[B, H, n, Dv]` and `[B, H, n]`."""
    new = query.shape[2]
    token = pages.length[:, None] - new + torch.arange(new, device=query.device)
    return decode_blocks(query, pages.stored(), pages.block_means(settings.block_size), token, torch.zeros_like(token[:, :1]), settings)
