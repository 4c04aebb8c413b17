"""examples/needle.py: facts are where they should be, a cell is right where the value is read, and a stop changes no number."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import needle
import pytest
import torch
from matplotlib.image import imread
from pretraining.corpus import corpus
from shared.package_text import KINDS, collect
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_flex

LENGTHS, DEPTHS = [300, 400], [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def tokenizer(byte_llama: Path):
    return AutoTokenizer.from_pretrained(byte_llama)


@pytest.fixture(scope="module")
def flags(byte_llama: Path, text_folder: Path) -> list[str]:
    grid = ["--lengths", *map(str, LENGTHS), "--depths", *map(str, DEPTHS), "--trials", "2"]
    return [*grid, "--text", str(text_folder), "--base", str(byte_llama), "--device", "cpu", "--block-size", "32", "--top-k", "3"]


class Reader:
    """Answers with the code that comes first among the last `reach` tokens of a prompt: six digits, or six zeros where it sees none."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reach: int) -> None:
        self._tokenizer, self._reach = tokenizer, reach

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        self.options, answers = options, []
        for row in ids:
            _, said, after = self._tokenizer.decode(row[-self._reach :]).partition(" is ")
            answers.append(needle.tokens(f" {after[:6] if said else '000000'}", self._tokenizer))
            assert len(answers[-1]) == max_new_tokens
        return torch.cat([ids, torch.stack(answers)], 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [300, 1023])
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_lies_at_its_depth_and_prompt_and_answer_have_the_length(tokenizer, length: int, depth: float) -> None:
    fact, text = needle.Fact("zoruma", "839201"), needle.tokens("straw " * 200, tokenizer)
    prompt, answer = needle.haystack(text, fact, length, depth, tokenizer)
    assert len(prompt) + len(answer) == length and tokenizer.decode(answer) == " 839201"
    before, found, after = tokenizer.decode(prompt).partition("\nThe secret code of zoruma is 839201.\n")
    straw, question, end = after.partition("\nQuestion: What is the secret code of zoruma?\nAnswer: The secret code of zoruma is")
    assert found and question and not end and (before + straw) == ("straw " * 200)[: len(before + straw)]
    assert abs(len(before) - depth * len(before + straw)) <= 0.5


@pytest.mark.parametrize("length", [100, 2000])
def test_a_length_without_room_or_text_is_refused(tokenizer, length: int) -> None:
    with pytest.raises(ValueError, match=f"length must be from .* tokens, but is {length}"):
        needle.haystack(needle.tokens("straw " * 200, tokenizer), needle.Fact("zoruma", "839201"), length, 0.5, tokenizer)


