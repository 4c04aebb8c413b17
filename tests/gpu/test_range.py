"""The range of the operation on a GPU: widths, dtypes, block sizes, and lengths up to where offsets need more than 32 bits.

Where a dense mask fits, results are held against the specification; beyond that on a sample of queries, in float64, straight from the
equations. The gradient given to the output is 0 elsewhere, so that the sample alone makes the gradients of all keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moba_flex import moba_attention, select_blocks, set_working_memory
from moba_flex.backends.flex import MAX_TENSOR_ELEMENTS
from moba_flex.core.chunking import chunks
from moba_flex.core.layout import slots_per_block
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: FlexAttention compiles to Triton kernels")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NEAR_TIE = 2e-5  # of the largest score


@dataclass(frozen=True)
class Case:
    tokens: int
    block_size: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    value_width: int = 128
    heads: int = 2
    groups: int = 1
    batch: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        return {"block_size": self.block_size, "top_k": self.top_k}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} tokens, block {self.block_size}, {dtype}, {self.width} and {self.value_width} wide"

    def tensors(self, device: str) -> list[Tensor]:
        generator = torch.Generator(device=device).manual_seed(0)
        shapes = (self.heads, self.width), (self.groups, self.width), (self.groups, self.value_width)
        drawn = [torch.empty(self.batch, n, self.tokens, width, device=device, dtype=self.dtype) for n, width in shapes]
        return [x.normal_(generator=generator).requires_grad_() for x in drawn]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


AGAINST_THE_SPECIFICATION = [
    Case(700, 128, 3, torch.float32, batch=2),
    Case(500, 100, 3, torch.float32, 256, 64, batch=2),
    Case(300, 48, 4, torch.float32, 96, 128, batch=2),
    Case(7000, 2048, 3, torch.float32, 64, 64),
    Case(500, 64, 4, torch.float16, 128, 256, batch=2),
    Case(200, 16, 6, torch.float16, 256, 256, batch=2),
    Case(2100, 512, 3, torch.float16, 96, 96, batch=2),
    Case(300, 48, 4, torch.bfloat16, 256, 256, batch=2),
    Case(4500, 1024, 3, torch.bfloat16, 64, 64),
    Case(7000, 2048, 3),
    Case(13_000, 4096, 3, torch.bfloat16, 192, 128),
    Case(20_000, 8192, 2),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", AGAINST_THE_SPECIFICATION, ids=str)
def test_widths_dtypes_and_block_sizes_equal_the_specification(case: Case):
    results = []
    for implementation, dtype in (("flex", case.dtype), ("naive", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in case.tensors("cuda")]
        out, lse = moba_attention(*leaves, **case.blocks, implementation=implementation, return_lse=True)
        weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        loss = (out.float() * weight).sum() + lse.sin().sum()
        results.append([x.detach() for x in (out, lse, *torch.autograd.grad(loss, leaves))])
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), *results):
        assert distance(a, b) < TOLERANCE[case.dtype], (name, distance(a, b), case)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 127, 128, 129])
def test_the_shortest_lengths_equal_the_specification(tokens: int):
    case = Case(tokens, 16, 3, torch.float16, 64, 64)
    leaves = case.tensors("cuda")
    results = []
    for implementation in ("flex", "naive"):
        out, lse = moba_attention(*leaves, **case.blocks, implementation=implementation, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), leaves)])
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), *results):
        assert (a.double() - b.double()).norm() < 4e-3 * max(1.0, b.double().norm().item()), (name, tokens)


# On a sample of queries


def sample_of(case: Case) -> list[int]:
    """Some queries: the first and the last, those at a block's edge, and others."""
    last_edge = case.tokens // case.block_size * case.block_size
    edges = {0, 1, case.block_size - 1, case.block_size, last_edge - 1, last_edge, case.tokens - 1}
    others = torch.randint(case.tokens, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    return sorted({n for n in edges | set(others) if 0 <= n < case.tokens})


def block_means(key: Tensor, block_size: int) -> Tensor:
    """`[N, D]` -> `[C, D]` float64: the mean of each whole block (equation 6)."""
    parts = key[: key.shape[0] // block_size * block_size].split(block_size * max(1, (1 << 20) // block_size))
    return torch.cat([x.double().unflatten(0, (-1, block_size)).mean(1) for x in parts] or [key.new_empty(0, key.shape[1]).double()])


def check_choices(case: Case, chosen: Tensor, query: Tensor, key: Tensor, sample: Tensor) -> None:
    """That the past blocks `chosen [n, S]` (-1 for none) of one head's queries at `sample [n]` are the best but for near-ties."""
    own = sample // case.block_size
    count = own.clamp(max=case.top_k - 1)
    assert torch.equal((chosen >= 0).sum(1), count)
    assert (chosen < own[:, None]).all()
    if not count.any():
        return
    score = query[sample].double() @ block_means(key, case.block_size).mT
    block = torch.arange(score.shape[1], device=score.device)
    taken = (chosen[:, :, None] == block).any(1)
    assert torch.equal(taken.sum(1), count), "a block is chosen twice"
    left = (block < own[:, None]) & ~taken
    worst, best_left = score.masked_fill(~taken, torch.inf).amin(1), score.masked_fill(~left, -torch.inf).amax(1)
    some = left.any(1) & taken.any(1)
    assert (best_left <= worst + NEAR_TIE * score.abs().amax(1))[some].all(), "a better block was left"


def attend_one(case: Case, n: int, chosen: list[int], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """Output and log-sum-exp of query `n` of one head (equations 2 and 3) in float64, the keys that it reads, and all three leaves."""
    starts = [block * case.block_size for block in (*chosen, n // case.block_size) if block >= 0]
    read = torch.cat([torch.arange(s, min(s + case.block_size, n + 1), device=key.device) for s in starts])
    leaves = tuple(x.double().requires_grad_() for x in (query[n], key[read], value[read]))
    score = leaves[1] @ leaves[0] * case.width**-0.5
    lse = score.logsumexp(0)
    return (score - lse).exp() @ leaves[2], lse, read, leaves


def check_a_sample(case: Case, device: str) -> None:
    """Choices, values and gradients of some queries, and with them the gradients of all keys and values."""
    leaves = case.tensors(device)
    query, key, value = (x.detach() for x in leaves)
    sample = sample_of(case)
    chosen = select_blocks(query, key, **case.blocks).indices[:, :, sample]
    out, lse = moba_attention(*leaves, **case.blocks, return_lse=True)
    grads = torch.zeros_like(out), torch.zeros_like(lse)
    for x in grads:
        x[:, :, sample] = torch.randn(x[:, :, sample].shape, generator=torch.Generator(device).manual_seed(1), device=device).to(x.dtype)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, grads)
    out, lse = (x.detach()[:, :, sample] for x in (out, lse))
    assert int((dq != 0).any(-1).sum()) <= case.batch * case.heads * len(sample), "a query without a gradient has one"
    dq = dq[:, :, sample]

    wanted = [torch.zeros_like(x, dtype=torch.float64) for x in (out, lse, dq, dk, dv)]
    for b in range(case.batch):
        for h in range(case.heads):
            g = h // (case.heads // case.groups)
            operands = query[b, h], key[b, g], value[b, g]
            check_choices(case, chosen[b, h], *operands[:2], torch.tensor(sample, device=device))
            for i, n in enumerate(sample):
                *results, read, used = attend_one(case, n, chosen[b, h, i].tolist(), *operands)
                given = torch.autograd.grad(results, used, [x[b, h, n].double() for x in grads])
                for to, x in zip(wanted, (*results, given[0])):
                    to[b, h, i] = x.detach()
                for to, x in zip(wanted[3:], given[1:]):
                    to[b, g].index_add_(0, read, x)
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), (out, lse, dq, dk, dv), wanted):
        assert distance(a, b) < TOLERANCE[case.dtype], (name, distance(a, b), case)


def shapes_and_settings(case: Case) -> tuple[list[Tensor], AttentionSettings]:
    """Query, key and value without data, and what is computed."""
    shapes = (case.heads, case.width), (case.groups, case.width), (case.groups, case.value_width)
    tensors = [torch.empty(case.batch, n, case.tokens, width, dtype=case.dtype, device="meta") for n, width in shapes]
    return tensors, AttentionSettings(case.block_size, case.top_k, implementation="flex")


def parts_of(case: Case, budget: int) -> tuple[int, int]:
    """How many chunks the case is worked through in, and how many parts each has."""
    tensors, settings = shapes_and_settings(case)
    layout = dense_layout(case.batch, case.tokens, case.tokens, case.block_size, slots_per_block(case.block_size), torch.device("cpu"))
    within, numbers = replace(settings, working_memory=budget), 3 * tensors[0].shape[-1]
    plan = [parts for _, _, parts in chunks(*tensors, layout, within, MAX_TENSOR_ELEMENTS, numbers)]
    return len(plan), len(plan[0])


LONG = {  # chunks and parts with the working memory given
    "rows of two heads beyond 32 bits": (Case(2_000_000, 128, 8, torch.bfloat16, 64, 96), 2 << 30, (1, 2)),
    "rows of one head beyond 32 bits": (Case(1_500_000, 512, 13, heads=1), 2 << 30, (1, 2)),
    "rows of eight key heads beyond 32 bits": (Case(300_000, 2048, 9, heads=8, groups=8), 40 << 30, (2, 1)),
    "many small blocks": (Case(2_000_000, 16, 3, torch.float16, 64, 64, heads=1), 2 << 30, (1, 1)),
    "float32": (Case(1_000_000, 2048, 3, torch.float32, 64, 64, heads=1), 2 << 30, (1, 1)),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_equal_the_equations_on_a_sample(name: str):
    case, working_memory, chunks_and_parts = LONG[name]
    assert parts_of(case, working_memory) == chunks_and_parts
    before = set_working_memory(working_memory)
    try:
        check_a_sample(case, "cuda")
    finally:
        set_working_memory(before)
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", LONG)
def test_the_long_cases_take_the_paths_that_they_are_named_for(name: str):
    case, working_memory, chunks_and_parts = LONG[name]
    assert parts_of(case, working_memory) == chunks_and_parts


@pytest.mark.parametrize(("tokens", "block_size", "top_k"), [(5000, 64, 4), (777, 100, 3), (300, 512, 2), (130, 16, 1)])
def test_the_equations_on_a_sample_hold_without_a_gpu(tokens: int, block_size: int, top_k: int):
    check_a_sample(Case(tokens, block_size, top_k, torch.float32, 32, 24, heads=4, groups=2, batch=2), "cpu")


def test_the_equations_on_a_sample_notice_a_wrong_choice(monkeypatch):
    case = Case(2000, 64, 4, torch.float32, 32, 24)
    real = select_blocks

    def second_best(*args, **settings):
        selection = real(*args, **settings)
        selection.indices[..., 0] = torch.where(selection.indices[..., 0] > 0, selection.indices[..., 0] - 1, selection.indices[..., 0])
        return selection

    monkeypatch.setitem(globals(), "select_blocks", second_best)
    with pytest.raises(AssertionError):
        check_a_sample(case, "cpu")
