"""What only a GPU can show: the compiled kernels against the specification, and how they behave there.

Here the operation alone; `test_gpu_decoding.py` and `test_gpu_graph*.py` hold what is around it.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.gpu import TOLERANCE, Case, always_routed, blocks, distance, run
from support.near_ties import NEAR_TIES, NearTies, check_choices
from transformers import LlamaConfig, LlamaForCausalLM

from moba_flex import moba_attention, moba_attention_varlen, patch, select_blocks, set_working_memory
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import gate, routing
from moba_flex.reference import reference_selection

if torch.cuda.is_available():
    from moba_flex.ops import triton as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: FlexAttention compiles to Triton kernels"),
]


CASES = [
    Case("block 128", settings=blocks(128, 3)),
    Case("block 128, one length more", n_query=913, n_key=913, settings=blocks(128, 3)),
    Case("block 256, sinks", settings=blocks(256, 2)),
    Case("block 192, few queries", n_query=130, settings=blocks(192, 3)),
    Case("block 100, narrow values", value_width=64, settings=blocks(100, 3)),
    Case("block 16", width=64, value_width=64, dtype=torch.float16, settings=blocks(16, 6)),
    Case("block 48, sink and recent", width=64, value_width=64, settings=blocks(48, 5, sink_blocks=1, recent_blocks=1)),
    Case("block 64, width 96", width=96, value_width=96, settings=blocks(64, 4)),
    Case("block 128, width 256", width=256, value_width=256, settings=blocks(128, 3)),
    Case("float32", width=64, value_width=64, dtype=torch.float32, settings=blocks(128, 3)),
    Case("float32, block 32", width=64, value_width=64, dtype=torch.float32, settings=blocks(32, 5)),
    Case("soft-capped", settings=blocks(128, 3, softcap=2.0)),
    Case("shared selection", heads=8, settings=blocks(128, 3, share_selection=True)),
    Case("not causal", settings=blocks(100, 3, causal=False)),
    Case("one query", n_query=1, settings=blocks(128, 3)),
    Case("one head a group", heads=2, settings=blocks(128, 1)),
    Case("padding", padding=((13, 700), (0, 401)), settings=blocks(128, 3)),
    Case("padding, few queries", n_query=300, padding=((450, 700), (0, 700)), settings=blocks(100, 3)),
]


def takes_triton(case: Case) -> bool:
    return case.dtype != torch.float32


@pytest.mark.parametrize("routed", [False, True], ids=["as decided", "routed"])
@pytest.mark.parametrize("implementation", ["flex", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_specification(case, implementation, routed):
    if implementation == "triton" and not takes_triton(case):
        with pytest.raises(ValueError, match=r'implementation="triton" cannot take query .* of torch.float32'):
            run(case, implementation)
        return
    wanted = run(case, "naive", torch.float32)
    with always_routed() if routed else nullcontext():
        got = run(case, implementation)
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, wanted):
        assert distance(a, b) < TOLERANCE[case.dtype], (name, distance(a, b), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gate_chooses_as_in_float64(case):
    query, key, _ = (t.detach() for t in case.tensors())
    settings = {name: value for name, value in case.settings.items() if name != "softcap"}
    got = select_blocks(query, key, padding_mask=case.mask(), **settings).to_dense()
    wanted, _ = reference_selection(query.double(), key.double(), AttentionSettings(**settings), padding_mask=case.mask())
    different = (got != wanted).any(-1)
    assert different.float().mean() < 1e-4, (int(different.sum()), case)  # near-ties of float32 are all that may differ
    assert torch.equal(got.sum(-1), wanted.sum(-1))


@pytest.mark.parametrize("name", ["flex", "triton"])
def test_packed_sequences_equal_the_specification(name):
    generator = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (torch.randn(1000, h, 64, generator=generator, device="cuda").half() for h in (4, 2, 2))
    bounds = torch.tensor([0, 1, 1, 300, 1000], dtype=torch.int32, device="cuda")
    got, wanted = (
        moba_attention_varlen(query, key, value, bounds, block_size=64, top_k=3, implementation=implementation)
        for implementation in (name, "naive")
    )
    assert distance(got, wanted) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("block_size", [48, 64, 128, 192, 512])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_with_more_keys_equal_the_specification(block_size, causal):
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = (390, 4, 64), (1800, 2, 64), (1800, 2, 64)
    tensors = [torch.randn(*shape, generator=generator, device="cuda").half().requires_grad_() for shape in shapes]
    bounds = [torch.tensor(b, dtype=torch.int32, device="cuda") for b in ([0, 1, 1, 389, 390], [0, 300, 301, 1000, 1800])]
    call = {"cu_seqlens_k": bounds[1], "block_size": block_size, "top_k": 3, "causal": causal}
    grad, results = torch.randn(390, 4, 64, generator=generator, device="cuda").half(), []
    for name in ("flex", "naive"):
        out = moba_attention_varlen(*tensors, bounds[0], **call, implementation=name)
        results.append((out, *torch.autograd.grad(out, tensors, grad)))
    for name, a, b in zip(("output", "dq", "dk", "dv"), *results):
        assert distance(a, b) < TOLERANCE[torch.float16], (name, distance(a, b))
    with pytest.raises(ValueError, match=r'implementation="triton" cannot take query .*: it takes no cu_seqlens_k; use "flex" or "auto"'):
        moba_attention_varlen(*tensors, bounds[0], **call, implementation="triton")


@pytest.mark.parametrize("implementation", ["flex", "triton"])
@pytest.mark.parametrize(("block_size", "heads", "groups"), [(32, 4, 1), (128, 2, 2), (256, 2, 1)])
def test_a_block_that_every_query_wants_is_cut_into_parts(block_size, heads, groups, implementation):
    """More rows than one program works through: the gradients of its keys are sums over parts."""
    n_tokens, width = 8192, 64
    generator = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (torch.randn(1, h, n_tokens, width, generator=generator, device="cuda") for h in (heads, groups, groups))
    key[:, :, :block_size] += 0.5
    query += 0.5
    grad = torch.randn(query.shape, generator=generator, device="cuda").bfloat16()
    results = []
    for name, dtype in ((implementation, torch.bfloat16), (implementation, torch.bfloat16), ("naive", torch.float32)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (query, key, value)]
        out = moba_attention(*leaves, block_size=block_size, top_k=3, implementation=name)
        results.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
    for first, again, wanted in zip(*results):
        assert torch.equal(first, again)
        assert distance(first, wanted) < 2 * TOLERANCE[torch.bfloat16]


def test_triton_refuses_long_blocks():
    query, key, value = CASES[0].tensors()
    with pytest.raises(ValueError, match="takes blocks of up to 256 tokens"):
        moba_attention(query, key, value, block_size=512, top_k=1, implementation="triton")


def test_chunks_do_not_change_the_result():
    case = CASES[0]
    whole = run(case, "flex")
    before = set_working_memory(1)
    try:
        parts = run(case, "flex")
    finally:
        set_working_memory(before)
    for a, b in zip(parts, whole):
        assert distance(a, b) < 1e-6


def test_there_may_be_more_heads_than_a_grid_is_wide():
    """CUDA launches at most 65,535 programs along the second axis of a grid."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = (16500, 4, 40, 16), (16500, 2, 40, 16), (16500, 2, 40, 16)
    leaves = [torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    some, results = slice(16000, 16010), []
    for x in (leaves, [x.detach()[some].requires_grad_() for x in leaves]):
        out = moba_attention(*x, block_size=16, top_k=2)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), x)])
    for whole, alone in zip(*results):
        assert distance(whole[some], alone) < TOLERANCE[torch.bfloat16]
        assert torch.equal(whole[some], alone)


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_two_runs_give_the_same_bits(implementation):
    for a, b in zip(run(CASES[0], implementation), run(CASES[0], implementation)):
        assert torch.equal(a, b)


