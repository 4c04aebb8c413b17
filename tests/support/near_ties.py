"""Blocks whose means differ in the last bits of float32, and what queries choose among them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_flex.core.layout import BlockLayout
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings

HALF = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class NearTies:
    """One call of the gate. Not causal, so that all queries choose `free` of all blocks."""

    seed: int
    dtype: torch.dtype
    alike: int  # so many neighbouring blocks have nearly the same mean
    free: int
    n_blocks: int
    block_size: int = 16
    width: int = 16
    heads: int = 4
    groups: int = 2
    n_query: int = 64
    elements: int = 2  # of a query that are not 0: the fewer, the less float32 rounds a score

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.free} of {self.n_blocks} blocks, {self.alike} alike, {dtype}, {self.width} wide, seed {self.seed}"

    @property
    def settings(self) -> AttentionSettings:
        return AttentionSettings(self.block_size, self.free, causal=False, implementation="flex")

    def layout(self, device: str) -> BlockLayout:
        sizes = self.n_query, self.n_blocks * self.block_size, self.block_size, self.block_size
        return dense_layout(1, *sizes, torch.device(device))

    def mean(self) -> Tensor:
        """`[1, G, C, D]` float32. Those of float16 are small, where its low half has few bits."""
        return self._draw()[2]

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """Queries and keys. A block's first three keys are all that is not 0, and their sum is a float32 number in any order."""
        query, keys, _ = self._draw()
        key = torch.zeros(1, self.groups, self.n_blocks, self.block_size, self.width, dtype=self.dtype)
        key[:, :, :, :3] = keys
        return query.to(device), key.flatten(2, 3).to(device)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        generator, r = torch.Generator().manual_seed(self.seed), random.Random(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator)

        query = normal(self.heads, self.n_query, self.width)
        few = torch.rand(query.shape, generator=generator).argsort(-1) < self.elements
        size = self.block_size * (2.0**-8 if self.dtype == torch.float16 else 1.0)
        common = normal(self.groups, -(-self.n_blocks // self.alike), self.width) * size
        high = common.bfloat16().float()
        unit = high.abs().log2().floor().exp2()  # of 24 bits the first: 8 bits are `high`, some of the next 8 `low`, and one is `other`
        low = (unit * 2.0**-9 * torch.rand(unit.shape, generator=generator)).bfloat16().float()
        parts = torch.stack([high, low, unit], 3).repeat_interleave(self.alike, 2)[:, :, : self.n_blocks]
        distance = torch.tensor([2.0 ** -r.randint(12, 23) for _ in range(self.n_blocks)])
        parts[:, :, :, 2] *= distance[:, None] * normal(self.groups, self.n_blocks, self.width).sign()
        keys = parts.to(self.dtype)
        return (query * few).to(self.dtype), keys, keys.float().sum(3) / self.block_size


def halves_of(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """`mean` in two numbers of `dtype`."""
    high = mean.to(dtype).float()
    return high + (mean - high).to(dtype).float()


def best_of(query: Tensor, mean: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """`[B, H, N, free]`: the best blocks in float64, in rising order. `[B, H, N]`: whether float32 may not choose otherwise."""
    mean = mean.repeat_interleave(query.shape[1] // mean.shape[1], 1).double()[:, :, None]
    terms = query.double()[:, :, :, None] * mean
    score, block = terms.sum(-1).sort(dim=-1, descending=True, stable=True)
    # Float32 rounds once for each element that is not 0. A GPU's matrix units round down, by up to twice as much.
    rounding = (((query != 0).sum(-1, keepdim=True) + 1) * 2.0**-23 * terms.abs().sum(-1)).gather(-1, block)
    means = mean.expand(*query.shape[:3], *mean.shape[3:]).gather(3, block[..., None].expand(*block.shape, mean.shape[-1]))
    chosen, left = (slice(0, free), slice(free, None))
    close = score[..., chosen, None] - score[..., None, left] <= rounding[..., chosen, None] + rounding[..., None, left]
    equal = (means[..., chosen, None, :] == means[..., None, left, :]).all(-1)  # a tie, which goes to the earlier block
    return block[..., chosen].sort(-1).values, ~(close & ~equal).any((-1, -2))


def check_choices(case: NearTies, device: str) -> None:
    """That the kernels choose as float64 does, wherever float32 tells the best blocks from the others. Two halves of a mean do not."""
    from moba_flex.ops import triton as kernels

    query, key = case.tensors(device)
    layout = case.layout(device)
    chosen = kernels.choose(query, key, layout, case.settings)[:, :, : case.n_query].cpu().long().sort(-1).values
    query, mean = query.cpu(), case.mean()
    wanted, certain = best_of(query, mean, case.free)
    by_halves, _ = best_of(query, halves_of(mean, case.dtype), case.free)
    assert ((wanted != by_halves).any(-1) & certain).any(), "halves would do"
    wrong = (chosen != wanted).any(-1) & certain
    assert not wrong.any(), f"{int(wrong.sum())} of {int(certain.sum())} queries choose otherwise"


NEAR_TIES = [
    *(NearTies(i, dtype, 2, 3, 40, elements=elements) for dtype in HALF for i, elements in enumerate((1, 2, 4))),
    *(NearTies(i, dtype, 2, 1, 20, block_size=128, n_query=128, width=width) for dtype in HALF for i, width in enumerate((64, 128))),
    *(NearTies(5, dtype, 2, 7, 300, width=32) for dtype in HALF),
    *(NearTies(6, dtype, 2, 13, 200, n_query=128, block_size=128) for dtype in HALF),  # two turns of the loop at once
    *(NearTies(7, dtype, 2, 11, 200) for dtype in HALF),
    *(NearTies(8, dtype, 5, 3, 100) for dtype in HALF),  # more than two in doubt
    *(NearTies(9, dtype, 20, 5, 100, elements=1) for dtype in HALF),
    *(NearTies(10, dtype, 2, 17, 60, width=128) for dtype in HALF),  # more than the search by lanes serves
    *(NearTies(11, dtype, 60, 20, 60, elements=1) for dtype in HALF),
]
