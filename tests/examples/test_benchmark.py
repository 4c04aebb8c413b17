"""What `examples/benchmarks/benchmark.py` promises: what it measures, writes and prints, and that nothing makes it crash or forget."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import benchmark
import pytest
import torch
from benchmarking import attention, corners, measure, model, results
from benchmarking.attention import BOTH, FORWARD, SYSTEMS, Attention, Settings, System
from shared import environment
from support.scripts import Script
from torch.nn.attention.flex_attention import flex_attention

from moba_flex import moba_attention_varlen, select_blocks
from moba_flex.backends import flash

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOY = Settings(1, 4, 2, 16, block_size=16, top_k=2, dtype="float32", repeats=5)
FLAGS = ["--heads", "4", "--key-heads", "2", "--width", "16", "--block-size", "16", "--top-k", "2", "--repeats", "2"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def file(tmp_path, cpu) -> Path:
    return tmp_path / "results.json"


def run(file: Path, *flags: str, code: int = 0, lengths: str = "40 64", draw: bool = False) -> list[dict]:
    """The runs in the file after the benchmark, which draws no picture unless it is asked to: that takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))
        if not draw:
            patch.setattr(benchmark, "plot", lambda *_: None)
        assert benchmark.main([*FLAGS, "--json", str(file), *(["--lengths", *lengths.split()] if lengths else []), *flags]) == code
    return json.loads(file.read_text())


def by_key(run: dict) -> dict[tuple, dict]:
    found = {(r["system"], r["pass"], r["tokens"]): r for r in run["results"]}
    assert len(found) == len(run["results"]), "a measurement is there twice"
    return found


def fake(monkeypatch, call, growth: int = 1) -> list[int]:
    """Add the system "fake", and return the list of lengths with which it is called."""
    lengths = []

    def counted(query, key, value, settings):
        lengths.append(query.shape[2])
        return call(query, key, value)

    monkeypatch.setitem(SYSTEMS, "fake", System(counted, growth, ("cpu",)))
    return lengths


# A whole run


def test_a_run_on_a_cpu_measures_everything_and_writes_it(file, capsys):
    (only,) = run(file, draw=True)
    found = by_key(only)
    assert set(found) == {(s, p, n) for s in ("moba_flex", "dense-sdpa") for p in (FORWARD, BOTH) for n in (40, 64)}
    for key, result in found.items():
        assert 0 < result["least"] <= result["milliseconds"] <= result["most"], key
        assert result["repeats"] == 2 and result["peak_gb"] >= 0, key
    assert only["environment"]["torch"] == torch.__version__ and only["environment"]["device"] and only["environment"]["moba_flex"]
    assert only["date"].startswith("20") and only["settings"]["heads"] == 4 and only["settings"]["dtype"] == "float32"

    captured = capsys.readouterr()
    rows = [line.split("|") for line in captured.out.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows if "---" not in row[1]] == ["tokens", "40", "64"] * 4
    assert f"{FORWARD}, milliseconds" in captured.out and f"{BOTH}, peak memory in GB" in captured.out
    assert "8/8" in captured.err, "no progress bar"


def test_flags_choose_systems_passes_and_settings(file):
    (only,) = run(file, "--systems", "moba_flex", "--forward-only", "--dtype", "bfloat16", "--batch", "3")
    assert set(by_key(only)) == {("moba_flex", FORWARD, 40), ("moba_flex", FORWARD, 64)}
    wanted = {"batch": 3, "heads": 4, "key_heads": 2, "width": 16, "block_size": 16, "top_k": 2, "dtype": "bfloat16", "repeats": 2}
    assert only["settings"].items() >= wanted.items()


