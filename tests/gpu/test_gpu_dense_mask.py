"""What only a GPU can show of few blocks as one dense call: its compiled kernels against the specification, and how they behave."""

from __future__ import annotations

import pytest
import torch
from support.gpu import TOLERANCE, Case, blocks, distance, run

from moba_flex import moba_attention
from moba_flex.backends import flex
from moba_flex.core.layout import slots_per_block
from moba_flex.core.layout_builders import dense_layout
from moba_flex.ops.bits import block_bits

if torch.cuda.is_available():
    from moba_flex.ops import triton as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: FlexAttention compiles to Triton kernels"),
]

CASES = [
    Case("block 128", settings=blocks(128, 3)),
    Case("block 128, no whole tiles", n_query=913, n_key=913, settings=blocks(128, 3)),
    Case("block 128, few queries", n_query=130, n_key=1000, settings=blocks(128, 3)),
    Case("block 48, sink and recent, shared", settings=blocks(48, 5, sink_blocks=1, recent_blocks=1, share_selection=True)),
    Case("block 100, narrow values, soft-capped", value_width=64, settings=blocks(100, 3, softcap=2.0)),
    Case("32 blocks of 16", n_query=512, n_key=512, width=64, value_width=64, dtype=torch.float16, settings=blocks(16, 6)),
    Case("float32", width=64, value_width=64, dtype=torch.float32, settings=blocks(128, 3)),
    Case("one query", n_query=1, settings=blocks(128, 3)),
]


@pytest.fixture(autouse=True)
def never_routed(monkeypatch):
    monkeypatch.setattr(flex, "attend", lambda *_: pytest.fail("routed"))
    monkeypatch.setattr(flex, "backward", lambda *_: pytest.fail("routed"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_masked_equals_the_specification(case):
    wanted = run(case, "naive", torch.float32)
    got = run(case, "flex")
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, wanted):
        assert distance(a, b) < TOLERANCE[case.dtype], (name, distance(a, b), case)


@pytest.mark.parametrize(("block_size", "n_query", "n_key"), [(16, 512, 512), (48, 300, 301), (100, 1, 350), (128, 257, 700)])
def test_the_bits_are_those_of_plain_pytorch(block_size, n_query, n_key):
    layout = dense_layout(2, n_query, n_key, block_size, slots_per_block(block_size), torch.device("cuda"))
    slots = layout.n_query_blocks * layout.width
    block = torch.rand(2, 3, slots, layout.n_key_blocks, device="cuda").argsort(-1).int()
    past = block < layout.own.repeat_interleave(layout.width, 1)[:, None, :, None]
    chosen = torch.where(past, block, -1)[..., :3].contiguous()
    assert torch.equal(kernels.block_bits(chosen, layout), block_bits(chosen, layout))


def test_two_runs_give_the_same_bits():
    for a, b in zip(run(CASES[0], "flex"), run(CASES[0], "flex")):
        assert torch.equal(a, b)


def test_nothing_is_read_back_to_the_host():
    run(CASES[0], "flex")
    torch.cuda.set_sync_debug_mode("error")
    try:
        query, key, value = CASES[0].tensors()
        out = moba_attention(query, key, value, **CASES[0].settings)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


def test_forward_can_be_captured_in_a_cuda_graph():
    query, key, value = (t.detach() for t in CASES[0].tensors())
    eager = moba_attention(query, key, value, **CASES[0].settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moba_attention(query, key, value, **CASES[0].settings)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert torch.equal(captured, moba_attention(query, key, value, **CASES[0].settings))


def test_what_a_model_projects_is_read_where_it_lies():
    straight = [t.detach()[:1].clone() for t in CASES[0].tensors()]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in straight]
    wanted = moba_attention(*straight, **CASES[0].settings)
    got = moba_attention(*turned, **CASES[0].settings)
    assert torch.equal(got, wanted)
    assert got.transpose(1, 2).is_contiguous()

    def call(query, key, value):
        return moba_attention(query * 2, key, value, **CASES[0].settings) + 1

    results = [f(*turned) for f in (torch.compile(call, fullgraph=True), call)]
    assert distance(*results) < 1e-3
    for a, b in zip(*(torch.autograd.grad(out.float().square().sum(), turned) for out in results)):
        assert distance(a, b) < 1e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_sees_them_and_nothing_crashes(bad):
    query, key, value = (t.detach().clone() for t in CASES[0].tensors())
    key[:, :, 500] = bad
    out = moba_attention(query, key, value, **CASES[0].settings)
    assert not out[:, :, 500].isfinite().all()
    assert out[:, :, :384].isfinite().all()  # queries of earlier blocks cannot see it
    torch.cuda.synchronize()


def test_twenty_lengths_compile_once_forward_and_once_backward():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for length in range(300, 2300, 100):
        tensors = [torch.randn(1, h, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
        moba_attention(*tensors, block_size=128, top_k=2).float().sum().backward()
    assert counters["stats"]["unique_graphs"] == 2, dict(counters["stats"])
