"""Calls on a GPU that several test files make, and how far results may be from the specification's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from moba_flex import moba_attention, set_cuda_graphs
from moba_flex.backends import paths

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    name: str
    heads: int = 4
    groups: int = 2
    n_query: int = 700
    n_key: int = 700
    width: int = 128
    value_width: int = 128
    dtype: torch.dtype = torch.bfloat16
    padding: tuple[tuple[int, int], ...] = ()
    settings: dict = field(default_factory=dict)

    def tensors(self, seed: int = 0):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        shapes = (
            (2, self.heads, self.n_query, self.width),
            (2, self.groups, self.n_key, self.width),
            (2, self.groups, self.n_key, self.value_width),
        )
        return [torch.randn(shape, generator=generator, device="cuda").to(self.dtype).requires_grad_() for shape in shapes]

    def mask(self):
        if not self.padding:
            return None
        position = torch.arange(self.n_key, device="cuda")
        return torch.stack([(position >= start) & (position < stop) for start, stop in self.padding])


def blocks(block_size: int, top_k: int, **more) -> dict:
    return {"block_size": block_size, "top_k": top_k, **more}


def run(case: Case, implementation: str, dtype: torch.dtype | None = None):
    """Output, finite log-sum-exp and gradients of a loss that uses both."""
    leaves = [t.detach().to(dtype or case.dtype).requires_grad_() for t in case.tensors()]
    settings = dict(case.settings)
    out, lse = moba_attention(*leaves, padding_mask=case.mask(), implementation=implementation, return_lse=True, **settings)
    lse = torch.where(lse == -torch.inf, 0, lse)
    weight = torch.randn(out.shape, generator=torch.Generator(device="cuda").manual_seed(1), device="cuda")
    loss = (out.float() * weight).sum() + lse.sin().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@contextmanager
def always_routed() -> Iterator[None]:
    """Short calls too, which a GPU would compute under a dense mask. Without CUDA graphs, which do not know of it."""
    before = set_cuda_graphs(False)
    try:
        with patch.object(paths, "dense_mask_obstacle", lambda *_: "the test wants it routed"):
            yield
    finally:
        set_cuda_graphs(before)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
