"""examples/finetune.py: Trainer and TRL, whole models and adapters; each learns, is saved, and loads with MoBA's settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import finetune
import pytest
import torch
from shared import training
from shared.models import with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_flex

BLOCKS = {"block_size": 8, "top_k": 2, "sink_blocks": 1}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def flags(byte_llama: Path, tmp_path: Path) -> list[str]:
    files = []
    for i in range(6):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text("abcdefgh"[i:] * (8 + i))
    given = f"--model {byte_llama} --output {tmp_path / 'tuned'} --steps 6 --batch-size 2 --sequence-length 128 --learning-rate 1e-2"
    blocks = "--block-size 8 --top-k 2 --sink-blocks 1"
    return [*given.split(), *blocks.split(), "--text", *map(str, files)]


def loss(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("more", [[], ["--lora"], ["--trl"], ["--trl", "--lora"]], ids=" ".join)
def test_it_learns_and_loads(flags, byte_llama: Path, tmp_path: Path, capsys, more) -> None:
    if "--trl" in more:
        pytest.importorskip("trl", reason="--trl needs TRL: pip install trl")
    assert finetune.main([*flags, *more]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "tuned"
    assert "done after step 6, final loss " in out
    ids = AutoTokenizer.from_pretrained(byte_llama)("abcdefgh" * 10, return_tensors="pt").input_ids
    before = moba_flex.patch(AutoModelForCausalLM.from_pretrained(byte_llama), **BLOCKS).eval()
    if "--lora" in more:
        assert f"\nread with it: python examples/llama.py --model {byte_llama} --adapted {folder}\n" in out
        again = moba_flex.AutoModelForCausalLM.from_pretrained(folder)  # as the line before says
        assert again.config.moba == moba_flex.MobaConfig(**BLOCKS)
        settings = json.loads((folder / "moba.json").read_text())
        after = moba_flex.patch(with_adapter(AutoModelForCausalLM.from_pretrained(byte_llama), folder), settings)
    else:
        assert "read with it" not in out
        assert f"load it: moba_flex.AutoModelForCausalLM.from_pretrained('{folder}')\n" in out
        after = moba_flex.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert after.config.moba == moba_flex.MobaConfig(**BLOCKS)
    assert loss(after, ids) < loss(before, ids) - 0.05


def test_packed_documents_are_kept_apart(flags, byte_llama: Path, monkeypatch) -> None:
    """In the first step each document of a row has the hidden states that it has alone."""
    pytest.importorskip("trl", reason="--trl needs TRL: pip install trl")
    seen, patch = [], moba_flex.patch

    def watched(model, settings):
        body = model.base_model  # TRL works out the loss from its output
        body.register_forward_hook(lambda _, args, given, out: seen.append((given, out.last_hidden_state.detach())), with_kwargs=True)
        return patch(model, settings)

    monkeypatch.setattr(moba_flex, "patch", watched)
    assert finetune.main([*flags, "--trl", "--steps", "1"]) == 0
    ((given, states),) = seen
    starts = (given["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2 and given["input_ids"].shape[0] == 1
    model = patch(AutoModelForCausalLM.from_pretrained(byte_llama), **BLOCKS).eval()
    for start, end in zip(starts, [*starts[1:], states.shape[1]]):
        with torch.no_grad():
            alone = model.base_model(given["input_ids"][:, start:end]).last_hidden_state
        torch.testing.assert_close(states[:, start:end], alone, rtol=1e-4, atol=1e-4)


def test_ctrl_c_writes_a_checkpoint_and_it_goes_on(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(self, args, state, control, **more):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ends(self, args, state, control, **more)

    ends = training.StopTrainer.on_step_end
    monkeypatch.setattr(training.StopTrainer, "on_step_end", interrupted)
    assert finetune.main(flags) == 130
    said = "interrupted after step 2, whose checkpoint is written: the same command with --resume goes on from there\n"
    assert capsys.readouterr().out.endswith(said) and (tmp_path / "tuned/checkpoint-2").is_dir()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finetune.main(flags) == 2
    assert "has checkpoints already: go on from the last one with --resume, or choose another" in capsys.readouterr().err
    assert finetune.main([*flags, "--resume"]) == 0
    assert "done after step 6" in capsys.readouterr().out


def test_ctrl_c_after_the_last_step_loses_nothing(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(self, args, state, control, **more):
        ends(self, args, state, control, **more)
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    ends = training.StopTrainer.on_step_end
    monkeypatch.setattr(training.StopTrainer, "on_step_end", interrupted)
    assert finetune.main(flags) == 0
    assert "done after step 6" in capsys.readouterr().out and (tmp_path / "tuned/model.safetensors").is_file()


def test_processes_stop_at_the_same_step_whichever_got_the_signal(monkeypatch) -> None:
    """The other process has got it: what is summed over all processes counts."""
    stop = training.StopTrainer()
    args, control = SimpleNamespace(device="cpu", world_size=2), SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_train_begin(args, None, control)
    monkeypatch.setattr(training.dist, "all_reduce", lambda wanted, _: wanted.fill_(0))
    stop.on_step_end(args, None, control)
    assert not control.should_training_stop and stop.exit_code == 0
    monkeypatch.setattr(training.dist, "all_reduce", lambda wanted, _: wanted.fill_(1))
    stop.on_step_end(args, None, control)
    assert control.should_save and control.should_training_stop and stop.exit_code == 130


def test_too_little_text_is_told_before_the_model_is_loaded(flags, monkeypatch, capsys) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert finetune.main([*flags, "--sequence-length", "1000"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "finetune.py: error: --text has 329 tokens, but one sequence (--sequence-length) has 1,000"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--text", "nowhere.txt"], "argument --text: cannot read the file: "),
        (["--full-attention-layers", "7"], "argument --full-attention-layers: there is no layer 7: the model has the layers 0 to 3"),
        (["--top-k", "1"], "these flags do not fit together: "),
        (["--sequence-length", "5000"], "--sequence-length is 5,000, but the model's context is 1,024 tokens"),
        (["--resume"], "--resume: there is no checkpoint in "),
        (["--steps", "0"], "argument --steps: must be at least 1, but is 0"),
        (["--output", __file__], "argument --output: cannot write to the folder "),
    ],
)
def test_what_cannot_work_is_one_line_before_the_model_is_loaded(flags, monkeypatch, capsys, more, words: str) -> None:
    monkeypatch.setattr(finetune, "fine_tune", lambda *_: pytest.fail("begun"))
    assert finetune.main([*flags, *more]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"finetune.py: error: {words}")
