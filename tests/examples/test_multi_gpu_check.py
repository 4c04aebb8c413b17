"""examples/benchmarks/multi_gpu_check.py: unattended, in parts that are done once, and nothing wrong goes unsaid. On CPU processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import kill_and_resume
import multi_gpu_check
import psutil
import pytest
from benchmarking.multi_gpu_summary import summary
from multi_gpu_check import Part
from support.scripts import Script


def python(name: str, code: str, seconds: int = 60, **more: bool) -> Part:
    return Part(name, seconds, [sys.executable, "-c", code], **more)


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
    assert code == 0 and said.startswith("3 parts, 2 done; the others take about 10 minutes on four H200; CPU processes take other times\n")
    assert set(results["parts"]) == {"short", "long", "last"}
    assert (tmp_path / "count").read_text() == "xxx"


def test_only_chooses_parts_and_their_order(check, tmp_path: Path) -> None:
    parts = [python(name, f"open({str(tmp_path / 'order')!r}, 'a').write({name!r})") for name in "abc"]
    code, _, results = check(parts, "--only", "c", "a")
    assert code == 0 and (tmp_path / "order").read_text() == "ca" and set(results["parts"]) == {"c", "a"}


def test_parts_that_are_not_timed_run_side_by_side_and_others_alone(check, tmp_path: Path) -> None:
    """Each of the first two ends only when the other has begun; the timed ones make a file that must not be there yet."""
    meet = "import pathlib, time; here = pathlib.Path({!r}); (here / '{}').touch()\nwhile not (here / '{}').exists(): time.sleep(0.01)"
    alone = "import pathlib; file = pathlib.Path({!r}) / 'busy'; file.touch(exist_ok=False); file.unlink()"
    parts = [python(a, meet.format(str(tmp_path), a, b), timed=False) for a, b in ("xy", "yx")]
    parts += [python(name, alone.format(str(tmp_path))) for name in ("first", "second")]
    code, said, _ = check(parts)
    assert code == 0 and said.startswith("4 parts, 0 done; the others take about 3 minutes on four H200; CPU processes take other times\n")
    assert said.index("first: 60 s") > max(said.index("x: done"), said.index("y: done"))


def test_when_the_time_is_up_nothing_runs_and_what_need_not_be_whole_counts(check, tmp_path: Path, monkeypatch) -> None:
    """Both have begun; the clock jumps when both have a process in a session of its own."""
    code = "import subprocess, sys, time; print('tests/a.py::test_b PASSED [ 50%]', flush=True)\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    code += "open({!r}, 'w').write(str(child.pid) + '.'); time.sleep(600)"
    files = [tmp_path / "whole.pid", tmp_path / "some.pid"]
    begun = lambda: all(file.exists() and file.read_text().endswith(".") for file in files)  # noqa: E731
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + 300 * begun())
    monkeypatch.setattr(multi_gpu_check, "time", clock)
    whole, some = (python(file.stem, code.format(str(file)), timed=False, whole=file.stem == "whole") for file in files)
    code, said, results = check([whole, some, python("last", "")], "--minutes", "5")
    assert code == 3 and "no time was left for whole, some, last: " in said
    assert set(results["parts"]) == {"some"} and results["parts"]["some"]["cut"] and results["parts"]["some"]["passed"] == 1
    for file in files:
        pid = int(file.read_text().rstrip("."))
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    monkeypatch.undo()
    monkeypatch.setattr(multi_gpu_check, "parts", lambda _: [python("some", "print('tests/a.py::test_b PASSED [100%]')", whole=False)])
    assert multi_gpu_check.main(["--output", str(tmp_path / "out"), "--dry"]) == 0  # a part that was cut off is run again


def test_tests_are_counted_as_pytest_says_them(tmp_path: Path) -> None:
    said = tmp_path / "log"
    said.write_text(
        "tests/a.py::test_b \n[gw0] [  9%] PASSED tests/a.py::test_b[PASSED-x] \n[gw1] [ 18%] FAILED tests/a.py::test_c \n"
        "tests/a.py::test_d SKIPPED (needs 4 GPUs) [ 50%]\ntests/a.py::test_e PASSED [100%]\n"
        "FAILED tests/a.py::test_c - AssertionError: PASSED\nSKIPPED [1] tests/a.py:7: needs 4 GPUs\n== 1 failed, 2 passed in 3 s ==\n"
    )
    assert multi_gpu_check.result_of(Part("tests", 1, []), said) == {"passed": 2, "skipped": 1, "failed": 1, "error": 0}


def test_parts_that_fail_or_take_too_long_are_said_and_tried_again(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gpu_check, "OVERTIME", 0)
    slow = python("slow", "import time; time.sleep(60)", seconds=1)
    code, said, results = check([slow])
    assert code == 1 and results["failed"] == ["slow"] and "slow failed, see " in said
    monkeypatch.undo()
    bad, good = python("bad", "print('{}'); print('{no JSON'); raise ValueError('no link')"), python("good", "pass")
    code, said, results = check([bad, good])
    assert code == 1 and results["failed"] == ["bad"] and "ValueError: no link" in said and set(results["parts"]) == {"good"}
    code, said, results = check([python("bad", "print('{}'); print('{no JSON')"), good])
    assert code == 0 and set(results["parts"]) == {"bad", "good"}


def test_what_processes_said_last_is_told_and_not_what_their_launcher_said(check) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    part = Part("gone", 60, [*launcher, "bash", "-c", "echo no link; exit 5"])
    code, said, _ = check([part])
    assert code == 1 and said.splitlines()[-1].endswith("no link"), said


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
    assert kill_and_resume.main(["--processes", "1", "--output", str(tmp_path), "--", "examples/train.py"]) == 2
    first, second, third, fourth = capsys.readouterr().err.splitlines()
    assert "argument --only: there is no part nothing, but losses-one, losses-ddp, " in first
    assert "needs at least 2 GPUs, but there are 1: --dry tries it out" in second
    assert "has results of {'gpus': 4, 'dry': False}" in third and "name another folder" in third
    assert "argument --processes: must be at least 2, but is 1" in fourth


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
    sizes = {"processes": n, "tokens": 1 << 20, "exchange": exchange, "block_size": 4096, "peak_GB": 20.4}
    return {**sizes, "milliseconds": milliseconds, "GB_sent_by_each": sent, **more}


def resumed(**changed: object) -> dict:
    """Three of four processes went on after step 3; step 4 was done twice."""
    said = {"processes": 4, "exit_code": 137, "seconds_until_all_ended": 21.0, "processes_that_named_it": 3, "resumed_at": 3, "steps": 5}
    return said | {"loss_before": [9.0, 8.0, 7.0, 6.0], "loss": [9.0, 8.0, 7.0, 6.01, 5.0]} | changed


def test_what_was_found_is_put_beside_the_formulas() -> None:
    """The measured times of docs/scaling.md, and its predictions, which take nothing from ten million tokens."""
    results = {"prefill-1": {"rows": [prefill("keys", 1, 1908, 0)]}}
    results |= {"prefill-2": {"rows": [prefill("keys", 2, 1006, 2.15), prefill("heads", 2, 1000, 5.37)]}}
    results |= {"prefill-4": {"rows": [prefill("keys", 4, 510, 3.22), prefill("heads", 4, 502, 4.03)]}}
    checked = {
        "tokens": 10 << 20,
        "queries_checked": 512,
        "largest_error": 0.004,
        "median_error": 0.003,
        "share_that_chose_other_blocks": 0,
    }
    results |= {f"ten-million-{exchange}": {"rows": [prefill(exchange, 4, *x, **checked)]} for exchange, x in TEN_MILLION.items()}
    results |= {f"speed-{n}": {"tokens_per_second": [1.0, 1.0, 54300.0 * n]} for n in (2, 1)}  # as they are measured
    lines, numbers = summary(results)
    rows = {row["what"]: row for row in numbers["rows"]}
    predicted = {what: round(row["predicted_ms"]) for what, row in rows.items() if row.get("processes", 1) > 1 and "milliseconds" in row}
    assert predicted == {
        "prefill-2-keys": 956,
        "prefill-2-heads": 966,
        "prefill-4-keys": 479,
        "prefill-4-heads": 486,
        "ten-million-keys": 5024,
        "ten-million-heads": 4993,
    }
    assert rows["prefill-1"]["predicted_ms"] == pytest.approx(1908), "what a prediction is made from predicts itself"
    assert rows["prefill-2-heads"]["share_of_linear"] == pytest.approx(0.954)
    assert rows["speed-2"]["share_of_linear"] == 1 and not numbers["wrong"] and len(lines) == 9


TEN_MILLION = {"keys": (5360, 32.2), "heads": (5266, 40.3)}  # milliseconds, GB sent by each


@pytest.mark.parametrize(
    ("name", "result", "wrong"),
    [
        ("resume", resumed(), None),
        ("resume", resumed(processes_that_named_it=2), "was not named by all others within a minute"),
        ("resume", resumed(seconds_until_all_ended=61.0), "was not named by all others within a minute"),
        ("resume", resumed(exit_code=1), "ended with exit code 1, not 137"),
        ("resume", resumed(loss=[9.0, 8.0, 7.0, 6.3, 5.0]), "has other losses, or not all steps"),
        ("resume", resumed(loss=[9.0, 8.0, 7.0, 6.0]), "has other losses, or not all steps"),
        ("tests", {"passed": 3, "cut": True}, None),
        ("tests", {"passed": 3, "failed": 1, "cut": True}, "tests failed"),
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
    of_part = {"rows": [prefill("keys", 4, 5000, 30, **checked, **result)]} if name.startswith("ten") else result
    _, numbers = summary({"losses-one": {"loss": [9.0, 8.0]}, name: of_part})
    assert (numbers["wrong"] == []) if wrong is None else (wrong in numbers["wrong"][0])