def test_flags_change_a_preset(cpu):
    args = benchmark.parse(["--preset", "msa", "--lengths", "128", "--top-k", "3"])
    assert (args.heads, args.key_heads, args.block_size, args.top_k, args.lengths, args.forward_only) == (32, 8, 128, 3, [128], True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--heads", "4", "--key-heads", "3"], ["--heads", "4", "3"]),
        (["--block-size", "0"], ["--block-size", "0"]),
        (["--systems", "flash"], ["--systems", "flash", "flash-moba"]),
        (["--model", "llama-8b", "--heads", "4"], ["--heads", "--model"]),
        (["--train", "llama-1b", "--heads", "4"], ["--heads", "--train"]),
        (["--train", "llama-1b", "--model", "llama-8b"], ["--train", "--model"]),
        (["--preset", "corners", "--systems", "moba_flex"], ["--systems", "corners"]),
        (["--model", "llama-8b", "--systems", "dense-fa2"], ["dense-fa2", "sdpa"]),
        (["--preset", "none"], ["--preset", "none", "msa"]),
    ],
    ids=" ".join,
)
def test_bad_flags_end_with_one_sentence(cpu, capsys, flags, words):
    assert benchmark.main(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in words), last


# Going on where it was


def test_what_is_in_the_file_is_not_measured_again(file, monkeypatch, capsys):
    (first,) = run(file)
    (more,) = run(file, lengths="40 64 80")
    assert set(by_key(more)) == {(s, p, n) for s in ("moba_flex", "dense-sdpa") for p in (FORWARD, BOTH) for n in (40, 64, 80)}
    assert more["results"][:8] == first["results"] and more["date"] == first["date"]
    assert "8 of 12 measurements" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "attempt", lambda *_: pytest.fail("measured again"))
    assert run(file, lengths="40 64 80") == [more]


def test_other_settings_and_other_versions_are_runs_of_their_own(file, monkeypatch):
    (first,) = run(file)
    assert run(file, "--top-k", "3")[0] == first
    monkeypatch.setattr(torch, "__version__", "9.9")
    every = run(file)
    assert [r["settings"]["top_k"] for r in every] == [2, 3, 2] and every[0] == first
    assert every[2]["environment"]["torch"] == "9.9" and len(every[2]["results"]) == 8


def test_changed_source_files_count_as_another_version(tmp_path, monkeypatch):
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"# {package}")
    found = []
    for package in ("one", "one", "two"):
        monkeypatch.setattr(environment.moba_flex, "__file__", str(tmp_path / package / "__init__.py"))
        found.append(environment.environment(CPU)["moba_flex"])
    assert found[0] == found[1] != found[2]


def test_an_interrupted_run_keeps_and_prints_what_it_has_and_goes_on(file, monkeypatch, capsys):
    def interrupt(query, key, value):
        if query.shape[2] == 64:
            raise KeyboardInterrupt
        return query

    fake(monkeypatch, interrupt)
    (part,) = run(file, "--forward-only", code=130)
    done = {("moba_flex", FORWARD, 40), ("dense-sdpa", FORWARD, 40), ("fake", FORWARD, 40), ("moba_flex", FORWARD, 64)}
    captured = capsys.readouterr()
    assert done <= set(by_key(part)) and ("fake", FORWARD, 64) not in by_key(part)
    assert "|     64 |" in captured.out and "Interrupted" in captured.err

    fake(monkeypatch, lambda query, key, value: query)
    (whole,) = run(file, "--forward-only")
    assert whole["results"][: len(part["results"])] == part["results"] and len(whole["results"]) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_of_the_script(tmp_path):
    file = tmp_path / "results.json"
    command = ["examples/benchmarks/benchmark.py", *FLAGS, "--json", str(file), "--systems", "moba_flex"]
    env, files = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, (tmp_path / "out.txt", tmp_path / "err.txt")
    with Script([*command, "--lengths", "40", "1000000", "--limit", "1e9"], env, *files) as script:
        script.wait_for("1,000,000", files[1])  # the first length is done
        script.send_signal(signal.SIGINT)
        code = script.wait(120)
    out, err = (file.read_text() for file in files)
    assert code == 130 and "Traceback" not in err, err
    assert "|     40 |" in out and [r["tokens"] for r in json.loads(file.read_text())[0]["results"]] == [40]


