"""Packed sequences that read every block, which PyTorch's `varlen_attn` computes on a GPU: equal to the specification, however they lie."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest
import torch
from support import cases
from support.cases import laid_out
from support.gpu import TOLERANCE, distance

from moba_flex import explain, moba_attention, moba_attention_varlen
from moba_flex.backends import varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: PyTorch's varlen_attn is for it"),
]

BLOCKS = {"block_size": 128, "top_k": 3}
LONGEST = 128 * 3
LAYOUTS = ["contiguous", "tokens first", "width first", "sliced", "every other", "expanded"]


def bounds(*lengths: int) -> torch.Tensor:
    return cases.bounds(*lengths).cuda()


def tensors(n_query: int, n_key: int, heads: int = 4, groups: int = 2, width: int = 64, dtype=torch.bfloat16, layout="contiguous"):
    shapes = (1, heads, n_query, width), (1, groups, n_key, width), (1, groups, n_key, width)
    return [laid_out(torch.randn(shape, device="cuda").to(dtype), layout)[0].transpose(0, 1).requires_grad_() for shape in shapes]


def results(leaves, *given, **settings) -> list[torch.Tensor]:
    """Output and gradients."""
    out = moba_attention_varlen(*leaves, *given, **{**BLOCKS, **settings})
    weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves)]


def check(leaves, *given, **settings) -> None:
    """The dense path, against the specification in float64."""
    key = {"cu_seqlens_k": settings["cu_seqlens_k"]} if "cu_seqlens_k" in settings else {}
    found = explain(*leaves, **BLOCKS, cu_seqlens=given[0], **key)
    assert found.path == "dense", found
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = results(wide, *given, **settings, implementation="naive")
    for got, want in zip(results(leaves, *given, **settings), wanted):
        assert got.shape == want.shape and distance(got, want) < TOLERANCE[leaves[0].dtype]


@pytest.mark.parametrize("seed", range(24))
def test_values_and_gradients_are_those_of_the_specification(seed):
    draw = random.Random(seed)
    keys = [draw.choice([0, 1, draw.randint(2, LONGEST), LONGEST]) for _ in range(draw.randint(1, 5))] + [LONGEST]
    queries = [draw.choice([n, n, min(n, 1), 0, draw.randint(0, n)]) for n in keys] if seed % 2 else keys
    queries[-1] = keys[-1]  # at least 32 on average
    groups, repeats = draw.randint(1, 3), draw.randint(1, 3)
    width, dtype = draw.choice([8, 24, 64, 96, 128, 200, 256]), draw.choice([torch.bfloat16, torch.float16])
    leaves = tensors(sum(queries), sum(keys), groups * repeats, groups, width, dtype, LAYOUTS[seed % len(LAYOUTS)])
    more_keys = {"cu_seqlens_k": bounds(*keys)} if seed % 2 else {}
    check(leaves, bounds(*queries), scale=draw.choice([None, 0.3, 1.0]), **more_keys)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-38, 1e-6, 100.0])
def test_any_scale_is_computed(scale):
    leaves, given = tensors(500, 500), bounds(200, 300)
    wanted = results([x.detach().double().requires_grad_() for x in leaves], given, scale=scale, implementation="naive")
    for got, want in zip(results(leaves, given, scale=scale), wanted):
        assert (distance(got, want) < TOLERANCE[torch.bfloat16]) if want.abs().max() > 1e-30 else got.abs().max() < 1e-30


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-38, 1e-6, 100.0])
def test_any_scale_is_computed_for_rows_too(scale):
    leaves = [torch.randn(2, h, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got, want = (moba_attention(*x, **BLOCKS, scale=scale, implementation=y) for x, y in ((leaves, "auto"), (wide, "naive")))
    assert distance(got, want) < TOLERANCE[torch.bfloat16]
    grads = zip(torch.autograd.grad(got.float().square().sum(), leaves), torch.autograd.grad(want.square().sum(), wide))
    for got, want in grads:
        assert (distance(got, want) < TOLERANCE[torch.bfloat16]) if want.abs().max() > 1e-30 else got.abs().max() < 1e-30


def test_operands_and_gradients_may_begin_anywhere_in_memory():
    """The kernels load 16 bytes at a time."""
    shapes, given = ((500, 4, 64), (500, 2, 64), (500, 2, 64)), bounds(200, 300)
    leaves = [torch.randn(n * h * d + 3, device="cuda").bfloat16()[3:].view(n, h, d).requires_grad_() for n, h, d in shapes]
    check(leaves, given)
    out = moba_attention_varlen(*leaves, given, **BLOCKS)
    joined = torch.cat([torch.randn(3, device="cuda").bfloat16(), out.flatten()])  # whose gradient is cut at an odd place
    got = torch.autograd.grad(joined, leaves, torch.ones_like(joined))
    want = torch.autograd.grad(moba_attention_varlen(*leaves, given, **BLOCKS).sum(), leaves)
    for x, y in zip(got, want):
        assert distance(x, y) < TOLERANCE[torch.bfloat16]


def test_nan_in_another_sequence_changes_nothing():
    leaves, given = tensors(900, 900), bounds(200, 300, 0, 350, 50)
    spoilt = [x.detach().index_fill(0, torch.arange(200, 500, device="cuda"), torch.nan).requires_grad_() for x in leaves]
    for clean, got in zip(results(leaves, given), results(spoilt, given)):
        for part in (slice(0, 200), slice(500, 900)):
            assert distance(got[part], clean[part]) < 1e-3  # query gradients are added up in any order


def test_a_graph_takes_sequences_of_any_length():
    """A capture does not know the lengths: other ones may be written into `cu_seqlens` before it is replayed."""
    leaves, given = [x.detach() for x in tensors(1200, 1200)], bounds(300, 300, 300, 300)
    call = {**BLOCKS, "implementation": "triton"}
    for _ in range(2):
        moba_attention_varlen(*leaves, given, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moba_attention_varlen(*leaves, given, **call)
    for lengths in ((300,) * 4, (1000, 0, 150, 50)):
        given.copy_(bounds(*lengths))
        graph.replay()
        wanted = moba_attention_varlen(*(x.double() for x in leaves), bounds(*lengths), **BLOCKS, implementation="naive")
        assert distance(captured, wanted) < TOLERANCE[torch.bfloat16]


def test_a_capture_that_would_have_to_compile_says_so():
    """In a process that has compiled nothing yet: calls before the capture needed no FlexAttention."""
    script = """
