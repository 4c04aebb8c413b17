"""The forward and backward pass of a step as one CUDA graph: launching a small model's many kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

EAGER_STEPS = 2  # of a kind, before it is captured: compilation and caching happen in these

Function = Callable[[Tensor], Tensor]  # ids on the GPU -> loss; leaves gradients in a model that had none


class Passes:
    """`function` on the GPU, replayed from a CUDA graph from the third step of a kind on: the same kernels on the same values.

    `kind` is everything but the ids that determines which kernels run. A change of kind frees the graph.
    """

    def __init__(self, function: Function, model: nn.Module) -> None:
        self._function, self._model = function, model
        self._kind: Hashable = None
        self._steps, self._graph = 0, None

    def __call__(self, ids: Tensor, kind: Hashable) -> Tensor:
        """`[B, context + 1]` -> the loss, both on the GPU. Gradients stay valid until the next call."""
        if kind != self._kind:
            self._kind, self._steps, self._graph = kind, 0, None
        self._steps += 1
        if self._steps <= EAGER_STEPS:
            return self._function(ids)
        self._graph = self._graph or Graph(self._function, self._model, ids)
        return self._graph(ids)


class Graph:
    """`function`, captured. All its memory is private, including that of the gradients."""

    def __init__(self, function: Function, model: nn.Module, ids: Tensor) -> None:
        self._ids, self._graph = torch.empty_like(ids), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = function(self._ids)
        self._grads = [(x, x.grad) for x in model.parameters() if x.grad is not None]

    def __call__(self, ids: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._graph.replay()
        for x, grad in self._grads:  # an optimizer sets them to None after each step
            x.grad = grad
        return self._loss.clone()