@pytest.mark.parametrize("text", ["", "{}{", "{}", '[{"title": 1}]', "[1]"])
def test_a_file_that_holds_no_results_is_an_error_and_stays(file, capsys, text):
    file.write_text(text)
    flags = ["--json", str(file)] if text != "{}" else ["--plot-only", str(file)]
    if text == "{}":
        file.write_text('{"a": 1}')
        text = '{"a": 1}'
    assert benchmark.main(flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and str(file) in err[0] and file.read_text() == text


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_where_nothing_can_be_written_nothing_is_measured(file, capsys, flag):
    assert benchmark.main(["--json", str(file), "--preset", "cpu", flag, str(Path(__file__) / "results.png")]) == 2
    assert capsys.readouterr().err.startswith(f"benchmark.py: error: argument {flag}: cannot write to ") and not file.exists()


# What cannot be measured


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")],
    ids=["GPU", "Python", "CPU"],
)
def test_out_of_memory_is_a_result(file, monkeypatch, capsys, error):
    def full(query, key, value):
        if query.shape[2] > 40:
            raise error
        return query

    fake(monkeypatch, full)
    found = by_key(run(file, "--forward-only")[0])
    assert found["fake", FORWARD, 64] == {"system": "fake", "pass": FORWARD, "tokens": 64, "skipped": "out of memory"}
    assert "milliseconds" in found["fake", FORWARD, 40] and "milliseconds" in found["moba_flex", FORWARD, 64]
    assert "out of memory" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "attempt", lambda *_: pytest.fail("tried again"))
    run(file, "--forward-only")


def test_a_system_that_fails_says_why_and_stops_no_other(file, monkeypatch, capsys):
    def fail(query, key, value):
        raise RuntimeError("No available kernel.\nAborting execution.")

    fake(monkeypatch, fail)
    found = by_key(run(file, "--forward-only")[0])
    assert found["fake", FORWARD, 40]["failed"] == "No available kernel."
    assert "milliseconds" in found["dense-sdpa", FORWARD, 64]
    assert "failed: fake, forward, 40 tokens: No available kernel." in capsys.readouterr().out


def test_what_takes_longer_than_the_limit_is_skipped_and_tried_again_with_a_higher_one(file, monkeypatch, capsys):
    lengths = fake(monkeypatch, lambda query, key, value: query)
    found = by_key(run(file, "--forward-only", "--systems", "fake", "--limit", "0")[0])
    assert set(lengths) == {40}, "the longer length was tried although the shorter one took too long"
    assert all(found["fake", FORWARD, n]["skipped"] == "too long" and found["fake", FORWARD, n]["estimate"] > 0 for n in (40, 64))
    assert "skipped (about" in capsys.readouterr().out
    found = by_key(run(file, "--forward-only", "--systems", "fake")[0])
    assert all("milliseconds" in found["fake", FORWARD, n] for n in (40, 64))


@pytest.mark.parametrize(("growth", "skipped"), [(1, False), (2, True)])
def test_times_are_expected_to_grow_as_the_system_does(monkeypatch, growth, skipped):
    monkeypatch.setitem(SYSTEMS, "fake", System(lambda *_: None, growth))
    workload = Attention(TOY, CPU, ["fake"], forward_only=True)
    found = {"results": [{"system": "fake", "pass": FORWARD, "tokens": 100, "milliseconds": 10.0}]}
    # Six calls of 100 ms, or of 1,000.
    record = benchmark.expected_over_limit(workload, found, "fake", FORWARD, 1000, 5, limit=1)
    assert record == ({"skipped": "too long", "estimate": 1000.0} if skipped else None)
    assert benchmark.expected_over_limit(workload, found, "fake", BOTH, 1000, 5, limit=1) is None


