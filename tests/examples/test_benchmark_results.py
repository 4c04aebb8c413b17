"""The results of `examples/benchmarks/benchmark.py`: a file that no stop and no error spoils, from which it goes on, and a plot of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarking import results
from benchmarking.attention import BOTH, FORWARD
from shared import environment
from support.benchmark_runs import CPU, FLAGS, by_key, fake, run
from support.scripts import Script

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


def test_the_ratio_to_others_leaves_out_our_own():
    times = {"moba_flex": 4.0, "moba_flex-triton": 2.0, "dense-fa2": 8.0, "flash-moba": 6.0}
    made = [{"system": system, "pass": "forward", "tokens": 64, "milliseconds": time, "peak_gb": 1.0} for system, time in times.items()]
    run_ = {"title": "", "settings": {}, "environment": {"device": ""}, "date": "2026-01-01", "results": made}
    header, _, row = results.tables(run_).split("milliseconds\n")[1].splitlines()[:3]
    assert "fastest other / ours" in header and "1.50x" in row
    run_["results"] = made[:2]
    assert "ours" not in results.tables(run_)
