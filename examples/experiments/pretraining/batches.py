"""What each step of `pretrain.py` reads: windows of the text, some of them with facts and questions of `needle.py`."""

from __future__ import annotations

import argparse
from functools import lru_cache

import torch
from needle import training_sequence
from torch import Tensor

from .corpus import Corpus, windows


class Batches:
    """All of it follows from the seed and the number of the step: all runs of a seed, resumed or not, read the same.

    A share of `needle_share` of the windows, chosen at random, are sequences of `needle.training_sequence`: the window's first tokens
    around facts, and questions about them. The windows are put together on the CPU, a millisecond's work or less beside the
    tokenising of facts, while a GPU is busy with the steps before.
    """

    def __init__(self, text: Corpus, args: argparse.Namespace, seed: int) -> None:
        self._text, self._context, self._seed = text, args.context, seed
        self._needle_share, self._facts = args.needle_share, (args.needle_facts, args.needle_questions)
        self._rows, self._n = args.batch_tokens // args.context, (len(text.train) - 1) // args.context

    def batch(self, step: int) -> Tensor:
        """`[B, context + 1]` int64, on the CPU."""
        return torch.stack([self._window(n) for n in range(step * self._rows, (step + 1) * self._rows)])

    def _window(self, n: int) -> Tensor:
        """`[context + 1]`: what comes as number n of all that a run reads."""
        epoch, place = divmod(n, self._n)
        which = order(self._n, epoch, self._seed)[place]
        ids = windows(self._text.train, which[None], self._context)[0]
        if self._needle_share:
            generator = torch.Generator().manual_seed((self._seed << 40) + n)
            if torch.rand((), generator=generator) < self._needle_share:
                return training_sequence(ids, self._text.tokenizer, generator, *self._facts)
        return ids


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def order(n: int, epoch: int, seed: int) -> Tensor:
    """`[n]`: in which order an epoch reads n windows. Each has an order of its own."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))


class Upload:
    """Batches on their way to a GPU, without waiting for it: from two places in pinned memory, in turn.

    With each batch pinned anew the host took 8 ms a step for it, and then waited for the GPU, it seems to give that memory back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._places: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        """`ids` of the CPU, the same shape each time, on the GPU."""
        if len(self._places) < 2:
            self._places.append((torch.empty_like(ids, pin_memory=True), torch.cuda.Event()))
        place, copied = self._places[self._turn]
        self._turn = (self._turn + 1) % 2
        copied.synchronize()  # of the step before last
        place.copy_(ids)
        on_device = place.to(self._device, non_blocking=True)
        copied.record()
        return on_device
