"""`python -m moba_flex.calibrate`: what it prints, writes and refuses, and that it goes on after a stop."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from support.calibration import loss, stopped_after

import moba_flex
from moba_flex import Calibration

command = importlib.import_module("moba_flex.calibrate")


@pytest.fixture
def flags(byte_llama: Path, tmp_path: Path) -> list[str]:
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {n} of text {i} is read by queries.\n" for n in range(60)))
    texts = [str(tmp_path / f"{i}.txt") for i in range(2)]
    sizes = "--length 512 --texts 4 --within 1 --block-sizes 16 --budgets 64 128 --device cpu"
    return ["--model", str(byte_llama), "--text-file", *texts, *sizes.split(), "--output", str(tmp_path / "new" / "found")]


def test_it_prints_the_table_writes_its_files_and_ends_with_python_that_runs(flags, tmp_path, capsys):
    assert command.main(flags) == 0
    printed = capsys.readouterr()
    report = Calibration.load(tmp_path / "new" / "found.json")
    assert report.table() in printed.out and report.limits == {"within": 1.0} and report.n_search + report.n_held_out == 4
    assert (tmp_path / "new" / "found.png").read_bytes()[:4] == b"\x89PNG"
    lines = printed.out.splitlines()[-3:]
    namespace: dict = {}
    exec("\n".join(lines), namespace)
    assert namespace["model"].config.moba == report.config
    assert re.search(r"Calibrating: about .* tokens, [\d.]+ seconds of one processor if", printed.err)
    assert "forward passes of 512 tokens" in printed.err, "what it costs is said first"


def test_after_ctrl_c_the_same_command_goes_on(flags, tmp_path, capsys):
    with stopped_after(5):
        assert command.main(flags) == 130
    file = tmp_path / "new" / "found.measured.json"
    assert f"interrupted: the same command goes on from {file}" in capsys.readouterr().err
    before = json.loads(file.read_text())["measured"]
    assert len(before) == 5
    assert command.main(flags) == 0
    after = json.loads(file.read_text())["measured"]
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--within", "0"], "within must be a number of nats above 0, such as 0.02, but is 0.0"),
        (["--length", "5000"], "the texts give 0 pieces of 5,000 tokens, but at least 2 are needed: name more, or a smaller --length"),
        (["--length", "0"], "--length must be at least 1, but is 0"),
        (["--texts", "1"], "--texts must be at least 2, but is 1"),
        (["--text-file", "/nowhere.txt"], "cannot read the text /nowhere.txt"),
        (["--model", "/nowhere"], "cannot load the model '/nowhere', as a local folder, a GGUF file or from the hub"),
        (["--output", "/proc/nowhere/found"], "cannot write to the folder /proc/nowhere"),
        (["--output", "/proc/found"], "cannot write to the folder /proc"),
        (["--output", ""], "--output must be the name of files, without an ending, but is '.'"),
        (["--device", "nowhere"], "--device 'nowhere' cannot be used: "),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_one_line(flags, more, said, capsys):
    assert command.main([*flags, *more]) == 2
    error = capsys.readouterr().err
    assert f"calibrate: error: {said}" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--within", "-1"], "within must be a number of nats above 0, such as 0.02, but is -1.0"),
        (["--last-quarter", "nan"], "last_quarter must be a number of nats above 0, such as 0.02, but is nan"),
        (["--agreement", "2"], "agreement must be a share from 0 to 1, but is 2.0"),
        (["--block-sizes", "0"], "each of block_sizes must be an int of at least 1, but is 0"),
        (["--budgets", "-4"], "each of budgets must be an int of at least 1, but is -4"),
        (["--text-file", "/nowhere.txt"], "cannot read the text /nowhere.txt"),
        (["--device", "nowhere"], "--device 'nowhere' cannot be used: "),
        (["--output", "/proc/found"], "cannot write to the folder /proc"),
    ],
    ids=str,
)
def test_wrong_flags_are_told_before_the_model_is_loaded(flags, more, said, capsys, monkeypatch):
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("the model was loaded"))
    assert command.main([*flags, *more]) == 2
    assert f"calibrate: error: {said}" in capsys.readouterr().err


def test_ctrl_c_during_the_imports_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "moba_flex.calibrate", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if "torch._" in line:
            process.send_signal(signal.SIGINT)
            break
    said += process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in "".join(said), "".join(said[-20:])


def test_where_nothing_keeps_the_limits_it_says_so(flags, capsys):
    assert command.main([*flags, "--agreement", "1"]) == 1
    printed = capsys.readouterr().out
    assert "No settings keep the limits" in printed and "import moba_flex" not in printed


def test_without_files_it_reads_what_python_brings():
    prose, code = command.standard_texts()
    assert len(prose) > 300_000 and len(code) > 300_000 and "import" in code[:5000]


def test_it_runs_as_a_module(fresh):
    """As `python -W error::RuntimeWarning -m moba_flex.calibrate --help` does it."""
    program = """
import os, runpy, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
os.environ["COLUMNS"], sys.argv[1:] = "200", ["--help"]
runpy.run_module("moba_flex.calibrate", run_name="__main__", alter_sys=True)
"""
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr
    assert "python -m moba_flex.calibrate" in done.stdout and "Find MoBA's settings" in done.stdout


@pytest.mark.weights
def test_the_demos_model_keeps_its_promise_on_text_that_was_not_seen(smollm2, tmp_path):
    """SmolLM2-135M at 192 tokens, with few texts and candidates, of which the cheaper ones lose too much."""
    model, tokenizer = smollm2
    transformers.utils.logging.disable_progress_bar()
    pieces = command.text_pieces(command.standard_texts(), tokenizer, 192, 7)
    report = moba_flex.calibrate(model, pieces[:4], within=0.04, block_sizes=[16], budgets=[48, 112])
    assert report.config is not None and not hasattr(model.config, "moba")
    full = [loss(model, ids) for ids in pieces[4:]]
    moba_flex.patch(model, report.config)
    fresh = [loss(model, ids) - x for ids, x in zip(pieces[4:], full)]
    part = report.candidates[report.chosen].held_out
    assert sum(fresh) / len(fresh) <= 0.04 + part.spread
    moba_flex.unpatch(model)
