"""examples/adapt.py and its text: all runs read the same, nothing held out is trained on, and no stop and no sharing changes a number."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import adapt
import llama
import needle
import pytest
import torch
from adapting.runs import moba_config, new_adapter
from peft import PeftModel
from shared import models, package_text
from support.scripts import Script
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import moba_flex

BLOCKS = {"block_size": 32, "top_k": 3, "sink_blocks": 1}
STEPS = 4


@pytest.fixture(autouse=True)
def _signals():
    """The script remembers Ctrl-C instead of ending at once."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def flags(byte_llama: Path, text_folder: Path) -> list[str]:
    sizes = f"--steps {STEPS} --batch-size 4 --micro-batch-size 2 --sequence-length 600 --rank 2 --warmup 1 --held-out 3 --needle-share 0.5"
    blocks = "--block-size 32 --top-k 3 --sink-blocks 1 --learning-rate 1e-2"
    return ["--model", str(byte_llama), "--text", str(text_folder), "--device", "cpu", *sizes.split(), *blocks.split()]


@pytest.fixture(scope="module")
def longer(flags: list[str], tmp_path_factory) -> Path:
    """The folder of a run beyond the model's context of 1,024 tokens."""
    output = tmp_path_factory.mktemp("adapt") / "longer"
    command = [*flags, "--runs", "moba", "--sequence-length", "1200", "--rope-theta", "50000", "--output", str(output)]
    assert adapt.main(command) == 0
    return output


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory) -> Path:
    """The folder of a run from beginning to end."""
    output = tmp_path_factory.mktemp("adapt") / "whole"
    assert adapt.main([*flags, "--output", str(output)]) == 0
    return output


def log(output: Path, name: str) -> list[tuple]:
    """That of a run, without the times."""
    entries = [json.loads(line) for line in (output / name / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in entries]


def logs(output: Path) -> list[list[tuple]]:
    return [log(output, name) for name in adapt.RUNS]


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_all_runs_are_logged_learn_and_are_measured_beside_the_model_before(whole: Path) -> None:
    for name in adapt.RUNS:
        assert [step for step, *_ in log(whole, name)] == list(range(1, STEPS + 1)), name
    loss = results(whole)["loss"]
    assert sorted(loss) == ["full", "full, untrained", "hybrid", "hybrid, untrained", "moba", "moba, untrained"]
    for row, measured in loss.items():
        for kind in ("prose", "code"):
            assert len(measured[kind]) == 3, f"{row}, {kind}"
            if "untrained" not in row:
                assert sum(measured[kind]) < sum(loss["full, untrained"][kind]) - 0.1, f"{row}, {kind}"


@pytest.mark.parametrize("name", adapt.RUNS)
def test_what_is_measured_is_the_adapter_on_disk_with_the_attention_of_its_run(
    whole: Path, byte_llama: Path, text_folder: Path, name: str
) -> None:
    """Held against PEFT, the dense specification, and the files named in the results."""
    found = results(whole)
    documents = {document.name: document.text for document in package_text.collect([text_folder], 60)["code"].held_out}
    tokenizer = AutoTokenizer.from_pretrained(byte_llama)
    ids = torch.tensor([x for file in found["held_out_files"]["code"] for x in [*tokenizer(documents[file]).input_ids, 256]])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_llama), str(whole / name / "adapter")).eval()
    if name != "full":
        settings = json.loads((whole / name / "adapter/moba.json").read_text())
        last = [-3, -2, -1] if name == "hybrid" else []
        assert settings == {**settings, **BLOCKS, "full_attention_layers": last}
        moba_flex.patch(model, **BLOCKS, implementation="naive", full_attention_layers=last)
    with torch.no_grad():
        logits = [model(input_ids=row[None, :-1], use_cache=False).logits[0] for row in ids[:1800].view(3, 600)]
    expected = torch.stack([cross_entropy(part, row[1:]) for part, row in zip(logits, ids[:1800].view(3, 600))])
    torch.testing.assert_close(torch.tensor(found["loss"][name]["code"]), expected, rtol=1e-5, atol=1e-5)


