"""What `examples/benchmarks/benchmark.py` measures beside plain attention: one group, skewed keys, batches of real life, whole models."""

from __future__ import annotations

import itertools
import json

import benchmark
import pytest
import torch
from benchmarking import corners, model, results
from benchmarking.attention import BOTH, FORWARD, Attention, Settings
from support.benchmark_runs import CPU, by_key, fake, run

from moba_flex import select_blocks


def test_one_group_is_measured_and_multiplied(file, monkeypatch):
    lengths = fake(monkeypatch, lambda query, key, value: query)
    workload = Attention(Settings(2, 8, 4, 16, 16, 2, "float32", 5, one_group=True), CPU, ["fake"], True)
    query, key, value = workload.inputs(40, 0, False)
    assert (query.shape, key.shape, value.shape) == ((1, 2, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16))
    record = {"milliseconds": 1000.0, "least": 900.0, "most": 1100.0, "repeats": 2, "peak_gb": 3.0}
    monkeypatch.setattr(benchmark, "attempt", lambda *_, **__: record)
    # 3 calls of 1.6 s each are under the limit, whatever the four groups take together
    (only,) = run(file, "--heads", "8", "--key-heads", "4", "--one-group", "--systems", "fake", "--forward-only", "--limit", "5")
    for result in only["results"]:
        assert (result["milliseconds"], result["least"], result["most"], result["peak_gb"]) == (4000, 3600, 4400, 3), result
    assert "4 groups" in only["title"] and not lengths


def test_skewed_keys_are_those_that_a_tenth_of_the_blocks_is_wanted_for():
    row = Settings(1, 2, 1, 128, block_size=32, top_k=4, dtype="float32", repeats=5, keys="skewed")
    query, key, _ = Attention(row, CPU, [], True).inputs(32 * 100, 0, False)
    chosen = select_blocks(query, key, block_size=32, top_k=4).indices[:, :, 32 * 40 :]  # from where there are enough of them
    assert chosen.unique().tolist() == list(range(0, 100, 10))


def test_skewed_is_measured_against_uniform_in_one_run(file, capsys):
    uniform, skewed = run(file, "--preset", "skewed", "--systems", "moba_flex", "--dtype", "float32", "--batch", "1")
    assert uniform["settings"]["keys"] == "uniform" and skewed["settings"]["keys"] == "skewed"
    out = capsys.readouterr().out
    for pass_ in (FORWARD, BOTH):
        ratio = by_key(skewed)["moba_flex", pass_, 64]["milliseconds"] / by_key(uniform)["moba_flex", pass_, 64]["milliseconds"]
        assert f"skewed / uniform: moba_flex, {pass_}, 64 tokens: {ratio:.2f}x" in out


# Batches of real life


def test_corners_measure_each_case_beside_a_plain_one(file, capsys, monkeypatch):
    cases = {name: corners.CASES[name] for name in ("4 rows", "packed, 4 sequences", "4 rows, 2 of them padded")}
    monkeypatch.setattr(corners, "CASES", cases)
    made = run(file, "--preset", "corners", "--dtype", "float32", "--lengths", "128")
    found = by_key(made[0])
    assert set(found) == {(case, pass_, 128) for case in cases for pass_ in (FORWARD, BOTH)}
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    for name, case in cases.items():
        for pass_ in (FORWARD, BOTH) if case.against else ():
            ratio = found[name, pass_, 128]["milliseconds"] / found[case.against, pass_, 128]["milliseconds"]
            assert f"{ratio:.2f}" in lines[name], name


@pytest.mark.parametrize("name", corners.CASES)
def test_a_corner_has_as_many_tokens_as_the_plain_case(name, monkeypatch):
    rows = []
    for module, call in ((corners, "moba_attention"), (corners, "moba_attention_varlen"), (corners.F, "scaled_dot_product_attention")):
        real = getattr(module, call)
        monkeypatch.setattr(module, call, lambda *x, real=real, **options: rows.append(x[0].shape) or real(*x, **options))
    workload = corners.Corners(Settings(1, 8, 4, 16, block_size=16, top_k=2, dtype="float32", repeats=1), CPU, False)
    workload.call(name, BOTH, 128, 0)()
    (shape,) = rows
    assert (shape[0] if len(shape) == 3 else shape[0] * shape[2]) == 128


