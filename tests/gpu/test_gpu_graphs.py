"""Replays of CUDA graphs give the bits of eager calls: with any inputs and masks, in inference mode, compiled, and in training."""

from __future__ import annotations

import pytest
import torch
from support.gpu_graphs import GROUPS, HEADS, SETTINGS, WIDTH, assert_same_bits, leaves, results, without_graphs
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moba_flex import moba_attention, moba_attention_varlen, patch
from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CUDA graphs are captured from its streams"),
]
CASES = {
    "contiguous": ({}, {}),
    "as a model projects": ({"batch": 1, "tokens_first": True}, {}),
    "two rows, tokens first": ({"tokens_first": True}, {}),
    "few queries": ({"n_query": 130}, {}),
    "shared selection": ({}, {"share_selection": True}),
    "without a gradient of the log-sum-exp": ({}, {"with_lse": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_replays_give_the_bits_of_eager_calls(name, replays):
    shape, more = CASES[name]
    wanted = without_graphs(lambda: [results(leaves(seed, **shape), **more) for seed in range(6)])
    for seed in range(6):
        assert_same_bits(results(leaves(seed, **shape), **more), wanted[seed], (name, seed))
    assert len(replays) == 2 * (6 - EAGER_CALLS - 1)
    assert len(set(replays)) == 2  # backward passes come from autograd's own thread


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("padded", "flex"), ("padded", "triton"), ("packed", "flex"), ("packed", "triton"), ("packed, more keys", "flex")],
)
def test_a_graph_serves_any_padding_and_any_sequences(kind, implementation, replays):
    """What follows from them is computed in the graph: each call has others."""

    def given(seed: int) -> dict[str, Tensor]:
        cuts = torch.randint(100, 600, (2,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
        if kind == "padded":
            real = torch.tensor(cuts, device="cuda")[:, None]
            return {"padding_mask": torch.arange(700, device="cuda") < real if seed % 2 else torch.arange(700, device="cuda") >= real}
        bounds = torch.tensor([0, *cuts, 700], device="cuda", dtype=torch.int32)
        if kind == "packed":
            return {"cu_seqlens": bounds}
        few = bounds.diff().clamp(max=100)
        few[bounds.diff().argmax()] += 300 - few.sum()
        return {"cu_seqlens": torch.nn.functional.pad(few.cumsum(0), (1, 0)).int(), "cu_seqlens_k": bounds}

    def results_of(seed: int) -> list[Tensor]:
        n_query = 300 if "more keys" in kind else 700
        tensors = leaves(seed, batch=2 if kind == "padded" else 1, n_query=n_query)
        if kind == "padded":
            return results(tensors, with_lse=False, implementation=implementation, **given(seed))
        flat = [x[0].transpose(0, 1) for x in tensors]
        out, lse = moba_attention_varlen(*flat, **given(seed), return_lse=True, implementation=implementation, **SETTINGS)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.float().sin().sum() + lse.cos().sum(), tensors)]

    wanted = without_graphs(lambda: [results_of(seed) for seed in range(7)])
    for seed in range(7):
        assert_same_bits(results_of(seed), wanted[seed], (kind, seed))
    assert len(replays) == 2 * (7 - EAGER_CALLS - 1)


def test_a_graph_takes_nan_and_equal_scores_as_they_come(replays):
    def spoilt(seed: int) -> list[Tensor]:
        query, key, value = leaves(seed)
        with torch.no_grad():
            if seed == 4:
                key[:, :, 100:400] = key[:, :, 100:101]
            if seed == 5:
                key[0, :, 300] = torch.nan
        return [query, key, value]

    wanted = without_graphs(lambda: [results(spoilt(seed)) for seed in range(7)])
    for seed in range(7):
        assert_same_bits(results(spoilt(seed)), wanted[seed], seed)
    assert replays


def test_shapes_may_alternate_and_graphs_come_and_go(replays, monkeypatch):
    """Four graphs have room, where six are wanted."""
    monkeypatch.setattr(cache, "MAX_GRAPHS", 4)
    lengths = [n for n in (700, 513, 300) for _ in range(4)] + [700, 513, 300] * 6
    wanted = without_graphs(lambda: [results(leaves(seed, n_query=n, n_key=n)) for seed, n in enumerate(lengths)])
    got = [results(leaves(seed, n_query=n, n_key=n)) for seed, n in enumerate(lengths)]
    for seed, n in enumerate(lengths):
        assert_same_bits(got[seed], wanted[seed], (seed, n))
    assert len(replays) >= 6
    assert len(cache._graphs) <= 4


def test_nothing_is_read_back_to_the_host(replays):
    tensors, wanted = leaves(7), without_graphs(results, leaves(7))
    for seed in range(EAGER_CALLS + 1):
        results(leaves(seed))
    replays.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 2
    assert_same_bits(got, wanted)


def test_in_inference_mode_and_out_of_it(replays):
    tensors = [[x.detach() for x in leaves(seed)] for seed in range(10)]
    wanted = without_graphs(lambda: [moba_attention(*x, **SETTINGS) for x in tensors])
    for seed, x in enumerate(tensors):
        with torch.inference_mode(seed % 2 == 0):
            got = moba_attention(*x, **SETTINGS)
        assert got.is_inference() == (seed % 2 == 0)
        assert torch.equal(got, wanted[seed]), seed
    assert len(replays) == 2 * (5 - EAGER_CALLS - 1)


def test_torch_compile_calls_graphs_too(replays):
    compiled = torch.compile(lambda query, key, value: moba_attention(query * 2, key, value, **SETTINGS) + 1, fullgraph=True)

    def run(seed: int) -> list[Tensor]:
        tensors = leaves(seed)
        out = compiled(*tensors)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]

    wanted = without_graphs(lambda: [run(seed) for seed in range(6)])
    for seed in range(6):
        for a, b in zip(run(seed), wanted[seed], strict=True):
            assert torch.equal(a, b), seed
    assert len(replays) == 2 * (6 - EAGER_CALLS - 1)


def test_a_model_trains_with_the_same_losses(replays):
    sizes = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "intermediate_size": 256}
    ids = torch.randint(64, (5, 1, 700), generator=torch.Generator().manual_seed(0)).cuda()

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)).to("cuda", torch.bfloat16)
        patch(model, **SETTINGS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        each = []
        for batch in ids:
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.append(loss.item())
        return each

    wanted = without_graphs(losses)
    assert losses() == wanted
    assert len(set(wanted)) == len(wanted)
    assert len(replays) == 2 * (3 * 5 - EAGER_CALLS - 1)