@pytest.mark.parametrize("length", [600, 1500, 8000])
def test_a_training_sequence_states_every_fact_before_it_asks_for_it(tokenizer, length: int) -> None:
    filler = needle.tokens("straw " * (length // 6 + 1), tokenizer)[:length]
    made = needle.training_sequence(filler, tokenizer, generator(3))
    assert made.shape == filler.shape and made.dtype == filler.dtype
    assert made.equal(needle.training_sequence(filler, tokenizer, generator(3)))
    assert not made.equal(needle.training_sequence(filler, tokenizer, generator(4)))
    text, *endings = tokenizer.decode(made).split("\nQuestion: What is the secret code of ")
    assert 1 <= len(endings) <= needle.MOST_FACTS and len(endings) == text.count("The secret code") and (length < 8000 or len(endings) == 8)
    for ending in endings:
        assert ending.partition("Answer: ")[2] in text
    facts = [f"\nThe secret code of {ending.partition('is ')[0].partition('?')[0]} is {ending[-6:]}.\n" for ending in endings]
    for fact in facts:
        assert text.count(fact) == 1
        text = text.replace(fact, "")
    assert text == tokenizer.decode(filler)[: len(text)]


@pytest.mark.parametrize("seed", range(4))
def test_a_training_sequence_may_ask_for_each_fact_anywhere_after_it(tokenizer, seed: int) -> None:
    filler = needle.tokens("straw " * 900, tokenizer)[:5000]
    made = needle.training_sequence(filler, tokenizer, generator(seed), 12, "anywhere")
    assert made.shape == filler.shape and made.dtype == filler.dtype
    assert made.equal(needle.training_sequence(filler, tokenizer, generator(seed), 12, "anywhere"))
    text = tokenizer.decode(made)
    facts = re.findall(r"\n(The secret code of (\w+) is \d{6})\.\n", text)
    assert len(facts) == 12
    places = []
    for statement, key in facts:
        question = f"\nQuestion: What is the secret code of {key}?\nAnswer: {statement}"
        assert text.count(question) == 1 and text.index(f"\n{statement}.\n") < text.index(question)
        places.append(text.index(question))
    assert sum(place < 3500 for place in places) > 2 and places != sorted(places)
    for statement, key in facts:
        text = text.replace(f"\n{statement}.\n", "").replace(f"\nQuestion: What is the secret code of {key}?\nAnswer: {statement}", "")
    assert text == tokenizer.decode(filler)[: len(text)]


def test_a_long_training_sequence_has_as_many_facts_as_are_asked_for(tokenizer) -> None:
    filler = needle.tokens("straw " * 3400, tokenizer)[:20_000]
    made = [needle.training_sequence(filler, tokenizer, generator(3), *most) for most in ((), (8,), (20,))]
    assert made[0].equal(made[1])
    text = tokenizer.decode(made[2])
    assert [text.count(words) for words in ("\nThe secret code", "\nQuestion: What is the secret code")] == [20, 20]


def test_a_training_sequence_needs_text_around_its_facts(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"filler must have at least .* tokens, three times those of a fact, but has 100"):
        needle.training_sequence(torch.zeros(100, dtype=torch.long), tokenizer, generator(0))


def test_the_text_around_a_needle_is_held_out_from_continued_training_and_from_pretraining(text_folder: Path, tmp_path: Path) -> None:
    found = needle.held_out_files([text_folder], 10**6)
    assert {document.text for document in found} == {
        path.read_text() for path in text_folder.iterdir() if int(hashlib.sha256(path.read_bytes()).hexdigest()[:8], 16) % 50 == 0
    }
    names = {document.name for document in found}
    assert names and names == set(corpus(tmp_path, [text_folder]).description["held_out"]["sha256"])
    documents = collect([text_folder], megabytes=1)
    assert names < {document.name for kind in KINDS for document in documents[kind].held_out}


def test_a_cell_is_right_where_the_value_is_within_reach(tokenizer) -> None:
    text, args = needle.tokens("straw " * 300, tokenizer), SimpleNamespace(seed=0, trials=3, full_tail=0)
    for depth, reach, right in ((0.0, 1000, True), (0.0, 500, False), (1.0, 500, True), (0.5, 700, True), (0.5, 300, False)):
        found = needle.score(Reader(tokenizer, reach), tokenizer, text, 1000, depth, args)
        assert found == [right] * 3, f"depth {depth}, reach {reach}"


@pytest.mark.parametrize(("full_tail", "kept"), [(0, None), (24, 25)])
def test_the_end_of_a_prompt_may_read_all_keys(tokenizer, full_tail: int, kept: int | None) -> None:
    text, reader = needle.tokens("straw " * 300, tokenizer), Reader(tokenizer, 1000)
    args = SimpleNamespace(seed=0, trials=1, full_tail=full_tail)
    assert needle.score(reader, tokenizer, text, 1000, 0.5, args) == [True] and reader.options.get("logits_to_keep") == kept


def test_trials_with_answers_of_different_lengths_keep_their_order(tokenizer, monkeypatch) -> None:
    facts, batches = iter([needle.Fact("baba", value) for value in ("1", "22", "3", "44")]), []

    def finds(_, prompts, answers, full_tail):
        batches.append(len(prompts))
        return [tokenizer.decode(row) in (" 22", " 3") for row in answers]

    monkeypatch.setattr(needle.Fact, "random", lambda _: next(facts))
    monkeypatch.setattr(needle, "finds", finds)
    text, args = needle.tokens("straw " * 300, tokenizer), SimpleNamespace(seed=0, trials=4, full_tail=0)
    assert needle.score(None, tokenizer, text, 1000, 0.5, args) == [False, True, True, False] and batches == [2, 2]


def test_greedy_decoding_after_the_prompt_must_give_every_token_of_the_answer(byte_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(byte_llama).eval()
    model.generation_config.eos_token_id = None
    ids = prompts = torch.randint(0, 256, (4, 90), generator=generator(0))
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(1, keepdim=True)], 1)
    answers = ids[:, 90:]
    assert needle.finds(model, prompts, answers) == [True] * 4
    answers[1, -1] += 1
    answers[2, 0] += 1
    assert needle.finds(model, prompts, answers) == [True, False, False, True]
    model.generation_config.eos_token_id = answers[0, 1].item()
    assert needle.finds(model, prompts[:1], answers[:1]) == [False], "it ends before the answer does"


def test_from_beginning_to_end_and_again_after_a_stop(flags: list[str], byte_llama: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert needle.main([*flags, "--moba", str(byte_llama), "--full", str(byte_llama), "--output", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    whole = json.loads((tmp_path / "whole/needle.json").read_text())
    cells = [needle.key(length, depth) for length in LENGTHS for depth in DEPTHS]
    assert all(list(whole["right"][side]) == cells for side in needle.SIDES)
    assert whole["models"]["full"]["moba"] is None and whole["models"]["moba"]["moba"]["block_size"] == 32
    assert "cells always right, full attention     0 of 6" in said
    assert imread(tmp_path / "whole/needle.png").ndim == 3

    score, scored = needle.score, []

    def killed(*arguments):
        if len(scored) == 8:
            raise KeyboardInterrupt
        scored.append(arguments[3:5])
        return score(*arguments)

    command = [*flags, "--moba", str(byte_llama), "--full", str(byte_llama), "--output", str(tmp_path / "stopped")]
    monkeypatch.setattr(needle, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        needle.main(command)
    monkeypatch.undo()
    assert needle.main(command) == 2 and "go on with --resume" in capsys.readouterr().err
    assert needle.main([*command, "--resume", "--seed", "1"]) == 2 and "seed was 0 and is 1" in capsys.readouterr().err
    assert needle.main([*command, "--resume", "--block-size", "16"]) == 2
    assert "cannot be continued: of moba, moba was {'block_size': 32" in capsys.readouterr().err
    other = AutoModelForCausalLM.from_pretrained(byte_llama)
    torch.nn.init.zeros_(other.lm_head.weight)
    other.save_pretrained(tmp_path / byte_llama.parent.name / byte_llama.name)  # other weights in folders of the same names
    shutil.copytree(
        byte_llama, tmp_path / byte_llama.parent.name / byte_llama.name, ignore=lambda *_: ["model.safetensors"], dirs_exist_ok=True
    )
    renamed = [tmp_path / byte_llama.parent.name / byte_llama.name if x == str(byte_llama) else x for x in command]
    assert needle.main([*map(str, renamed), "--resume"]) == 2 and "of moba, weights was" in capsys.readouterr().err
    assert needle.main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "stopped/needle.json").read_text()) == whole


def test_both_sides_get_the_same_prompts_and_one_reads_sparsely(flags: list[str], byte_llama: Path, tmp_path: Path, monkeypatch) -> None:
    prompts: dict[str, list] = {"moba": [], "full": []}

    def finds(model, rows, answers, full_tail):
        prompts["moba" if model.config._attn_implementation == "moba" else "full"] += zip(rows.tolist(), answers.tolist())
        return [False] * len(rows)

    monkeypatch.setattr(needle, "finds", finds)
    assert needle.main([*flags, "--moba", str(byte_llama), "--full", str(byte_llama), "--output", str(tmp_path)]) == 0
    assert prompts["moba"] == prompts["full"] and len(prompts["moba"]) == 2 * len(LENGTHS) * len(DEPTHS)
    assert len({str(prompt) for prompt in prompts["full"]}) == len(prompts["full"])


def test_the_settings_of_moba_are_those_saved_with_the_model(byte_llama: Path, tokenizer, text_folder: Path, tmp_path: Path) -> None:
    model = moba_flex.patch(AutoModelForCausalLM.from_pretrained(byte_llama), block_size=48, top_k=4, full_attention_layers=[-1])
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    args = needle.parse(["--moba", str(tmp_path / "saved"), "--full", str(tmp_path / "saved"), "--output", "-", "--device", "cpu"])
    model, _, settings = needle.load_side("moba", args)
    assert model.config.moba == moba_flex.MobaConfig(block_size=48, top_k=4, full_attention_layers=[-1]) and settings["top_k"] == 4
    assert needle.load_side("full", args)[0].config._attn_implementation != "moba"
    assert needle.default_lengths(model) == [128, 256, 512, 1024]


def test_the_heat_map_has_lengths_to_the_right_and_depths_downwards_and_names_what_is_shown() -> None:
    right = {
        side: {needle.key(length, depth): [depth < 0.7, length == 300 or side == "full"] for length in LENGTHS for depth in DEPTHS}
        for side in needle.SIDES
    }
    models = {"moba": {"model": "checkpoints/50M-32768-moba-last-3-full-b512k3-seed0"}, "full": {"model": "full/adapter"}}
    figure = needle.heat_map({"asked": {"lengths": LENGTHS, "depths": DEPTHS}, "models": models, "right": right})
    moba, full = figure.axes[:2]
    assert moba.images[0].get_array().tolist() == [[100.0, 50.0], [100.0, 50.0], [50.0, 0.0]]
    assert full.images[0].get_array().tolist() == [[100.0, 100.0], [100.0, 100.0], [50.0, 50.0]]
    assert [label.get_text() for label in moba.get_xticklabels()] == ["300", "400"]
    assert [label.get_text() for label in moba.get_yticklabels()] == ["0%", "50%", "100%"]
    model = "50M parameters, 32,768 tokens, seed 0\ntrained with MoBA, last 3 layers full (block 512, top-3)"
    assert moba.get_title() == f"read with MoBA: 7 of 12 right\n{model}"
    assert full.get_title() == "read with full attention: 10 of 12 right\nadapter of run full"
    assert figure.axes[2].get_ylabel() == "trials with the right answer, %"


@pytest.mark.parametrize(
    ("model", "moba", "words"),
    [
        ("checkpoints/10M-8192-full-seed2", None, "10M parameters, 8,192 tokens, seed 2\ntrained with full attention"),
        ("moba/adapter", {"block_size": 64, "top_k": 24}, "adapter of run moba\nblock 64, top-24"),
        (
            "examples/adapter",
            {"block_size": 64, "top_k": 24, "full_attention_layers": [17, 20]},
            "the adapter in examples/adapter\nblock 64, top-24, full attention in layers 17, 20",
        ),
        ("SmolLM2-135M-Instruct", None, "SmolLM2-135M-Instruct"),
    ],
)
def test_a_picture_calls_a_model_by_words_and_by_no_path(model: str, moba: dict | None, words: str) -> None:
    assert needle.in_words(model, moba) == words


def test_cells_that_moba_alone_misses_are_named(capsys) -> None:
    right = {"full": {"300 tokens, depth 0": [True], "400 tokens, depth 0": [True]}}
    right["moba"] = {"300 tokens, depth 0": [True], "400 tokens, depth 0": [False]}
    needle.report({"asked": {"lengths": LENGTHS, "depths": [0.0]}, "right": right})
    out = capsys.readouterr().out
    assert "right with full attention only         1\n    400 tokens, depth 0: MoBA 0%" in out and "300 tokens" not in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--trials", "0"], "--trials: must be at least 1, but is 0"),
        (["--full-tail", "-1"], "--full-tail: must be at least 0, but is -1"),
        (["--depths", "0.5", "50"], "--depths: must be from 0 to 1, but is 50"),
        (["--lengths", "100"], "length must be from"),
        (["--lengths", "5"], "length must be from"),
        (["--lengths", "300", "5000"], "--lengths has 5,000, but the context of --moba's model is 1,024 tokens"),
        (["--output", __file__], f"argument --output: cannot write to the folder {__file__}: Not a directory"),
        (["--text", "nowhere"], "text is read from folders, but nowhere is none"),
        (["--top-k", "0"], "argument --top-k: must be at least 1, but is 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(flags: list[str], byte_llama: Path, tmp_path: Path, more, words: str, capsys) -> None:
    assert needle.main([*flags, "--moba", str(byte_llama), "--full", str(byte_llama), "--output", str(tmp_path / "run"), *more]) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith("needle.py: error: ") and words in line], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "the model of --moba has no settings of MoBA saved with it: give --block-size and --top-k"),
        (["--block-size", "8", "--top-k", "1", "--sink-blocks", "4"], "these flags do not fit together: --top-k=1 has no room"),
        (["--block-size", "8", "--top-k", "2", "--text", "nowhere"], "argument --text: text is read from folders, but nowhere is none"),
    ],
)
def test_flags_are_checked_before_a_model_is_loaded(byte_llama: Path, tmp_path: Path, monkeypatch, capsys, more, words: str) -> None:
    monkeypatch.setattr(needle, "load", lambda *_: pytest.fail("loaded"))
    assert needle.main(["--moba", str(byte_llama), "--output", str(tmp_path / "run"), *more]) == 2
    assert capsys.readouterr().err.startswith(f"needle.py: error: {words}")