@pytest.mark.parametrize("name", [name for name, case in corners.CASES.items() if case.sequences or case.real])
def test_calls_of_a_case_have_one_mask_unless_it_says_otherwise(name, monkeypatch):
    masks = []
    for call, argument in (("moba_attention", "padding_mask"), ("moba_attention_varlen", "cu_seqlens")):
        real = getattr(corners, call)
        note = lambda *x, real=real, argument=argument, **given: masks.append(given[argument]) or real(*x, **given)  # noqa: E731
        monkeypatch.setattr(corners, call, note)
    workload = corners.Corners(Settings(1, 8, 4, 16, block_size=16, top_k=2, dtype="float32", repeats=1), CPU, False)
    for sample in range(2):
        call = workload.call(name, FORWARD, 128, sample)
        call()
        call()
    assert len({id(mask) for mask in masks}) == (4 if "new in each call" in name else 1)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_every_case_but_float32_runs_with_triton(monkeypatch):
    """Its implementation reaches each call; there is no GPU here to run it on."""
    asked = []
    for call in ("moba_attention", "moba_attention_varlen"):
        note = lambda *x, **given: asked.append(given["implementation"]) or x[0]  # noqa: E731
        monkeypatch.setattr(corners, call, note)
    workload = corners.Corners(Settings(1, 8, 4, 16, block_size=16, top_k=2, dtype="bfloat16", repeats=1), CPU, True, "triton")
    assert workload.systems == [name for name in corners.CASES if not name.startswith("float32")]
    for name in workload.systems:
        workload.call(name, FORWARD, 128, 0)()
    assert asked == ["triton"] * len(workload.systems)


def test_corners_have_the_lengths_and_the_padding_that_they_say():
    assert corners.bounds((1, 9, 2, 5, 3, 8, 4), 320, CPU).tolist() == [0, 10, 100, 120, 170, 200, 280, 320]
    mask = corners.left_padding((1, 0.7, 0.4), 10, CPU)
    assert mask.sum(1).tolist() == [10, 7, 4] and mask[:, -1].all()
    assert all(case.against is None or case.against in corners.CASES for case in corners.CASES.values())


# The whole model


@pytest.fixture
def tiny(monkeypatch) -> str:
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    monkeypatch.setitem(model.MODELS, "tiny", shape)
    return "tiny"


def test_a_whole_model_is_measured_with_moba_and_with_sdpa(file, tiny, capsys):
    flags = ["--model", tiny, "--block-size", "16", "--top-k", "2", "--lengths", "40", "64", "--repeats", "2", "--json", str(file)]
    assert benchmark.main(flags) == 0
    (only,) = json.loads(file.read_text())
    found = by_key(only)
    assert set(found) == {(s, "prefill", n) for s in ("moba_flex", "sdpa") for n in (40, 64)}
    ratio = found["sdpa", "prefill", 64]["milliseconds"] / found["moba_flex", "prefill", 64]["milliseconds"]
    out = capsys.readouterr().out
    assert "sdpa / ours" in out and f"{ratio:.2f}x" in out
    assert only["settings"] == {"workload": "prefill", "model": tiny, "block_size": 16, "top_k": 2, "dtype": "float32", "repeats": 2}


def test_prefill_asks_for_the_last_logits_of_the_same_model_and_no_cache(tiny):
    workload = model.ModelPrefill(tiny, 16, 2, "float32", 5, None, CPU)
    given, got = [], []
    workload.model.register_forward_hook(lambda _, args, out: (given.append(args[0]), got.append(out)))
    for system in workload.systems:
        workload.call(system, "prefill", 64, 0)()
    assert torch.equal(*given)
    assert all(out.logits.shape == (1, 1, 50) and out.past_key_values is None for out in got)
    moba, dense = (out.logits[0, 0] for out in got)
    plain = model.build(tiny, torch.float32, CPU)
    plain.load_state_dict(workload.model.state_dict())
    assert torch.allclose(dense, plain(given[0]).logits[0, -1], atol=1e-5)
    assert (moba - dense).abs().max() > 1e-3, "both computed the same"


