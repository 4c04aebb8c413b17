"""A run of `examples/benchmarks/benchmark.py`: what it measures and prints, what bad flags get, how it goes on where something fails."""

from __future__ import annotations

import benchmark
import pytest
import torch
from benchmarking.attention import BOTH, FORWARD, SYSTEMS, Attention, System
from support.benchmark_runs import CPU, TOY, by_key, fake, run

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
        (["--preset", "corners", "--systems", "moba_flex"], ["--systems", "--preset corners,"]),
        (["--preset", "corners-triton", "--one-group"], ["--one-group", "--preset corners-triton,"]),
        (["--model", "llama-8b", "--systems", "dense-fa2"], ["dense-fa2", "sdpa"]),
        (["--preset", "none"], ["--preset", "none", "msa"]),
    ],
    ids=" ".join,
)
def test_bad_flags_end_with_one_sentence(cpu, capsys, flags, words):
    assert benchmark.main(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in words), last


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
