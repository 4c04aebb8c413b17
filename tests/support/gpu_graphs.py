"""Calls on a GPU that become CUDA graphs, and their bits. All share heads, widths and block size, so that few kernels are compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_flex import moba_attention, set_cuda_graphs
from moba_flex.cuda_graphs.cache import Place

HEADS, GROUPS, WIDTH, SETTINGS = 4, 2, 64, {"block_size": 64, "top_k": 3}
HERE = Place(0, 0)


def leaves(seed: int, batch: int = 2, n_query: int = 700, n_key: int = 700, tokens_first: bool = False) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (HEADS, n_query), (GROUPS, n_key), (GROUPS, n_key)
    if tokens_first:
        drawn = [torch.randn(batch, n, heads, WIDTH, generator=generator, device="cuda").transpose(1, 2) for heads, n in shapes]
    else:
        drawn = [torch.randn(batch, heads, n, WIDTH, generator=generator, device="cuda") for heads, n in shapes]
    return [x.bfloat16().requires_grad_() for x in drawn]


def results(tensors: list[Tensor], with_lse: bool = True, **more) -> list[Tensor]:
    """Output, log-sum-exp and gradients of a loss."""
    out, lse = moba_attention(*tensors, return_lse=True, **SETTINGS, **more)
    loss = out.float().sin().sum() + (lse.cos().sum() if with_lse else 0)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def assert_same_bits(got: list[Tensor], wanted: list[Tensor], case: object = "") -> None:
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, wanted):
        assert a.stride() == b.stride(), (name, case)
        whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
        assert torch.equal(a.contiguous().view(whole), b.contiguous().view(whole)), (name, case)  # NaN has bits too


def without_graphs(run, *arguments, **more):
    before = set_cuda_graphs(False)
    try:
        return run(*arguments, **more)
    finally:
        set_cuda_graphs(before)
