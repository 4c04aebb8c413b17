"""In place of CUDA graphs, without a GPU: the graph is a stand-in that runs its function again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS, GraphCache, Place

MUCH = 1 << 40
HERE, ELSEWHERE, ON_ANOTHER_GPU = Place(0, 10), Place(0, 11), Place(1, 10)


@dataclass(eq=False)
class StandInPool:
    usable: bool = True
    n_bytes: int = 0


class StandIn:
    """As with a CUDA graph, what a capture computes has no contents until a replay, which reads the inputs where they lie."""

    pool_bytes: ClassVar[int]
    living: ClassVar[list[StandIn]]

    def __init__(self, function, inputs, pool):
        self.function, self.inputs, self.pool = function, inputs, pool or StandInPool()
        self.pool.n_bytes += self.pool_bytes
        self.outputs = tuple(torch.full_like(x, -7) for x in function(*inputs))
        self.replays = self.uses = 0
        self.living.append(self)

    def replay(self):
        self.replays += 1
        for place, x in zip(self.outputs, self.function(*self.inputs)):
            place.copy_(x)

    def used(self):
        self.uses += 1

    def release(self):
        self.living.remove(self)


class Doubling:
    """A function of tensors that counts how often it is run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        self.runs += 1
        return x * 2, (x + 1).transpose(0, 1) if y is None else x + y


def call(store: GraphCache, function, *tensors: Tensor | None, key="key", place=HERE, most_bytes: int = MUCH):
    return store(place, (key, *cache.signature(tensors)), function, tensors, most_bytes)


def capture(store: GraphCache, function, *tensors, **more) -> None:
    for _ in range(EAGER_CALLS + 1):
        call(store, function, *tensors, **more)


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
