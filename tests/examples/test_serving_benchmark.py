"""examples/benchmarks/serving.py serves the same requests in both ways, and says how long clients waited."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import serving
import torch

from moba_flex.models import upstream

pytestmark = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")


SIZES = ["--new", "3", "--block-size", "32", "--top-k", "2", "--num-pages", "8", "--max-batch-tokens", "256"]


def serve(file, *flags):
    assert serving.main(["--model", "tiny", "--device", "cpu", *SIZES, *flags, "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_tiny_model_is_served_in_both_ways_at_each_length(tmp_path, capsys):
    found = serve(tmp_path / "served.json", "--tokens", "40", "200", "--requests", "2", "3", "--rounds", "1")
    said = capsys.readouterr().out
    assert [(run["tokens"], run["requests"]) for run in found["runs"]] == [(40, 2), (200, 3)]
    for run in found["runs"]:
        assert f"{run['requests']} requests of {run['tokens']} tokens" in said
        (results,) = run["rounds"]
        assert set(results) == {"moba_flex", "sdpa"}
        assert f"round by round: {results['moba_flex']['requests_per_minute'] / results['sdpa']['requests_per_minute']:.2f}\n" in said
        for system, result in results.items():
            assert f"| {system} |" in said and all(value > 0 for value in result.values())
            assert result["first_token_median"] <= result["first_token_p95"] and result["per_token_median"] <= result["per_token_p95"]


def test_the_warm_up_is_shorter_and_counts_nowhere(tmp_path, monkeypatch, capsys):
    calls, real = [], serving.serve

    def noted(model, prompts, new, args):
        calls.append((len(prompts), len(prompts[0]), new))
        return real(model, prompts, new, args)

    monkeypatch.setattr(serving, "serve", noted)
    monkeypatch.setattr(serving, "WARM_UP_NEW", 2)
    found = serve(tmp_path / "served.json", "--tokens", "60", "--requests", "3", "--rounds", "1", "--warm-up", "2")
    assert calls == [(2, 30, 2)] * 2 + [(3, 60, 3)] * 2
    assert len(found["runs"]) == 1 and len(found["runs"][0]["rounds"]) == 1 and capsys.readouterr().out.count("round 1 of 1") == 2


def test_a_system_that_takes_too_long_is_stopped_and_its_rate_is_a_bound(tmp_path, monkeypatch, capsys):
    clock, real = iter(range(0, 10**9, 5)), serving.serve
    monkeypatch.setattr(serving.time, "perf_counter", lambda: 5.0 * next(clock))  # each look at the clock takes five seconds

    passes = {"moba": 0, "sdpa": 0}

    def hasty(model, prompts, new, args):
        name = model.config._attn_implementation
        counts = model.register_forward_pre_hook(lambda *_: passes.update({name: passes[name] + 1}))
        try:
            return real(model, prompts, new, Namespace(**{**vars(args), "limit": 60 if name == "sdpa" else None}))
        finally:
            counts.remove()

    monkeypatch.setattr(serving, "serve", hasty)
    found = serve(tmp_path / "served.json", "--tokens", "60", "--requests", "40", "--new", "20", "--rounds", "1")
    (results,) = found["runs"][0]["rounds"]
    assert "finished" not in results["moba_flex"] and results["sdpa"]["finished"] < 40
    assert 0 < passes["sdpa"] < passes["moba"], "requests are not finished after the limit"
    ratio = results["moba_flex"]["requests_per_minute"] / results["sdpa"]["requests_per_minute"]
    said = capsys.readouterr().out
    assert f"less than {results['sdpa']['requests_per_minute']:.1f} ({results['sdpa']['finished']} finished) | - | - |" in said
    assert f"round by round: more than {ratio:.2f}\n" in said


def test_the_systems_take_turns_in_being_first(tmp_path, monkeypatch):
    order, real = [], serving.serve
    monkeypatch.setattr(serving, "serve", lambda model, *rest: (order.append(model.config._attn_implementation), real(model, *rest))[1])
    serve(tmp_path / "served.json", "--tokens", "40", "--requests", "1", "--rounds", "3")
    assert order == ["moba", "sdpa", "sdpa", "moba", "moba", "sdpa"]


def test_what_was_measured_before_a_failure_is_in_the_file(tmp_path, monkeypatch):
    file, real = tmp_path / "served.json", serving.serve

    def failing(model, prompts, new, args):
        if len(prompts[0]) == 60 and model.config._attn_implementation == "sdpa":
            raise RuntimeError("out of memory")
        return real(model, prompts, new, args)

    monkeypatch.setattr(serving, "serve", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        serve(file, "--tokens", "40", "60", "--requests", "2", "--rounds", "2", "1")
    short, long = json.loads(file.read_text())["runs"]
    assert [set(results) for results in short["rounds"]] == [{"moba_flex", "sdpa"}] * 2
    assert [set(results) for results in long["rounds"]] == [{"moba_flex"}]


def test_settings_that_do_not_fit_are_told_by_their_flags(capsys):
    assert serving.main(["--model", "tiny", "--top-k", "1"]) == 2
    assert "--sink-blocks" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--requests", "--rounds"])
def test_as_many_requests_and_rounds_as_lengths(capsys, flag):
    assert serving.main(["--model", "tiny", "--tokens", "40", "60", "80", flag, "2", "3"]) == 2
    assert f"{flag}: must be one number or as many as --tokens (3), but is 2" in capsys.readouterr().err


def test_results_name_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    file = tmp_path / "serving.json"
    serving.save([], torch.device("cuda"), Namespace(device="cuda", output=file))
    assert json.loads(file.read_text())["device"] == "NVIDIA H200"
