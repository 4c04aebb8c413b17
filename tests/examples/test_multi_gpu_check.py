"""examples/benchmarks/multi_gpu_check.py: unattended, in parts that are done once, and nothing wrong goes unsaid. On CPU processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import multi_gpu_check
import pytest
from benchmarking.multi_gpu_summary import summary
from multi_gpu_check import Part
from support.scripts import Script


def python(name: str, code: str, seconds: int = 60) -> Part:
    return Part(name, seconds, [sys.executable, "-c", code])


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the script with other parts: exit code, what it printed, results.json."""

    def run(parts: list[Part], *flags: str) -> tuple[int, str, dict]:
        monkeypatch.setattr(multi_gpu_check, "parts", lambda _: parts)
        code = multi_gpu_check.main(["--output", str(tmp_path / "out"), "--dry", *flags])
        return code, capsys.readouterr().out, json.loads((tmp_path / "out/results.json").read_text())

    return run


def test_parts_that_are_done_are_not_run_again_and_those_without_time_are_named(check, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('words'); print('{{\"found\": 3}}')"
    parts = [python("short", count), python("long", count, seconds=600), python("last", count)]
    code, said, results = check(parts, "--minutes", "5")
    assert code == 3 and "no time was left for long: the same command goes on with them" in said
    assert results["left"] == ["long"] and results["parts"]["short"]["found"] == 3
    code, said, results = check(parts)
    assert (
        code == 0
        and said.startswith("3 parts, 2 done; the others take about 10 minutes")
        and set(results["parts"])
        == {
            "short",
            "long",
            "last",
        }
    )
    assert (tmp_path / "count").read_text() == "xxx"


def test_parts_that_fail_or_take_too_long_are_said_and_tried_again(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gpu_check, "OVERTIME", 0)
    slow = python("slow", "import time; time.sleep(60)", seconds=1)
    code, said, results = check([slow])
    assert code == 1 and results["failed"] == ["slow"] and "slow failed, see " in said
    monkeypatch.undo()
    bad, good = python("bad", "print('{}'); raise ValueError('no link')"), python("good", "pass")
    code, said, results = check([bad, good])
    assert code == 1 and results["failed"] == ["bad"] and "ValueError: no link" in said and set(results["parts"]) == {"good"}
    code, said, results = check([python("bad", "print('{}')"), good])
    assert code == 0 and set(results["parts"]) == {"bad", "good"}


def test_too_little_memory_is_a_result(check) -> None:
    full = python("model-4M", 'print(\'{"tokens": 4, "out_of_memory": true, "said": "CUDA out of memory"}\'); raise SystemExit(3)')
    code, said, results = check([full])
    assert code == 0 and "model-4M: 4 tokens do not fit: CUDA out of memory" in said and results["parts"]["model-4M"]["out_of_memory"]


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--output", str(tmp_path), "--list"]
    assert multi_gpu_check.main([*common, "--dry", "--only", "nothing"]) == 2
    assert multi_gpu_check.main([*common, "--gpus", "1"]) == 2
    (tmp_path / "settings.json").write_text('{"gpus": 4, "dry": false}')
    assert multi_gpu_check.main(["--output", str(tmp_path), "--dry", "--only", "tests"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "argument --only: there is no part nothing, but tests, losses-one, " in first
    assert "needs at least 2 GPUs, but there are 1: --dry tries it out" in second
    assert "has results of {'gpus': 4, 'dry': False}" in third and "name another folder" in third


class Forked(Script):
    """Stands in for subprocess.Popen, and spares imports."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: TextIO, **_: object) -> None:
        super().__init__(command[1:], env, Path(stdout.name))


def test_a_part_runs_on_processes_and_checks_what_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gpu_check, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))
    assert multi_gpu_check.main(["--output", str(tmp_path), "--dry", "--only", "ten-million-heads"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["processes"], row["tokens"], row["queries_checked"]) == (2, 4096, 64 * 8)
    assert row["largest_error"] < 1e-5 and row["share_that_chose_other_blocks"] == 0


def prefill(exchange: str, n: int, milliseconds: float, sent: float, **more: float) -> dict:
    sizes = {"processes": n, "tokens": 1 << 20, "exchange": exchange, "peak_GB": 20.4}
    return {**sizes, "milliseconds": milliseconds, "GB_sent_by_each": sent, **more}


def test_what_was_found_is_put_beside_the_formulas() -> None:
    """Those of docs/scaling.md, with the times that it gives for two H100."""
    results = {"prefill-keys-1": prefill("keys", 1, 1998, 0), "prefill-keys-2": prefill("keys", 2, 999, 2.15)}
    results |= {"prefill-heads-1": prefill("heads", 1, 1998, 0), "prefill-heads-2": prefill("heads", 2, 1032, 5.37)}
    results |= {f"speed-{n}": {"tokens_per_second": [1.0, 1.0, 54300.0 * n]} for n in (1, 2)}
    lines, numbers = summary(results)
    rows = {row["what"]: row for row in numbers["rows"]}
    assert rows["prefill-keys-2"]["predicted_ms"] == pytest.approx(999 + 0.6, abs=0.1)
    assert rows["prefill-heads-2"]["predicted_ms"] == pytest.approx(999 + 12, abs=0.1)
    assert rows["prefill-heads-2"]["share_of_linear"] == pytest.approx(0.97, abs=0.005)
    assert rows["speed-2"]["share_of_linear"] == 1 and not numbers["wrong"] and len(lines) == 6


@pytest.mark.parametrize(
    ("name", "result", "wrong"),
    [
        ("losses-ddp", {"loss": [9.0, 8.1]}, None),
        ("losses-ddp", {"loss": [9.0, 8.3]}, "losses of ddp differ"),
        ("losses-fsdp2-cp", {"loss": [9.0, float("nan")]}, "losses of fsdp2-cp differ"),
        ("ten-million-keys", {"largest_error": 0.01, "share_that_chose_other_blocks": 0.001}, None),
        ("ten-million-keys", {"largest_error": 0.01, "share_that_chose_other_blocks": 0.02}, "outputs are not those in float64"),
        ("ten-million-keys", {"largest_error": float("nan"), "share_that_chose_other_blocks": 0.0}, "outputs are not those in float64"),
    ],
)
def test_what_is_wrong_is_said(name: str, result: dict, wrong: str | None) -> None:
    checked = {"queries_checked": 512, "median_error": 0.004}
    of_part = prefill("keys", 4, 5000, 30, **checked, **result) if name.startswith("ten") else result
    _, numbers = summary({"losses-one": {"loss": [9.0, 8.0]}, name: of_part})
    assert (numbers["wrong"] == []) if wrong is None else (wrong in numbers["wrong"][0])
