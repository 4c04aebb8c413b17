"""The text of examples/experiments/pretrain.py: split by file, every window read once in an epoch, and facts in a share of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretraining.batches import Batches, order
from pretraining.corpus import Corpus, corpus, windows
from shared.command_line import UserError
from support.pretrain_runs import STDLIB, WITH_FACTS, arguments
from tokenizers import Tokenizer


def test_text_is_split_by_file_and_survives_tokenising(text):
    found, tokenizer = Corpus(text), Tokenizer.from_file(str(text / "tokenizer.json"))
    counts = found.description
    assert counts["train"]["files"] > 10 * counts["held_out"]["files"] > 0
    assert (len(found.train), len(found.held_out)) == (counts["train"]["tokens"], counts["held_out"]["tokens"])
    first = windows(found.held_out, torch.tensor([0]), 100)[0]
    file = tokenizer.decode(first.tolist())
    assert any(file[:80] in path.read_text(errors="ignore") for folder in STDLIB for path in folder.rglob("*.py"))


def test_equal_files_count_once_and_hashes_name_the_held_out_ones(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for i in range(200):
        (sources / f"a{i}.py").write_text(f"x = {i}\n" * 20)
        (sources / f"b{i}.py").write_text(f"x = {i}\n" * 20)
    (sources / "binary.py").write_bytes(b"\xff\xfe\x00")
    counts = corpus(tmp_path / "tokens", [sources]).description
    assert counts["train"]["files"] + counts["held_out"]["files"] == 200
    assert all(int(name[:8], 16) % 50 == 0 for name in counts["held_out"]["sha256"])
    assert corpus(tmp_path / "tokens").fingerprint == counts["fingerprint"]  # what is there is not made again


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "one.py").write_text("x = 1")
    with pytest.raises(UserError, match="only 1 different source files"):
        corpus(tmp_path / "tokens", [tmp_path])
    assert not (tmp_path / "tokens").exists()


def test_text_that_was_collected_otherwise_is_not_taken_for_what_is_asked_for(text_folder, tmp_path):
    with pytest.raises(UserError, match="--sources: there is no folder nowhere"):
        corpus(tmp_path / "text", [Path("nowhere")])
    made = corpus(tmp_path / "text", [text_folder])
    assert corpus(tmp_path / "text", [text_folder]).fingerprint == corpus(tmp_path / "text").fingerprint == made.fingerprint
    with pytest.raises(UserError, match=r"was collected otherwise: sources was .* and is .*tests.*most_bytes was None and is 5"):
        corpus(tmp_path / "text", [Path(__file__).parent], 5)
    (tmp_path / "text/train.bin").write_bytes(b"ab")
    with pytest.raises(UserError, match=r"has no whole text: delete it, .* train\.bin has 1 tokens instead of \d+"):
        corpus(tmp_path / "text")


def test_windows_follow_one_another_and_share_one_token():
    tokens = torch.arange(40_000, 40_021).to(torch.int16)
    assert windows(tokens, torch.tensor([0, 2]), 5).tolist() == [[*range(40_000, 40_006)], [*range(40_010, 40_016)]]


def test_an_epoch_reads_each_window_once():
    got = torch.stack([order(7, epoch, seed=0) for epoch in range(3)])
    assert (got.sort(1).values == torch.arange(7)).all() and len({tuple(row) for row in got.tolist()}) == 3


def test_batches_go_through_the_windows_in_the_order_of_each_epoch(text, tmp_path):
    found, args = Corpus(text), arguments(tmp_path, text, "--batch-tokens", "512")
    n = (len(found.train) - 1) // 128
    last = n // 4  # a batch has 4 windows; this one reaches into the second epoch
    numbers = torch.cat([order(n, 0, seed=3), order(n, 1, seed=3)])
    for step in (0, 5, last):
        assert Batches(found, args, seed=3).batch(step).equal(windows(found.train, numbers[4 * step : 4 * step + 4], 128))


def test_a_share_of_the_windows_has_facts_and_the_others_are_as_without(text, tmp_path):
    found = Corpus(text)
    share = {x: Batches(found, arguments(tmp_path, text, *WITH_FACTS, "--needle-share", x), seed=1) for x in ("0", "0.5", "1")}
    plain, some, every = (torch.cat([batches.batch(step) for step in range(50)]) for batches in share.values())
    with_facts = [row for row, (x, y) in enumerate(zip(plain, some)) if not x.equal(y)]
    assert 35 < len(with_facts) < 65 and some[with_facts].equal(every[with_facts])
    for row in range(100):
        asked = found.tokenizer.decode(every[row]).count("\nQuestion: What is the secret code of")
        assert asked >= 1 and "secret code" not in found.tokenizer.decode(plain[row])
    assert share["0.5"].batch(7).equal(some[14:16])  # whatever was read before
    two = Batches(found, arguments(tmp_path, text, *WITH_FACTS, "--needle-share", "1", "--needle-facts", "2"), seed=1).batch(0)
    assert [found.tokenizer.decode(row).count("\nQuestion: What is the secret code of") for row in two] == [2, 2]
    assert all("\nQuestion: What is the secret code of" in found.tokenizer.decode(row[:600]) for row in every[:2])
    at_end = arguments(tmp_path, text, *WITH_FACTS, "--needle-share", "1", "--needle-questions", "end")
    for row in Batches(found, at_end, seed=1).batch(0):
        assert "\nQuestion" not in found.tokenizer.decode(row[:600]) and "\nQuestion" in found.tokenizer.decode(row[600:])
    assert len({str(row) for row in every.tolist()}) == 100
