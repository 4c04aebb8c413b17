"""Which process holds which token of a sequence that is generated: arithmetic that every process does for itself.

The prompt is cut into slices of whole blocks, so that each block lies in one process and its mean is that of one process bit for bit.
Blocks that begin behind the prompt are dealt out in turn. A process holds its tokens in the order of the sequence, so that what it holds
of the first tokens is always the first part of what it holds.

W processes, N tokens of the prompt, P tokens per block, L tokens of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """The tokens of the process `rank` of `size`, for a prompt of `prompt` tokens."""

    rank: int
    size: int
    block_size: int
    prompt: int

    @property
    def blocks_per_slice(self) -> int:
        return -(-self.prompt // (self.size * self.block_size))

    @property
    def slice_length(self) -> int:
        """L: a whole number of blocks, but for a prompt that is shorter than a block."""
        return min(self.blocks_per_slice * self.block_size, self.prompt)

    @property
    def prompt_blocks(self) -> int:
        """The last of them, which may be filled by generated tokens, is where it began."""
        return -(-self.prompt // self.block_size)

    def owner(self, block: Tensor) -> Tensor:
        """The rank of the process that holds each block."""
        return torch.where(block < self.prompt_blocks, block // self.blocks_per_slice, block % self.size)

    def is_mine(self, block: Tensor) -> Tensor:
        return self.owner(block) == self.rank

    def blocks_before(self, block: Tensor) -> Tensor:
        """How many of the blocks before each one this process holds."""
        of_prompt = (block.clamp(max=self.prompt_blocks) - self.rank * self.blocks_per_slice).clamp(0, self.blocks_per_slice)
        return of_prompt + self._dealt(block.clamp(min=self.prompt_blocks)) - self._dealt(torch.full_like(block, self.prompt_blocks))

    def _dealt(self, block: Tensor) -> Tensor:
        """How many blocks before each one have the number `rank` modulo `size`."""
        return (block + self.size - 1 - self.rank) // self.size

    def held(self, length: Tensor) -> Tensor:
        """How many of the first `length` tokens this process holds."""
        block, rest = length // self.block_size, length % self.block_size
        return self.blocks_before(block) * self.block_size + torch.where(self.is_mine(block), rest, 0)

    def local(self, block: Tensor) -> Tensor:
        """Where among its own blocks this process holds each block; -1 where another process does, and for a block of -1."""
        return torch.where(self.is_mine(block) & (block >= 0), self.blocks_before(block), -1)
