"""examples/experiments/pretrain.py: runs differ in their attention alone, and resume to the same losses."""

from __future__ import annotations

import math
import os
import re
import signal

import pretrain
import pytest
import torch
from pretraining.compare import held_out
from pretraining.corpus import Corpus, windows
from pretraining.runs import NAMES
from support.pretrain_runs import arguments, logs
from transformers import AutoTokenizer

import moba_flex

pytestmark = pytest.mark.usefixtures("signals_as_before")


def test_every_run_trains_to_the_end(trained):
    found = logs(trained)
    assert len(found) == len(NAMES) + 2 + 2
    for name, log in found.items():
        assert log["done"] and [step for step, _ in log["train"]] == [10, 12], name
        assert log["held_out"][-1][1] < log["held_out"][0][1] < math.log(8192) + 0.05, name
        assert len(log["by_position"]) == 16 and log["trailing"] > 0, name
        assert log["held_out"][-1][1] == pytest.approx(sum(log["by_position"]) / 16, abs=1e-4), name


def test_runs_differ_only_from_where_their_attention_does(trained):
    found = logs(trained)
    losses = {name: found[f"toy-128-{name}{'' if name.startswith('full') else '-b16k3'}-seed0"]["train"] for name in NAMES}
    assert losses["moba-then-full"][:1] == losses["moba"][:1]  # the first 10 of 12 steps; it switches before the 12th
    assert losses["moba-then-full"][1] != losses["moba"][1]
    assert len({str(x[:1]) for name, x in losses.items() if name != "moba-then-full"}) == len(NAMES) - 1


def test_steps_that_two_runs_share_are_trained_once(trained):
    """That they are those of the run alone is what the test below shows of a run that goes on."""
    said = (trained / "progress").read_text()
    steps = [int(found) for found in re.findall(r"moba-then-full-b16k3-seed0:[^|]*\|[^|]*\| (\d+)/12", said)]
    assert min(steps) == round(0.9 * 12)


def test_the_trained_model_is_kept_and_has_the_loss_that_was_logged(trained, words):
    name = "toy-128-moba-conv-3-b16k3-seed0"
    model = moba_flex.AutoModelForCausalLM.from_pretrained(trained / "checkpoints" / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "checkpoints" / name)
    assert tokenizer.decode(tokenizer("def f():").input_ids) == "def f():" and len(tokenizer) == model.config.vocab_size
    assert model.config.moba.key_conv == 3
    ids = windows(Corpus(words).held_out, torch.arange(4), 128)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:])
    assert loss.item() == pytest.approx(held_out(logs(trained)[name]), abs=1e-4)


# Stops


@pytest.mark.parametrize("name", ["moba-then-full", "moba-conv-5"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(trained, words, tmp_path, name, capsys):
    command = arguments(tmp_path, words, "--runs", name, "--budget-seconds", "0")
    for step in (1, 2, 3):  # one step each, as the time is up at once
        assert pretrain.pretrain(command) == 0
        assert f"the time is up after step {step} of toy-128-{name}" in capsys.readouterr().out
    assert pretrain.pretrain(arguments(tmp_path, words, "--runs", name)) == 0
    ((file, log),) = logs(tmp_path).items()
    expected = logs(trained)[file]
    assert {key: log[key] for key in ("train", "held_out", "by_position", "trailing")} == {
        key: expected[key] for key in ("train", "held_out", "by_position", "trailing")
    }
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_ctrl_c_writes_a_checkpoint_at_the_end_of_the_step(text, tmp_path, monkeypatch, capsys):
    step = pretrain.Training._train

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(pretrain.Training, "_train", interrupted)
    assert pretrain.pretrain(arguments(tmp_path, text, "--runs", "moba")) == 130
    said = "interrupted after step 1 of toy-128-moba-b16k3-seed0, whose checkpoint is written: the same command goes on from there"
    assert f"{said}; runs left: 1\n" in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 1


def test_no_run_begins_when_the_time_is_up(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain.Training, "go_on", lambda *_: True)
    monkeypatch.setattr(pretrain.Training, "release", lambda _: None)
    assert pretrain.pretrain(arguments(tmp_path, text, "--runs", "full", "moba", "--budget-seconds", "0")) == 0
    assert (
        "the time is up before the first step of toy-128-moba-b16k3-seed0 was done: nothing is saved; runs left: 1"
        in capsys.readouterr().out
    )


def test_runs_that_are_done_are_left_out(trained, words, monkeypatch, capsys):
    monkeypatch.setattr(pretrain.Training, "go_on", lambda *_: pytest.fail("trained again"))
    assert pretrain.pretrain(arguments(trained, words, "--runs", "full", "moba")) == 0
    assert capsys.readouterr().out.endswith(f"all runs are done: see --compare {trained / 'logs'}/*.json\n")
    assert pretrain.pretrain(arguments(trained, words, "--runs", "full", "--block-size", "32")) == 0  # full attention has no blocks