def test_the_layers_of_hybrid_with_full_attention_may_be_named(flags: list[str], tmp_path: Path) -> None:
    args = adapt.parse([*flags, "--output", str(tmp_path), "--full-attention-layers", "1", "2"])
    assert moba_config("hybrid", args).full_attention_layers == (1, 2) and moba_config("moba", args).full_attention_layers == ()


@pytest.mark.parametrize("name", adapt.RUNS)
def test_layers_that_the_model_has_not_are_refused_whatever_runs_first(flags: list[str], tmp_path: Path, name: str, capsys) -> None:
    assert adapt.main([*flags, "--output", str(tmp_path / "none"), "--runs", name, "--full-attention-layers", "7"]) == 2
    assert "argument --full-attention-layers: there is no layer 7: the model has the layers 0 to 3" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_all_runs_start_from_the_same_model_on_the_same_sequences(whole: Path, flags: list[str]) -> None:
    """MoBA's first loss is that of the untrained model with MoBA on the first batch; the order follows from the seed."""
    args = adapt.parse([*flags, "--output", "-"])
    model, tokenizer = models.load(args.model, "cpu", "float32")
    text, again = adapt.Text(args, tokenizer), adapt.Text(args, tokenizer)
    assert all(text.batch(step).equal(again.batch(step)) for step in range(STEPS))
    for name in adapt.RUNS:
        losses = adapt.losses(adapt.attend(model, name, args), text.batch(0), name)
        assert abs(sum(losses) / len(losses) - log(whole, name)[0][1]) < 1e-5, name