import torch
from moba_flex import moba_attention_varlen
x, bounds = torch.randn(1200, 2, 64, device="cuda", dtype=torch.bfloat16), torch.arange(0, 1201, 300, device="cuda", dtype=torch.int32)
call = lambda: moba_attention_varlen(x, x, x, bounds, block_size=128, top_k=3)
call()
torch.cuda.synchronize()
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    call()
"""
    env = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 1 and "RuntimeError: FlexAttention has no kernel for this call yet" in run.stderr, run.stderr[-2000:]


def test_compiled_code_computes_the_same():
    leaves, given = tensors(900, 900), bounds(200, 300, 350, 50)
    compiled = torch.compile(lambda *x: moba_attention_varlen(*x, given, **BLOCKS) * 2, fullgraph=True)
    assert distance(compiled(*leaves) / 2, moba_attention_varlen(*leaves, given, **BLOCKS)) < TOLERANCE[torch.bfloat16]


def test_what_the_kernels_do_not_compute_is_refused():
    leaves, given = tensors(500, 500), bounds(200, 300)
    query, key, value = (x.detach() for x in leaves)
    with pytest.raises(NotImplementedError, match="naive"):
        torch.func.jvp(lambda x: moba_attention_varlen(x, key, value, given, **BLOCKS), (query,), (query,))
    first = torch.autograd.grad(moba_attention_varlen(*leaves, given, **BLOCKS).float().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first[0].float().square().sum(), leaves)


def test_deterministic_algorithms_give_the_same_bits():
    leaves, given = tensors(2000, 2000, width=128), bounds(*(250,) * 8)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = results(leaves, given), results(leaves, given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(once, again))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients(mode):
    leaves, given = tensors(500, 500), bounds(200, 300)
    with mode():
        wanted = moba_attention_varlen(*(x.double() for x in leaves), given, **BLOCKS, implementation="naive")
        assert distance(moba_attention_varlen(*leaves, given, **BLOCKS), wanted) < TOLERANCE[torch.bfloat16]


def test_many_short_sequences_are_routed():
    """Their backward pass would allocate far more than the inputs."""
    leaves = tensors(3100, 3100)
    assert "32 queries" in varlen.obstacle(leaves[0].transpose(0, 1)[None], 100)
    assert explain(*leaves, **BLOCKS, cu_seqlens=bounds(*(31,) * 100)).path == "routed"


def test_rows_that_read_every_block_may_lie_anywhere_in_memory():
    """PyTorch's fused attention loads 16 bytes at a time, and computes something slower if the last dimension is not contiguous."""
    shapes = ((2, 4, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    for layout in ("odd", *LAYOUTS):
        if layout == "odd":
            leaves = [torch.randn(math.prod(shape) + 3, device="cuda").bfloat16()[3:].view(shape).requires_grad_() for shape in shapes]
        else:
            leaves = [laid_out(torch.randn(shape, device="cuda").bfloat16(), layout).requires_grad_() for shape in shapes]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        assert explain(*leaves, **BLOCKS).path == "dense"
        results = []
        for given, implementation in ((leaves, "auto"), (wide, "naive")):
            out = moba_attention(*given, **BLOCKS, implementation=implementation)
            joined = torch.cat([out.new_zeros(3), out.flatten()])  # whose gradient is cut at an odd place
            results.append([out, *torch.autograd.grad(joined, given, torch.linspace(-1, 1, len(joined), device="cuda").to(joined))])
        for got, want in zip(*results):
            assert distance(got, want) < TOLERANCE[torch.bfloat16], layout