def test_transposed_inputs_need_no_preparation():
    query, key, value = (t.detach() for t in CASES[0].tensors())
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert torch.equal(moba_attention(*turned, block_size=128, top_k=3), moba_attention(query, key, value, block_size=128, top_k=3))


@pytest.mark.parametrize("case", [case for case in CASES if not case.padding], ids=lambda case: case.name)
def test_an_output_lies_as_its_query_does(case):
    """Heads that lie together for each token, as a model's projections make them; compiled too. And so do gradients."""
    straight = [t.detach() for t in case.tensors()]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in straight]

    def call(query, key, value):
        return moba_attention(query, key, value, **case.settings)

    wanted, out = call(*(x.requires_grad_() for x in straight)), call(*turned)
    assert torch.equal(out, wanted)
    assert out.transpose(1, 2).is_contiguous() and wanted.is_contiguous()
    gradients = [torch.autograd.grad(x.float().square().sum(), leaves) for x, leaves in ((out, turned), (wanted, straight))]
    for a, b in zip(*gradients):
        assert torch.equal(a, b)
        assert a.transpose(1, 2).is_contiguous() and b.is_contiguous()

    with torch._dynamo.config.patch(recompile_limit=len(CASES)):  # one function to it, whatever its case
        compiled = torch.compile(lambda *x: call(*x) * 2, fullgraph=True)(*turned)  # a factor that no dtype rounds
    assert torch.equal(compiled, out * 2)
    for a, b in zip(torch.autograd.grad((compiled.float() / 2).square().sum(), turned), gradients[0]):
        assert distance(a, b) < 1e-3


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_nothing_is_read_back_to_the_host(implementation):
    run(CASES[0], implementation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        query, key, value = CASES[0].tensors()
        out = moba_attention(query, key, value, **CASES[0].settings, implementation=implementation)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


def test_fifty_lengths_compile_at_most_twice():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for length in range(300, 2300, 40):
        query, key, value = (torch.randn(1, h, length, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
        moba_attention(query, key, value, block_size=128, top_k=3)
    # The local and the routed kernel, twice each: for the first length, and for any other.
    assert counters["stats"]["unique_graphs"] <= 2 * 2, dict(counters["stats"])
    for length in range(300, 2300, 40):
        query, key, value = (torch.randn(1, length, h, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (4, 2, 2))
        moba_attention(query, key, value, block_size=128, top_k=3)
    assert counters["stats"]["unique_graphs"] <= 2 * 3, dict(counters["stats"])  # the local one, for queries that lie otherwise


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_forward_can_be_captured_in_a_cuda_graph(implementation):
    query, key, value = (t.detach() for t in CASES[0].tensors())
    settings = {**CASES[0].settings, "implementation": implementation}
    eager = moba_attention(query, key, value, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moba_attention(query, key, value, **settings)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert torch.equal(captured, moba_attention(query, key, value, **settings))


def test_torch_compile_sees_one_operator():
    query, key, value = CASES[0].tensors()

    def call(query, key, value):
        return moba_attention(query * 2, key, value, **CASES[0].settings) + 1

    compiled = torch.compile(call, fullgraph=True)
    wanted = call(query, key, value)
    got = compiled(query, key, value)
    assert distance(got, wanted) < 1e-3
    grads = [torch.autograd.grad(out.float().square().sum(), (query, key, value)) for out in (got, wanted)]
    for a, b in zip(*grads):
        assert distance(a, b) < 1e-2


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_what_sees_them_and_nothing_crashes(bad, name):
    tensors = {name: t.detach().clone() for name, t in zip(("query", "key", "value"), CASES[0].tensors())}
    tensors[name][:, :, 500] = bad
    tensors["query"].requires_grad_()
    out = moba_attention(**tensors, **CASES[0].settings)
    (grad,) = torch.autograd.grad(out.float().square().sum(), tensors["query"])
    assert not out[:, :, 500].isfinite().all()
    assert out[:, :, :384].isfinite().all() and grad[:, :, :384].isfinite().all()  # queries of earlier blocks cannot see it
    torch.cuda.synchronize()


def test_empty_and_single_tokens():
    for length in (0, 1):
        query, key, value = (torch.randn(2, h, length, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
        out = moba_attention(query, key, value, block_size=128, top_k=3)
        assert out.shape == (2, 4, length, 64)
        if length:
            assert torch.equal(out, value.repeat_interleave(2, 1))


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "slots", "count", "n_blocks"), [(4, 2, 3000, 7, 100), (3, 1, 130, 2, 5), (2, 2, 40_000, 15, 2000)]
)
def test_routing_on_a_gpu_is_that_of_plain_pytorch(heads, groups, slots, count, n_blocks, skewed):
    chosen = torch.rand(2, heads, slots, n_blocks, device="cuda").topk(count, -1).indices.int() if n_blocks < 1000 else None
    if chosen is None:  # too many scores to draw them all
        chosen = (
            torch.randint(0, n_blocks // count, (2, heads, slots, count), device="cuda") * count + torch.arange(count, device="cuda")
        ).int()
    chosen = chosen.masked_fill(torch.rand(chosen.shape, device="cuda") < 0.1, -1)
    if skewed:
        chosen[..., 0] = 3
        chosen[..., 1:] = chosen[..., 1:].masked_fill(chosen[..., 1:] == 3, -1)
    given = chosen, groups, n_blocks, 128, chosen.numel()
    got, wanted = kernels.route(*given), routing.route(*given)
    for name in ("row_of_pair", "tile_in_use", "first_tile", "tiles_of_block", "rows_of_block"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    used = wanted.tile_in_use.bool()
    assert torch.equal(got.block_of_tile[used], wanted.block_of_tile[used])


def chosen_otherwise(query: torch.Tensor, key: torch.Tensor, block_size: int, top_k: int) -> float:
    """The share of queries whose blocks are not those that float64 chooses."""
    got = select_blocks(query, key, block_size=block_size, top_k=top_k).indices
    layout = dense_layout(1, query.shape[2], query.shape[2], block_size, block_size, query.device)
    wanted = gate.choose(query.double(), key.double(), layout, AttentionSettings(block_size, top_k))
    last = torch.iinfo(torch.int32).max
    wanted = torch.where(wanted < 0, last, wanted).sort(-1).values
    return (torch.where(got < 0, last, got) != wanted).any(-1).float().mean().item()


@pytest.mark.parametrize("top_k", [5, 9, 13, 20])
@pytest.mark.parametrize("block_size", [16, 128])
def test_the_gate_is_exact_where_the_best_blocks_share_a_lane(block_size, top_k):
    """The fast search keeps four blocks a lane (numbers equal modulo 32 or 64): here the best ones all lie in one, and some are equal."""
    n_blocks = 300
    query = torch.randn(1, 2, n_blocks * block_size, 64, device="cuda")
    key = torch.randn_like(query) * 0.01
    favourites = torch.arange(5, n_blocks, 64, device="cuda")
    key.unflatten(2, (n_blocks, block_size))[:, :, favourites] += torch.randn(64, device="cuda")
    key.unflatten(2, (n_blocks, block_size))[:, :, 7:11] = key[:, :, :1, None]
    for dtype in (torch.float32, torch.bfloat16):
        q, k = query.to(dtype), key.to(dtype)
        assert chosen_otherwise(q, k, block_size, top_k) < 1e-3, dtype


@pytest.mark.parametrize("top_k", [2, 9, 16])
def test_the_gate_tells_blocks_apart_whose_scores_are_nearly_equal(top_k):
    """Pairs of blocks differ in one number of one key, by less than the last bits that the fast search needs for itself."""
    n_blocks, block_size = 640, 16
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, key = (torch.randn(1, 2, n_blocks * block_size, 64, device="cuda").to(dtype) for _ in range(2))
        in_blocks = key.unflatten(2, (n_blocks, block_size))
        in_blocks[:, :, 1::2] = in_blocks[:, :, ::2]
        in_blocks[:, :, 1::4, 3, 5] *= 1.01
        assert chosen_otherwise(query, key, block_size, top_k) < 1e-3, dtype


@pytest.mark.parametrize("case", NEAR_TIES, ids=str)
def test_near_ties_are_decided_by_float32_means(case: NearTies):
    check_choices(case, "cuda")


def test_where_every_block_is_read_it_is_dense_attention():
    query, key, value = Case("").tensors()
    for settings in (blocks(128, 6), blocks(1024, 1), blocks(16, 44)):  # 700 tokens
        results = []
        for implementation in ("flex", "naive"):
            out = moba_attention(query, key, value, implementation=implementation, **settings)
            results.append((out, *torch.autograd.grad(out.float().sin().sum(), (query, key, value))))
        for a, b in zip(*results):
            assert distance(a, b) < TOLERANCE[torch.bfloat16], settings


def test_a_model_reads_a_short_prompt_with_the_attention_that_it_had():
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(64, (2, 600), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        longer = model(ids.repeat(1, 2)).logits
        patch(model, block_size=64, top_k=10)
        assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
        assert not torch.equal(model(ids.repeat(1, 2)).logits, longer)
