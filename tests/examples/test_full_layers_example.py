"""examples/full_layers.py: each layer is measured as it says, the best one is kept, and a stop changes no number."""

from __future__ import annotations

import json
from pathlib import Path

import full_layers
import pytest
import torch
from adapting.text import sequences
from shared.package_text import KINDS, collect
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_flex

BLOCKS = {"block_size": 32, "top_k": 2, "sink_blocks": 1}


@pytest.fixture(scope="module")
def flags(byte_llama: Path, text_folder: Path) -> list[str]:
    blocks = "--block-size 32 --top-k 2 --sink-blocks 1 --sequences 1 --sequence-length 500"
    return ["--model", str(byte_llama), "--text", str(text_folder), "--device", "cpu", *blocks.split()]


@pytest.fixture(scope="module")
def expected(byte_llama: Path, text_folder: Path) -> dict[str, float]:
    """What `--layers 2` measures, worked out by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(byte_llama).eval(), AutoTokenizer.from_pretrained(byte_llama)
    documents = collect([text_folder], 20)
    text = torch.cat([sequences(documents[kind].held_out, tokenizer, 500, kind, 1)[0] for kind in KINDS])

    @torch.inference_mode()
    def loss() -> float:
        return cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten()).item()

    losses = {"full attention": loss()}
    for layers in ((), (0,), (1,), (2,), (3,)):
        moba_flex.patch(model, **BLOCKS, full_attention_layers=layers)
        losses[full_layers.name_of(layers)] = loss()
    best = min(range(4), key=lambda n: losses[full_layers.name_of((n,))])
    for n in {0, 1, 2, 3} - {best}:
        moba_flex.patch(model, **BLOCKS, full_attention_layers=(best, n))
        losses[full_layers.name_of((best, n))] = loss()
    return losses


def losses(file: Path) -> dict[str, float]:
    return json.loads(file.read_text())["loss"]


def test_each_layer_is_measured_and_the_best_is_kept(flags, expected, tmp_path, capsys) -> None:
    file = tmp_path / "new folder" / "found.json"
    assert full_layers.main([*flags, "--layers", "2", "--output", str(file)]) == 0
    found = losses(file)
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 2 + 4 + 3
    pairs = {name: loss for name, loss in found.items() if name.count(",") == 2}
    layers = min(pairs, key=pairs.get).partition(" in ")[2].split(", ")
    assert f"\nfull_attention_layers=({', '.join(sorted(layers))})\n" in capsys.readouterr().out


def test_after_a_stop_it_goes_on_to_the_same_layers(flags, expected, tmp_path, monkeypatch, capsys) -> None:
    command, measure, measured = [*flags, "--output", str(tmp_path / "found.json")], full_layers.loss_of, []

    def killed(*arguments):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(full_layers, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        full_layers.main(command)
    monkeypatch.undo()
    assert len(losses(tmp_path / "found.json")) == 3, "two sequences each, and the fourth is half done"
    assert full_layers.main(command) == 2 and "go on with --resume" in capsys.readouterr().err
    assert full_layers.main([*command, "--resume", "--top-k", "3"]) == 2 and "top_k was 2 and is 3" in capsys.readouterr().err
    assert full_layers.main([*command, "--resume"]) == 0
    assert losses(tmp_path / "found.json") == pytest.approx({name: x for name, x in expected.items() if name.count(",") < 2}, abs=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "4"], "--layers must be from 1 to 3, one less than layers use MoBA, but is 4"),
        (["--sequence-length", "2000"], "--sequence-length is 2,000, but the model's context is 1,024 tokens"),
        (["--top-k", "16"], "--sequence-length is 500, of which MoBA reads every key: give more than --block-size times --top-k, 512"),
        (["--top-k", "0"], "argument --top-k: must be at least 1, but is 0"),
        (["--text", "/nowhere"], "argument --text: text is read from folders, but /nowhere is none"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, tmp_path, capsys, more, said) -> None:
    assert full_layers.main([*flags, "--output", str(tmp_path / "found.json"), *more]) == 2
    assert f"full_layers.py: error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()
