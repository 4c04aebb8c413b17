"""Which process holds which token of a sequence during generation. Every process computes this by itself.

The prompt is cut into slices of whole blocks. Each block is therefore on one process, and its mean is bitwise the one that a single process
would compute. Blocks that begin after the prompt are assigned round-robin. A process stores its tokens in sequence order, so its share of
any prefix of the sequence is a prefix of what it stores.

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
        """L: a whole number of blocks, unless the prompt is shorter than one block."""
        return min(self.blocks_per_slice * self.block_size, self.prompt)

    @property
    def prompt_blocks(self) -> int:
        """The number of blocks that begin in the prompt. Generated tokens may fill the last one, which stays on its process."""
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
        """The number of blocks before each one whose index is `rank` modulo `size`."""
        return (block + self.size - 1 - self.rank) // self.size

    def held(self, length: Tensor) -> Tensor:
        """How many of the first `length` tokens this process holds."""
        block, rest = length // self.block_size, length % self.block_size
        return self.blocks_before(block) * self.block_size + torch.where(self.is_mine(block), rest, 0)

    def local(self, block: Tensor) -> Tensor:
        """The index of each block among this process's own blocks; -1 for blocks of other processes, and for -1."""
        return torch.where(self.is_mine(block) & (block >= 0), self.blocks_before(block), -1)
