"""The batches of `pretrain.py`: windows of the text, some of them with facts and questions of `needle.py`."""

from __future__ import annotations

import argparse
from functools import lru_cache

import torch
from needle import training_sequence
from torch import Tensor

from .corpus import Corpus, windows


class Batches:
    """Batches that depend only on the seed and the step: all runs of a seed, resumed or not, read the same tokens.

    A random share `needle_share` of the windows are sequences of `needle.training_sequence`: the window's first tokens around facts, and
    questions about them. The CPU assembles the windows while a GPU runs earlier steps. Apart from the tokenisation of facts, this takes a
    millisecond or less.
    """

    def __init__(self, text: Corpus, args: argparse.Namespace, seed: int) -> None:
        self._text, self._context, self._seed = text, args.context, seed
        self._needle_share, self._facts = args.needle_share, (args.needle_facts, args.needle_questions)
        self._rows, self._n = args.batch_tokens // args.context, (len(text.train) - 1) // args.context

    def batch(self, step: int) -> Tensor:
        """`[B, context + 1]` int64, on the CPU."""
        return torch.stack([self._window(n) for n in range(step * self._rows, (step + 1) * self._rows)])

    def _window(self, n: int) -> Tensor:
        """`[context + 1]`: the window with index `n` in the order of a run."""
        epoch, place = divmod(n, self._n)
        which = order(self._n, epoch, self._seed)[place]
        ids = windows(self._text.train, which[None], self._context)[0]
        if self._needle_share:
            generator = torch.Generator().manual_seed((self._seed << 40) + n)
            if torch.rand((), generator=generator) < self._needle_share:
                return training_sequence(ids, self._text.tokenizer, generator, *self._facts)
        return ids


@lru_cache(maxsize=2)  # a batch may extend into the next epoch
def order(n: int, epoch: int, seed: int) -> Tensor:
    """`[n]`: the order in which an epoch reads n windows. Each epoch has its own order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))


class Upload:
    """Copies batches to a GPU without waiting for it, from two buffers in pinned memory, in turn.

    When each batch was pinned separately, this took the host 8 ms per step, and the host then seemed to wait for the GPU to release the
    memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._places: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        """Copy `ids` from the CPU, the same shape each time, to the GPU."""
        if len(self._places) < 2:
            self._places.append((torch.empty_like(ids, pin_memory=True), torch.cuda.Event()))
        place, copied = self._places[self._turn]
        self._turn = (self._turn + 1) % 2
        copied.synchronize()  # the copy of the step before last
        place.copy_(ids)
        on_device = place.to(self._device, non_blocking=True)
        copied.record()
        return on_device