@pytest.mark.parametrize("name", adapt.RUNS)
def test_layers_with_an_adapter_and_the_same_attention_share_a_graph(name: str, flags: list[str]) -> None:
    args = adapt.parse([*flags, "--output", "-"])
    base, _ = models.load(args.model, "cpu", "float32")
    base.loss_function = adapt.mean_loss
    model, graphs = adapt.attend(new_adapter(base, 2, 0), name, args).train(), CompileCounter()
    ids = torch.randint(64, (2, 600), generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        mask = None if name == "full" else adapt.mask_of(*ids.shape, ids.device)
        return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss

    torch.compiler.reset()
    wanted = loss().item()
    adapt.compile_layers(model, backend=graphs)
    for _ in range(2):
        got = loss()
        got.backward()
        assert got.item() == pytest.approx(wanted, rel=1e-5)
    # Of four layers the first has a graph of its own: its input needs no gradient, and `hybrid` has MoBA there alone.
    assert graphs.frame_count == 2
    torch.compiler.reset()


def test_an_ended_run_goes_on_as_if_nothing_had_happened(whole: Path, flags: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """First time is up; then a step is logged whose checkpoint was never written."""
    command = [*flags, "--output", str(tmp_path / "run"), "--checkpoint-seconds", "0"]
    assert adapt.main([*command, "--minutes", "1e-9"]) == 0
    assert "the time is up after step 1 of run full, whose checkpoint is written: the same command with --resume" in capsys.readouterr().out
    assert len(log(tmp_path / "run", "full")) == 1
    save = adapt.Output.save

    def killed(self, name, step, *rest):
        if (name, step) == ("moba", 3):
            raise KeyboardInterrupt
        save(self, name, step, *rest)

    monkeypatch.setattr(adapt.Output, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        adapt.main([*command, "--resume"])
    assert log(tmp_path / "run", "moba")[-1][0] == 3
    monkeypatch.undo()
    assert adapt.main([*command, "--resume"]) == 0
    assert logs(tmp_path / "run") == logs(whole)
    assert results(tmp_path / "run")["loss"] == results(whole)["loss"]


def test_what_decides_the_losses_must_not_change(whole: Path, flags: list[str], capsys) -> None:
    assert adapt.main([*flags, "--output", str(whole), "--resume", "--seed", "1", "--top-k", "4", "--rope-theta", "1e6"]) == 2
    words = "these must not change: rope_theta was None and is 1000000.0, seed was 0 and is 1, top_k was 3 and is 4\n"
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sequence-length", "1000000"], "is 1,000,000, but the model's context is 1,024 tokens: give --rope-theta"),
        (["--rope-theta", "0.5"], "--rope-theta: must be above 1, but is 0.5"),
        (["--runs", "dense"], "--runs: invalid choice: 'dense'"),
        (["--sequence-length", "1000000", "--rope-theta", "1e6"], "its held-out prose has .* tokens, but one sequence has 1,000,000"),
        (["--text", "nowhere"], "text is read from folders, but nowhere is none"),
        (["--top-k", "1"], "these flags do not fit together: .*--sink-blocks"),
        (["--model", "missing.gguf"], "argument --model: there is no file missing.gguf"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, but is 0"),
        (["--rank", "0"], "--rank: must be at least 1, but is 0"),
        (["--needle-share", "2"], "--needle-share: must be from 0 to 1, but is 2"),
        (["--minutes", "-1"], "--minutes: must be at least 0, but is -1"),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds: must be at least 0, but is nan"),
        (["--learning-rate", "-1"], "--learning-rate: must be finite and above 0, but is -1"),
        (["--learning-rate", "nan"], "--learning-rate: must be finite and above 0, but is nan"),
        (["--weight-decay", "-1"], "--weight-decay: must be finite and at least 0, but is -1"),
        (["--clip", "0"], "--clip: must be above 0, but is 0"),
        (["--warmup", "-1"], "--warmup: must be at least 0, but is -1"),
        (["--sequence-length", "100", "--needle-share", "1"], "--sequence-length is too short for --needle-share: .* but has 100"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(flags: list[str], tmp_path: Path, more: list[str], words: str, capsys) -> None:
    assert adapt.main([*flags, *more, "--output", str(tmp_path / "run")]) == 2
    assert re.search(f"adapt.py: error: .*{words}", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_sequence_beyond_the_context_is_refused_before_the_model_is_loaded(flags: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(adapt, "load", lambda *_: pytest.fail("loaded"))
    assert adapt.main([*flags, "--sequence-length", "1025", "--output", str(tmp_path / "run")]) == 2
    assert "--sequence-length is 1,025, but the model's context is 1,024 tokens: give --rope-theta" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_is_loaded(
    flags: list[str], tmp_path: Path, output: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(adapt, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    assert adapt.main([*flags, "--output", str(tmp_path / output)]) == 2
    assert capsys.readouterr().err.startswith(f"adapt.py: error: argument --output: cannot write to the folder {tmp_path / output}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_run_is_not_overwritten(whole: Path, flags: list[str], capsys) -> None:
    assert adapt.main([*flags, "--output", str(whole)]) == 2
    assert "has full, moba, hybrid already: go on with --resume" in capsys.readouterr().err


def test_runs_trained_apart_are_those_trained_together(whole: Path, flags: list[str], tmp_path: Path, capsys) -> None:
    """One after another; runs with other settings are refused and leave nothing behind."""
    command = [*flags, "--output", str(tmp_path / "run")]
    assert adapt.main([*command, "--runs", "hybrid", "full"]) == 0
    assert "done with full, hybrid; results are printed once moba can be compared with them\n" in capsys.readouterr().out
    assert adapt.main([*command, "--runs", "moba", "--seed", "1"]) == 2
    assert "these must not change: seed was 0 and is 1\n" in capsys.readouterr().err and not (tmp_path / "run/moba").exists()
    assert adapt.main([*command, "--runs", "moba"]) == 0
    table = capsys.readouterr().out.partition("nats per token")[2].partition("\n\n")[0].splitlines()[1:]
    assert [re.split("  +", line)[0] for line in table] == list(adapt.ROWS)
    assert logs(tmp_path / "run") == logs(whole)
    assert results(tmp_path / "run")["loss"] == results(whole)["loss"]


def test_two_processes_that_start_together_share_the_runs(whole: Path, flags: list[str], tmp_path: Path) -> None:
    command, outs = [adapt.__file__, *flags, "--output", str(tmp_path / "run"), "--runs"], [tmp_path / "one", tmp_path / "other"]
    starts = [([*command, *runs], dict(os.environ), out) for runs, out in zip((["full"], ["moba", "hybrid"]), outs)]
    with Script(*starts[0]) as one, Script(*starts[1]) as other:
        assert [one.wait(300), other.wait(300)] == [0, 0], [out.read_text() for out in outs]
    said = [out.read_text() for out in outs]
    assert any("nats per token" in out for out in said) and all("nats per token" in out or "done with" in out for out in said)
    for name in adapt.RUNS:
        for here, there in zip(log(tmp_path / "run", name), log(whole, name), strict=True):
            assert here == pytest.approx(there, rel=1e-5), name
    loss, expected = results(tmp_path / "run")["loss"], results(whole)["loss"]
    for row in adapt.ROWS:
        assert loss[row] == {kind: pytest.approx(expected[row][kind], rel=1e-5) for kind in package_text.KINDS}, row


def test_nothing_that_is_written_into_the_results_at_once_is_lost(flags: list[str], tmp_path: Path) -> None:
    def add(i: int) -> None:
        with adapt.Output(adapt.parse([*flags, "--output", str(tmp_path)])).results() as results:
            results["loss"][str(i)] = i

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert results(tmp_path)["loss"] == {str(i): i for i in range(24)}


def test_a_run_that_another_process_is_at_work_on_is_left_alone(whole: Path, flags: list[str], capsys) -> None:
    command = [*flags, "--output", str(whole), "--resume"]
    with adapt.Output(adapt.parse(command)).hold("moba"):
        assert adapt.main(command) == 2
        assert f"another process is at work on {whole / 'moba'}: leave moba out of --runs" in capsys.readouterr().err
        assert adapt.main([*command, "--runs", "full", "hybrid"]) == 0
    assert adapt.main(command) == 0


def test_a_longer_context_is_kept_with_the_adapter_and_is_what_was_measured(
    longer: Path, byte_llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Held against a model that had this context when it was loaded."""
    tokenizer, model = AutoTokenizer.from_pretrained(byte_llama), AutoModelForCausalLM.from_pretrained(byte_llama)
    context = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "max_position_embeddings": 1200}
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_llama, **context), str(longer / "moba/adapter")).eval()
    ids = torch.cat([needle.tokens(document.text, tokenizer) for document in package_text.collect([text_folder], 60)["prose"].train])
    adapted = models.with_adapter(model, longer / "moba/adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids[None, :1200]).logits, expected(ids[None, :1200]).logits)
    assert needle.default_lengths(adapted) == [150, 300, 600, 1200]
    adapter, beyond = str(longer / "moba/adapter"), ["--lengths", "1200", "--depths", "0", "--trials", "1", "--text", str(text_folder)]
    sides = ["--base", str(byte_llama), "--moba", adapter, "--full", adapter, "--device", "cpu"]
    assert needle.main([*sides, *beyond, "--output", str(tmp_path)]) == 0

    moba_flex.patch(expected, **BLOCKS, implementation="naive")
    file = results(longer)["held_out_files"]["code"][:2]
    documents = {document.name: document.text for document in package_text.collect([text_folder], 60)["code"].held_out}
    row = torch.tensor([x for name in file for x in [*tokenizer(documents[name]).input_ids, 256]][:1200])
    with torch.no_grad():
        loss = cross_entropy(expected(input_ids=row[None, :-1], use_cache=False).logits[0], row[1:])
    assert results(longer)["loss"]["moba"]["code"][0] == pytest.approx(loss.item(), rel=1e-5)
    assert log(longer, "moba")[-1][1] < log(longer, "moba")[0][1] - 0.1


def test_the_demo_reads_beyond_the_model_s_own_context_with_such_an_adapter(longer: Path, byte_llama: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompt.txt").write_text("abcdefgh " * 125)
    command = ["--model", str(byte_llama), "--prompt-file", str(tmp_path / "prompt.txt"), "--block-size", "32", "--top-k", "3"]
    command += ["--max-new-tokens", "2", "--device", "cpu"]
    assert llama.main(command) == 2 and "do not fit into the model's context of 1,024" in capsys.readouterr().err
    assert llama.main([*command, "--adapted", str(longer / "moba/adapter")]) == 0


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)),
        Gemma3ForCausalLM(Gemma3TextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, head_dim=8, vocab_size=8)),
    ],
    ids=["no rotary embedding", "one a kind of layer"],
)
def test_a_model_whose_layers_share_no_rotary_embedding_keeps_its_context(model) -> None:
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=rf"the layers of {type(model).__name__} do not share one rotary embedding"):
        models.extend_context(model, 1e6, 4096)
    assert model.config.to_dict() == before


def test_the_demo_reads_with_the_adapter(whole: Path, byte_llama: Path, text_folder: Path, capsys) -> None:
    command = ["--model", str(byte_llama), "--prompt-file", str(text_folder / "0.md"), "--block-size", "32", "--top-k", "3"]
    command += ["--max-new-tokens", "2", "--device", "cpu", "--compare"]
    said = []
    for more in ([], ["--adapted", str(whole / "moba/adapter")]):
        assert llama.main([*command, *more]) == 0
        said.append(float(re.search(r"mean log-likelihood, MoBA +(\S+)", capsys.readouterr().out)[1]))
    assert said[1] > said[0] + 0.1


def test_the_demo_reads_as_the_adapter_was_trained_unless_flags_say_otherwise(whole: Path) -> None:
    def settings(name: str, *more: str) -> moba_flex.MobaConfig:
        return llama.settings_of(llama.parse(["--adapted", str(whole / name / "adapter"), *more]))

    assert settings("moba") == moba_flex.MobaConfig(**BLOCKS)
    assert settings("hybrid") == moba_flex.MobaConfig(**BLOCKS, full_attention_layers=(-3, -2, -1))
    changed = settings("hybrid", "--top-k", "5", "--full-attention-layers", "0")
    assert changed == moba_flex.MobaConfig(**{**BLOCKS, "top_k": 5}, full_attention_layers=(0,))
    assert settings("full") == moba_flex.MobaConfig(**llama.DEFAULTS)


def test_the_adapter_of_the_repository_has_the_settings_that_are_the_default_of_its_recipe() -> None:
    expected = moba_config("hybrid", adapt.parse(["--output", "anywhere"]))
    assert llama.settings_of(llama.parse(["--adapted"])) == expected
    assert moba_config("hybrid", adapt.parse(["--output", "anywhere", "--model", "another"])).full_attention_layers == (-3, -2, -1)


def test_the_demo_says_where_an_adapter_is_missing_or_does_not_fit(whole: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    for folder, words in (
        (tmp_path, f"there is no adapter in {tmp_path}: name the folder of one that adapt.py trained"),
        (whole / "moba/adapter", "fit"),
    ):
        assert llama.main(["--model", str(tiny), "--adapted", str(folder), "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err


def test_every_machine_holds_out_the_same_files(text_folder: Path, tmp_path: Path) -> None:
    """And no file is both held out and trained on."""
    every = package_text.collect([text_folder], 60)
    for file in sorted(text_folder.glob("*"))[::3]:
        shutil.copy(file, tmp_path)
    some = package_text.collect([tmp_path], 60)
    for kind in package_text.KINDS:
        train, held_out = ({document.name for document in part} for part in (every[kind].train, every[kind].held_out))
        assert len(train) + len(held_out) == 120 and not train & held_out and 4 <= len(held_out) <= 24
        assert {document.name for document in some[kind].train} < train
        assert {document.name for document in some[kind].held_out} < held_out


def test_a_copy_with_a_few_lines_changed_is_left_out_and_never_leaks_what_is_held_out(text_folder: Path, tmp_path: Path) -> None:
    for file in text_folder.glob("*.md"):
        lines = file.read_text().splitlines()
        for copy in range(3):
            (tmp_path / f"{copy}-{file.name}").write_text("\n".join([f"Copyright {copy} Somebody", *lines[copy:]]))
    split = package_text.collect([tmp_path], 60)["prose"]
    first_words = [document.text.splitlines()[-1] for document in (*split.train, *split.held_out)]
    assert len(first_words) == len(set(first_words)) == 120


def test_of_a_package_s_metadata_only_the_description_is_read(tmp_path: Path) -> None:
    description = "\n".join(f"{word} is what this package is all about, among other things." for word in "abcdefghijkl")
    (tmp_path / "METADATA").write_text(f"Name: package\nVersion: 1\n\n{description}")
    split = package_text.collect([tmp_path], 1)["prose"]
    assert [document.text for document in (*split.train, *split.held_out)] == [description]
