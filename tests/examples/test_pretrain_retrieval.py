"""examples/experiments/pretrain.py with facts in the text: resumed to the same losses, and retrieval measured by needle.py."""

from __future__ import annotations

import json
from pathlib import Path

import needle
import pretrain
import pytest
import torch
from pretraining.compare import held_out
from pretraining.corpus import Corpus, windows
from support.pretrain_runs import WITH_FACTS, arguments, logs, signals_as_before

import moba_flex

pytestmark = pytest.mark.usefixtures("signals_as_before")


@pytest.fixture(scope="module")
def with_facts(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_facts")
    with signals_as_before():
        assert pretrain.pretrain(arguments(folder, text, *WITH_FACTS, "--runs", "full", "moba", "moba-then-full", "moba-conv-3")) == 0
    return folder


def test_with_facts_too_resuming_gives_the_losses_of_an_uninterrupted_run(with_facts, text, tmp_path):
    assert pretrain.pretrain(arguments(tmp_path, text, *WITH_FACTS, "--runs", "moba-then-full", "--budget-seconds", "0")) == 0
    assert pretrain.pretrain(arguments(tmp_path, text, *WITH_FACTS, "--runs", "moba-then-full")) == 0
    ((file, log),) = logs(tmp_path).items()
    expected = logs(with_facts)[file]
    assert log["train"] == expected["train"] and log["held_out"] == expected["held_out"] and log["settings"]["needle_share"] == 0.5


def test_the_held_out_loss_of_a_model_trained_with_facts_is_of_plain_text(with_facts, text):
    model = moba_flex.AutoModelForCausalLM.from_pretrained(with_facts / "checkpoints/toy-1024-moba-b16k3-seed0").eval()
    ids = windows(Corpus(text).held_out, torch.arange(1), 1024)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:])
    assert loss.item() == pytest.approx(held_out(logs(with_facts)["toy-1024-moba-b16k3-seed0"]), abs=1e-4)


@pytest.mark.parametrize("name", ["moba", "moba-conv-3"])
def test_retrieval_is_measured_on_two_trained_models_to_their_context(with_facts, text_folder, tmp_path, name):
    pytest.importorskip("matplotlib")
    moba, full = (f"toy-1024-{run}-seed0" for run in (f"{name}-b16k3", "full"))
    sides = ["--moba", str(with_facts / "checkpoints" / moba), "--full", str(with_facts / "checkpoints" / full)]
    flags = ["--depths", "0", "1", "--trials", "1", "--text", str(text_folder), "--device", "cpu", "--output", str(tmp_path)]
    assert needle.main([*sides, *flags]) == 0
    found = json.loads((tmp_path / "needle.json").read_text())
    assert found["asked"]["lengths"] == [128, 256, 512, 1024] and all(len(right) == 8 for right in found["right"].values())
    assert found["models"]["moba"]["moba"]["block_size"] == 16 and found["models"]["full"]["moba"] is None
    assert found["models"]["full"]["model"] == f"checkpoints/{full}"
    assert found["models"]["full"]["weights"] != found["models"]["moba"]["weights"]
    assert (tmp_path / "needle.png").stat().st_size > 10_000

    side, _, _ = needle.load_side("moba", needle.parse([*sides, *flags]))
    trained = moba_flex.AutoModelForCausalLM.from_pretrained(with_facts / "checkpoints" / moba).eval()
    ids = torch.arange(1024)[None] % side.config.vocab_size
    with torch.no_grad():
        assert side(ids).logits.equal(trained(ids).logits)
