"""The systems that `examples/benchmarks/benchmark.py` compares get the same tensors and compute the same attention."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import benchmark
import pytest
import torch
from benchmarking import attention
from benchmarking.attention import BOTH, FORWARD, SYSTEMS, Attention, Settings, System
from support.benchmark_runs import CPU, TOY, fake, run
from torch.nn.attention.flex_attention import flex_attention

from moba_flex import moba_attention_varlen
from moba_flex.backends import flash

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_all_systems_get_the_same_tensors_and_each_sample_others(monkeypatch):
    got = []
    for name, packed in (("plain", False), ("packed", True)):
        monkeypatch.setitem(SYSTEMS, name, System(lambda *a: got.append(a[:3]) or a[0], 1, packed=packed))
    workload = Attention(Settings(2, 4, 2, 16, 16, 2, "float32", 5), CPU, ["plain", "packed"], forward_only=False)
    for name, sample in (("plain", 0), ("packed", 0), ("plain", 1)):
        workload.call(name, FORWARD, 40, sample)()
    for plain, packed, other in zip(*got):
        assert torch.equal(plain.transpose(1, 2).reshape(80, -1, 16), packed) and packed.is_contiguous()
        assert not torch.equal(plain, other)


def test_a_backward_pass_gives_gradients_of_all_inputs_and_a_forward_pass_none(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.autograd, "grad", lambda out, leaves, grad: asked.append((out.requires_grad, len(leaves), grad[0].shape)))
    needed = []
    fake(monkeypatch, lambda q, k, v: needed.append((q + 1).requires_grad) or q + k.sum() + v.sum())
    workload = Attention(TOY, CPU, ["fake"], forward_only=False)
    workload.call("fake", FORWARD, 40, 0)()
    assert needed == [False] and not asked
    workload.call("fake", BOTH, 40, 0)()
    assert needed == [False, True] and asked == [(True, 3, (1, 4, 40, 16))]


@pytest.mark.parametrize(
    ("block_size", "dtype", "taken"), [(128, "bfloat16", True), (256, "float16", True), (512, "bfloat16", False), (128, "float32", False)]
)
def test_settings_that_a_system_is_not_made_for_are_left_out(block_size, dtype, taken):
    row = Settings(1, 2, 1, 8, block_size, 2, dtype, 1)
    names = ["moba_flex", "moba_flex-triton"]
    assert attention.available(names, torch.device("cuda"), row)[0] == names[: 1 + taken]


# Dense attention


def test_dense_systems_compute_causal_attention_with_grouped_heads(monkeypatch):
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    query, key, value = Attention(TOY, CPU, [], True).inputs(300, 0, False)
    scores = query @ key.repeat_interleave(2, 1).mT / 4
    scores.masked_fill_(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    wanted = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    for call in (SYSTEMS["dense-sdpa"].call, attention.flex):
        assert torch.allclose(call(query, key, value, TOY), wanted, atol=1e-5)


@pytest.mark.parametrize("tokens", [128, 1000, 1024])
def test_the_lists_of_the_causal_mask_are_the_causal_tiles(tokens):
    mask, n = attention.causal_mask(tokens, CPU), -(-tokens // 128)
    tiles = torch.arange(n)
    same, later = tiles[:, None] == tiles, tiles[:, None] < tiles
    wanted = {"kv": same, "full_kv": later.T, "q": same, "full_q": later}
    for name, expected in wanted.items():
        counts, first = getattr(mask, f"{name}_num_blocks")[0, 0], getattr(mask, f"{name}_indices")[0, 0, :, 0]
        met = torch.stack([(tiles >= f) & (tiles < f + c) for f, c in zip(first, counts)])
        assert torch.equal(met, expected), name


def test_the_causal_mask_of_a_million_tokens_is_small():
    mask = attention.causal_mask(1 << 20, CPU)
    lists = [getattr(mask, f"{name}_{kind}") for name in ("kv", "full_kv", "q", "full_q") for kind in ("num_blocks", "indices")]
    assert sum(x.untyped_storage().nbytes() for x in lists) < 1e6


# Other implementations of MoBA


@pytest.fixture
def peers(monkeypatch):
    """Modules with the interfaces of the other implementations."""

    def flash_moba_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, moba_chunk_size, moba_topk, causal=True):
        assert causal and max_seqlen_q == max_seqlen_k == 40 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        return moba_attention_varlen(q, k, v, cu_seqlens_q, block_size=moba_chunk_size, top_k=moba_topk)

    def moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk):
        assert q.shape == k.shape == v.shape and max_seqlen == 40
        return moba_attention_varlen(q, k, v, cu_seqlens, block_size=moba_chunk_size, top_k=moba_topk)

    for name, call in (("flash_moba", flash_moba_varlen_func), ("moba", moba_attn_varlen)):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        setattr(sys.modules[name], call.__name__, call)


def test_flash_is_compared_where_it_is_named_and_its_backend_holds_for_its_calls_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(flash, "_missing", lambda: None)
    monkeypatch.setattr(attention, "moba_attention", lambda *_, **settings: seen.append((flash.enabled(), settings)))
    for name in ("moba_flex-flash", "moba_flex"):
        SYSTEMS[name].call(*torch.randn(3, 1, 2, 8, 4), TOY)
    blocks = {"block_size": TOY.block_size, "top_k": TOY.top_k}
    assert seen == [(True, blocks), (False, blocks)]
    monkeypatch.setattr(attention, "moba_attention", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SYSTEMS["moba_flex-flash"].call(*torch.randn(3, 1, 2, 8, 4), TOY)
    assert not flash.enabled()
    assert "moba_flex-flash" not in attention.available(None, torch.device("cuda"), TOY)[0]


@pytest.mark.parametrize("name", ["flash-moba", "moonshot-moba"])
def test_peers_are_asked_for_the_same_attention(peers, name):
    row = Settings(2, 4, 2, 16, block_size=16, top_k=2, dtype="float32", repeats=5)
    tensors = Attention(row, CPU, [], True).inputs(40, 0, False)
    got = SYSTEMS[name].call(*(x.transpose(1, 2).flatten(0, 1) for x in tensors), row)
    wanted = SYSTEMS["moba_flex"].call(*tensors, row).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert attention.available([name], torch.device("cuda"), row) == ([name], {})


def test_peers_that_cannot_be_imported_are_left_out_and_named(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_moba", None)
    (only,) = run(file, "--systems", "moba_flex", "flash-moba", "--forward-only")
    assert {r["system"] for r in only["results"]} == {"moba_flex"}
    assert "\nflash-moba: ModuleNotFoundError: " in capsys.readouterr().out


def test_systems_that_need_cuda_or_do_not_take_the_settings_are_left_out_and_named(file, monkeypatch, capsys):
    systems = ["moba_flex", "moba_flex-triton", "dense-cudnn", "picky"]
    monkeypatch.setitem(SYSTEMS, "picky", attention.System(lambda *_: 1 / 0, 1, dtypes=("bfloat16",)))
    (only,) = run(file, "--systems", *systems, "--forward-only")
    assert {r["system"] for r in only["results"]} == {"moba_flex"}
    said = capsys.readouterr().out
    lines = ["moba_flex-triton: needs CUDA, left out", "dense-cudnn: needs CUDA, left out"]
    lines += ["picky: does not take blocks of 16 in float32, left out"]
    assert said.startswith("\n".join(lines)) and "\n".join(["", *lines, "Written: "]) in said
    assert benchmark.main(["--systems", "dense-cudnn", "--json", str(file)]) == 2
    assert "argument --systems: none of them can be measured here" in capsys.readouterr().err


# On a GPU


@gpu
@pytest.mark.gpu
def test_dense_systems_agree_on_a_gpu():
    row = Settings(2, 4, 2, 128, 128, 2, "bfloat16", 5)
    for tokens in (1024, 3000):
        tensors = Attention(row, torch.device("cuda"), [], True).inputs(tokens, 0, False)
        wanted = SYSTEMS["dense-sdpa"].call(*(x.float() for x in tensors), row)
        for name in ("dense-fa2", "dense-cudnn", "dense-flex"):
            got = SYSTEMS[name].call(*tensors, row)
            assert (got - wanted).norm() / wanted.norm() < 1e-2, (name, tokens)


@gpu
@pytest.mark.gpu
def test_quick_measures_every_system_on_a_gpu(tmp_path):
    file = tmp_path / "results.json"
    assert benchmark.main(["--quick", "--json", str(file)]) == 0
    (only,) = json.loads(file.read_text())
    assert not [r for r in only["results"] if "failed" in r]
    assert {r["system"] for r in only["results"]} >= {"moba_flex", "dense-fa2", "dense-cudnn", "dense-flex"}