def test_quick_begins_nothing_after_its_time(file, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK_SECONDS", -1)
    (only,) = run(file, "--quick", lengths="")
    assert {r["skipped"] for r in only["results"]} == {"time is up"} and len(only["results"]) == 8
    (only,) = run(file)
    assert all("milliseconds" in by_key(only)[s, FORWARD, 40] for s in ("moba_flex", "dense-sdpa"))


# What is measured


@pytest.mark.parametrize("repeats", [5, 7])
def test_every_sample_has_inputs_of_its_own_after_a_warm_up(repeats):
    samples = []
    record = measure.measure(lambda i: samples.append(i) or (lambda: torch.ones(1)), CPU, repeats, 300)
    assert samples == list(range(repeats + 2)) and record["repeats"] == repeats


@pytest.mark.parametrize("times", [[999.0, 50.0, 9.0, 1.0, 2.0, 3.0, 4.0], [99999.0, 9000.0, 1000.0, 2000.0, 3000.0, 4000.0]])
def test_the_median_counts(monkeypatch, times):
    left = iter(times)
    monkeypatch.setattr(measure, "milliseconds", lambda *_: next(left))
    record = measure.measure(lambda i: None, CPU, 5, 300)
    wanted = times[-5:]
    assert (record["milliseconds"], record["least"], record["most"]) == (sorted(wanted)[2], min(wanted), max(wanted))
    assert next(left, None) is None


@pytest.mark.parametrize(("seconds", "repeats"), [(0.5, 1), (2.5, 2), (9, 3), (float("inf"), 3)])
def test_timings_end_after_so_many_seconds_but_one_is_made(monkeypatch, seconds, repeats):
    left = iter([7000.0, 2000.0, 2000.0, 2000.0])  # the warm-up, the call that shows memory and counts, two more
    monkeypatch.setattr(measure, "milliseconds", lambda *_: next(left))
    record = measure.measure(lambda i: None, CPU, 3, 300, seconds=seconds)
    assert record["repeats"] == repeats and record["milliseconds"] == 2000 and len(list(left)) == 3 - repeats


def test_long_calls_are_timed_once_without_a_warm_up_after_shorter_ones_of_this_process(file, monkeypatch):
    called = fake(monkeypatch, lambda query, key, value: query)

    def milliseconds(call, *_):
        call()
        return 3000.0 * called[-1] / 40

    monkeypatch.setattr(measure, "milliseconds", milliseconds)
    flags = ["--forward-only", "--systems", "fake", "--repeats", "4", "--seconds"]
    found = by_key(run(file, *flags, "4")[0])
    assert called == [40, 40, 40, 64], "a warm-up and two timings of 3 seconds each, then one of 4.8"
    assert [found["fake", FORWARD, n]["repeats"] for n in (40, 64)] == [2, 1]
    called.clear()
    run(file, *flags, "4", lengths="64 100")
    assert called == [100, 100], "the shorter length comes from the file, so that this process has compiled nothing"


class Process:
    """In place of `psutil.Process`: how soon a real one gives freed memory back is its allocator's and its kernel's affair."""

    def __init__(self):
        self.rss, self.looked_at = 0, threading.Event()

    def memory_info(self):
        seen = SimpleNamespace(rss=self.rss)
        self.looked_at.set()
        return seen

    def hold_until_seen(self, n_bytes):
        self.rss += n_bytes
        for _ in range(2):  # the first look may have begun before
            self.looked_at.clear()
            assert self.looked_at.wait(60)
        self.rss -= n_bytes


def test_peak_memory_counts_inputs_and_the_most_that_a_call_takes_meanwhile(monkeypatch):
    process = Process()
    monkeypatch.setattr(measure.psutil, "Process", lambda: process)
    process.rss = 5000 + 100  # what was there before, and the inputs
    _, peak = measure.peak_memory(lambda: [process.hold_until_seen(n_bytes) for n_bytes in (10, 30, 20)], CPU)
    assert peak == 5000 + 100 + 30


def test_peak_memory_leaves_out_what_was_there_before():
    held = [torch.ones(20_000_000)]

    def fresh(_):
        given = torch.ones(10_000_000)
        return lambda: given.sum()

    peak = measure.measure(fresh, CPU, 1, 300)["peak_gb"]
    assert 0.039 < peak < 0.039 + held[0].nbytes / 1e9


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
    assert "moba_flex-flash" not in attention.available(None, torch.device("cuda"))[0]


@pytest.mark.parametrize("name", ["flash-moba", "moonshot-moba"])
def test_peers_are_asked_for_the_same_attention(peers, name):
    row = Settings(2, 4, 2, 16, block_size=16, top_k=2, dtype="float32", repeats=5)
    tensors = Attention(row, CPU, [], True).inputs(40, 0, False)
    got = SYSTEMS[name].call(*(x.transpose(1, 2).flatten(0, 1) for x in tensors), row)
    wanted = SYSTEMS["moba_flex"].call(*tensors, row).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert attention.available([name], CPU) == ([name], {})


def test_peers_that_cannot_be_imported_are_left_out_and_named(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_moba", None)
    (only,) = run(file, "--systems", "moba_flex", "flash-moba", "--forward-only")
    assert {r["system"] for r in only["results"]} == {"moba_flex"}
    assert "Without flash-moba: " in capsys.readouterr().out


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


# The plot


def made_up() -> list[dict]:
    values = [
        {"system": "moba_flex", "pass": FORWARD, "tokens": 8192, "milliseconds": 2.8, "peak_gb": 1.0},
        {"system": "dense-fa2", "pass": FORWARD, "tokens": 8192, "milliseconds": 1.4, "peak_gb": 1.0},
        {"system": "moba_flex", "pass": FORWARD, "tokens": 131072, "milliseconds": 47.4, "peak_gb": 2.0},
        {"system": "dense-fa2", "pass": FORWARD, "tokens": 131072, "skipped": "out of memory"},
    ]
    environment = {"device": "some GPU", "torch": "2.11.0"}
    return [{"title": "a row", "settings": {}, "environment": environment, "date": "2026-01-02T03:04:05+00:00", "results": values}]


def test_the_plot_has_a_line_a_system_on_logarithmic_axes(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    results.plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = figures[0].axes
    assert (panel.get_xscale(), panel.get_yscale(), panel.get_title()) == ("log", "log", FORWARD)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
    assert lines == {"moba_flex": ([8192, 131072], [2.8, 47.4]), "dense, FlashAttention-2 (out of memory at 128K)": ([8192], [1.4])}
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["8K", "128K"]
    assert "some GPU" in figures[0].subfigs[0].get_suptitle()


def test_plot_only_makes_table_and_plot_from_a_file(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "attempt", lambda *_: pytest.fail("measured"))
    file = tmp_path / "made.json"
    file.write_text(json.dumps(made_up()))
    assert benchmark.main(["--plot-only", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| 131,072 |      47.4 | out of memory |" in out and "|   8,192 |      2.80 |          1.40 |            0.50x |" in out
    assert (tmp_path / "made.png").exists()
    assert benchmark.main(["--plot-only", str(file), "--plot", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").exists()


def test_without_matplotlib_there_is_a_message_and_no_plot(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(file, "--forward-only", "--systems", "moba_flex", draw=True)
    assert "moba_flex[viz]" in capsys.readouterr().out and not file.with_suffix(".png").exists()


# On a GPU


@pytest.mark.parametrize(
    ("block_size", "dtype", "taken"), [(128, "bfloat16", True), (256, "float16", True), (512, "bfloat16", False), (128, "float32", False)]
)
def test_settings_that_a_system_is_not_made_for_are_left_out(block_size, dtype, taken):
    row = Settings(1, 2, 1, 8, block_size, 2, dtype, 1)
    assert Attention(row, CPU, ["moba_flex", "moba_flex-triton"], True).systems == ["moba_flex", "moba_flex-triton"][: 1 + taken]


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