def test_a_model_is_patched_when_its_attention_changes_and_not_before_each_timing(tiny, monkeypatch):
    patched, real = [], model.moba_flex.patch
    monkeypatch.setattr(model.moba_flex, "patch", lambda m, **settings: patched.append(settings["implementation"]) or real(m, **settings))
    workload = model.ModelPrefill(tiny, 16, 2, "float32", 5, None, CPU)
    for system in ("sdpa", "moba_flex", "moba_flex", "moba_flex-triton", "moba_flex-triton", "sdpa", "moba_flex"):
        workload.use(system)
        of_model = getattr(workload.model.config, "moba", None)
        assert (of_model is not None) == (system != "sdpa"), system
        assert of_model is None or of_model["implementation"] == ("triton" if system == "moba_flex-triton" else "auto")
    assert patched == ["auto", "triton", "auto"]

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(model.moba_flex, "patch", fails)
    for _ in range(2):  # also where an earlier one left off half-way
        with pytest.raises(MemoryError):
            workload.use("moba_flex-triton")
    monkeypatch.setattr(model.moba_flex, "patch", real)
    workload.use("moba_flex")
    assert workload.model.config.moba["implementation"] == "auto"


@pytest.mark.parametrize("flag", ["--model", "--train"])
def test_systems_that_are_measured_only_if_named_can_be_named(flag, tiny):
    assert benchmark.parse([flag, tiny, "--systems", "moba_flex-triton"]).systems == ["moba_flex-triton"]


def test_a_training_step_is_shown_in_tokens_a_second(file, tiny, capsys):
    flags = ["--train", tiny, "--block-size", "8", "--top-k", "2", "--lengths", "64", "--repeats", "1", "--json", str(file)]
    assert benchmark.main(flags) == 0
    (only,) = json.loads(file.read_text())
    found = {system: 64 / result["milliseconds"] * 1000 for (system, _, _), result in by_key(only).items()}
    assert set(found) == {"moba_flex", "moba_flex-packed", "sdpa"}
    out = capsys.readouterr().out
    for system, speed in found.items():
        assert f" {speed:,.0f} " in out, system
        assert system == "sdpa" or f" {speed / found['sdpa']:.2f} " in out, system


def test_a_training_step_trains_what_the_system_says(tiny, monkeypatch):
    workload = model.ModelTraining(tiny, 8, 2, "float32", 1, None, CPU)
    plain = model.build(tiny, torch.float32, CPU)
    plain.load_state_dict(workload.model.state_dict())
    monkeypatch.setattr(workload.optimizer, "step", lambda: None)
    gradients, attention = {}, workload.model.model.layers[0].self_attn
    for system in (results.LEFT_OUT, *workload.systems, results.LEFT_OUT):
        workload.call(system, "training step", 64, 0)()
        gradients[system] = attention.q_proj.weight.grad.clone()
        assert all(x.weight.grad.any() for x in (attention.k_proj, attention.v_proj, attention.o_proj)), system
    plain.model(workload.prompt(64, 0)).last_hidden_state.square().mean().backward()
    torch.testing.assert_close(gradients["sdpa"], plain.model.layers[0].self_attn.q_proj.weight.grad)
    for one, other in itertools.combinations(gradients, 2):
        assert not torch.allclose(gradients[one], gradients[other], rtol=1e-2, atol=0), f"{one} and {other} computed the same"


def test_llama_8b_has_its_size_and_is_made_in_the_dtype_asked_for():
    made = model.build("llama-8b", torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in made.parameters()) == 8_030_261_248
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} and made.config._attn_implementation == "sdpa"
    assert torch.get_default_dtype() == torch.float32
