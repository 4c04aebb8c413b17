"""Keys in pages, as a server has them: in any order, beside those of other layers, behind their last token whatever was there."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from moba_flex.core.settings import AttentionSettings
from moba_flex.ops.pages import Pages


@dataclass(frozen=True)
class PagedCase:
    """One call of `decode_pages`: a row for each of `lengths`, the last `new` tokens of which are decoded."""

    seed: int
    settings: AttentionSettings
    lengths: tuple[int, ...]
    groups: int
    repeats: int
    width: int
    value_width: int
    dtype: torch.dtype
    page: int
    stride: int  # slots from one page to the next
    interleaved: bool = False  # slots of keys have something else between them
    new: int = 1
    device: str = "cpu"

    def operands(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Pages]:
        """The query `[B, H, n, D]` and the pages: numbers that the case's dtype holds, in `dtype`."""
        dtype, generator = dtype or self.dtype, torch.Generator().manual_seed(self.seed)
        size, n = self.settings.block_size, [-(-length // self.page) for length in self.lengths]
        run, order = gcd(size, self.page), torch.randperm(sum(n) + 2, generator=generator)[: sum(n)].split(n)
        table = torch.zeros(len(n), max(n), dtype=torch.int64)
        heads = self.groups * (2 if self.interleaved else 1)
        key, value = (torch.full(((sum(n) + 2) * self.stride, heads, w), torch.nan) for w in (self.width, self.value_width))
        means = torch.full(((sum(n) + 2) * (self.page // run), self.groups, self.width), torch.nan, dtype=torch.float64)
        for row, (length, pages) in enumerate(zip(self.lengths, order)):
            table[row, : len(pages)] = pages
            token = torch.arange(length)
            slot = pages[token // self.page] * self.stride + token % self.page
            for x in (key, value):
                x[slot, : self.groups] = torch.randn(length, self.groups, x.shape[2], generator=generator).to(self.dtype).float()
            complete = token[: length // run * run].view(-1, run)
            where = pages[complete[:, 0] // self.page] * (self.page // run) + complete[:, 0] % self.page // run
            means[where] = key[slot[complete], : self.groups].double().mean(1)
        query = torch.randn(len(n), self.groups * self.repeats, self.new, self.width, generator=generator).to(self.dtype)
        means = means.to(torch.promote_types(dtype, torch.float32))
        key, value, query = (x.to(self.device, dtype) for x in (key, value, query))
        places = table.to(self.device), torch.tensor(self.lengths, device=self.device), max(self.lengths), self.page, self.stride, run
        return query, Pages(key[:, : self.groups], value[:, : self.groups], means.to(self.device), *places)
