"""examples/compare_blocks.py: each setting is measured as it says, with adapters and without, and a stop changes no number."""

from __future__ import annotations

import json
from pathlib import Path

import compare_blocks
import pytest
import torch
from adapting.runs import new_adapter
from adapting.text import sequences
from shared.models import with_adapter
from shared.package_text import KINDS, collect
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_flex

BLOCKS = {"32x2": (32, 2, ()), "16x4+-1,0": (16, 4, (-1, 0))}


@pytest.fixture(scope="module")
def flags(byte_llama: Path, text_folder: Path) -> list[str]:
    more = "--sequences 1 --sequence-length 500 --device cpu --blocks 32x2 16x4+-1,0"
    return ["--model", str(byte_llama), "--text", str(text_folder), *more.split()]


@pytest.fixture(scope="module")
def adapter(byte_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes the model: its updates are not the zeros that they begin with."""
    model = new_adapter(AutoModelForCausalLM.from_pretrained(byte_llama), rank=2, seed=0)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def expected(byte_llama: Path, text_folder: Path, adapter: Path | None, control: Path | None) -> dict[str, dict[str, list[float]]]:
    """All losses, worked out by themselves."""
    tokenizer, documents = AutoTokenizer.from_pretrained(byte_llama), collect([text_folder], 20)
    found = {}
    for name in ("full", *BLOCKS):
        model, folder = AutoModelForCausalLM.from_pretrained(byte_llama).eval(), control if name == "full" else adapter
        model = model if folder is None else with_adapter(model, folder)
        if name != "full":
            size, top_k, layers = BLOCKS[name]
            moba_flex.patch(model, block_size=size, top_k=top_k, sink_blocks=1, full_attention_layers=layers)
        found[name] = {}
        for kind in KINDS:
            ids = sequences(documents[kind].held_out, tokenizer, 500, kind, 1)[0]
            with torch.inference_mode():
                found[name][kind] = [cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:]).item()]
    return found


def losses(file: Path) -> dict:
    return json.loads(file.read_text())["loss"]


def assert_close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, of_kind in wanted.items():
        for kind in KINDS:
            assert found[name][kind] == pytest.approx(of_kind[kind], abs=1e-5), (name, kind)


@pytest.mark.parametrize("sides", [(), ("--adapter",), ("--control",), ("--adapter", "--control")], ids=str)
def test_each_setting_is_measured_with_its_adapter(flags, adapter, byte_llama, text_folder, tmp_path, capsys, sides) -> None:
    file = tmp_path / "new folder" / "found.json"
    named = {side: adapter if side in sides else None for side in ("--adapter", "--control")}
    assert compare_blocks.main([*flags, "--output", str(file), *(word for side in sides for word in (side, str(adapter)))]) == 0
    found = losses(file)
    assert_close(found, expected(byte_llama, text_folder, named["--adapter"], named["--control"]))
    assert len({str(x) for x in found.values()}) == 3
    printed = capsys.readouterr().out
    difference = found["32x2"]["code"][0] - found["full"]["code"][0]
    assert f"{difference:+.4f}" in next(line for line in printed.splitlines() if line.startswith("32x2 "))


def test_settings_go_on_in_the_same_file(flags, adapter, tmp_path, monkeypatch, capsys) -> None:
    file, measured = tmp_path / "found.json", []
    command, measure = [*flags, "--output", str(file)], compare_blocks.losses

    def counted(*arguments):
        measured.append(arguments[-1])
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(compare_blocks, "losses", counted)
    with pytest.raises(KeyboardInterrupt):
        compare_blocks.main(command)
    assert list(losses(file)) == ["full"], "of the next one a half is done"
    before = losses(file)
    assert compare_blocks.main(command) == 2 and "go on with --resume" in capsys.readouterr().err
    assert compare_blocks.main([*command, "--resume", "--sink-blocks", "0"]) == 2
    assert "sink_blocks was 1 and is 0" in capsys.readouterr().err
    assert compare_blocks.main([*command, "--resume", "--adapter", str(adapter)]) == 2
    assert "adapter was None and is " in capsys.readouterr().err
    assert compare_blocks.main([*command, "--resume"]) == 0
    assert list(losses(file)) == ["full", *BLOCKS] and losses(file)["full"] == before["full"]
    assert measured[4:] == [f"{name}, {kind}" for name in BLOCKS for kind in KINDS]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--blocks", "64"],
            "--blocks takes BLOCKxTOPK, such as 64x24, or with full attention in some layers 64x24+17,18, but is given '64'",
        ),
        (["--blocks", "64x0"], "--blocks 64x0 cannot be: top_k must be an int of at least 1, but is 0"),
        (["--blocks", "64x3+9"], "argument --blocks 64x3+9: there is no layer 9: the model has the layers 0 to 3"),
        (["--sequence-length", "2000"], "--sequence-length is 2,000, but the model's context is 1,024 tokens"),
        (["--adapter", "/nowhere"], "argument --adapter: there is no adapter in /nowhere"),
        (["--text", "/nowhere"], "argument --text: text is read from folders, but /nowhere is none"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, tmp_path, capsys, more, said) -> None:
    assert compare_blocks.main([*flags, "--output", str(tmp_path / "found.json"), *more]) == 2
    error = capsys.readouterr().err
    assert f"compare_blocks.py: error: {said}" in error and "Traceback" not in error
    assert not (tmp_path / "found.json").exists()
