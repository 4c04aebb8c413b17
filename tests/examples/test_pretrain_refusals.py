"""What examples/experiments/pretrain.py refuses: flags that cannot be, files that it cannot read, and logs of other settings."""

from __future__ import annotations

import json
import re
import shutil

import pretrain
import pytest
from pretraining.compare import group
from pretraining.runs import complete
from shared.command_line import UserError
from support.pretrain_runs import arguments

pytestmark = pytest.mark.usefixtures("signals_as_before")


# Flags


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--needle-share", "1.5"], "--needle-share: must be from 0 to 1, but is 1.5"),
        (["--needle-facts", "0"], "--needle-facts: must be at least 1, but is 0"),
        (["--needle-share", "0.1", "--context", "256"], "--context must be at least 512 for --needle-share, but is 256"),
        (["--context", "0"], "--context: must be at least 1, but is 0"),
        (["--tokens", "0"], "--tokens: must be finite and above 0, but is 0"),
        (["--tokens", "inf"], "--tokens: must be finite and above 0, but is inf"),
        (["--blocks", "4", "0"], "--blocks: must be at least 1, but is 0"),
        (["--learning-rate", "nan"], "--learning-rate: must be finite and above 0, but is nan"),
        (["--weight-decay", "-1"], "--weight-decay: must be finite and at least 0, but is -1"),
        (["--clip", "-1"], "--clip: must be above 0, but is -1"),
        (["--warmup", "-1"], "--warmup: must be at least 0, but is -1"),
        (["--checkpoint-minutes", "-1"], "--checkpoint-minutes: must be at least 0, but is -1"),
        (["--budget-seconds", "nan"], "--budget-seconds: must be at least 0, but is nan"),
        (["--runs"], "there is nothing to run: name some --runs, or numbers of --blocks"),
        (["--plot", "losses.png"], "--plot: goes with --compare"),
    ],
)
def test_a_flag_that_cannot_be_is_refused(text, tmp_path, more, words):
    with pytest.raises(UserError, match=re.escape(words)):
        arguments(tmp_path, text, *more)


def test_a_batch_that_is_not_whole_contexts_is_refused():
    with pytest.raises(UserError, match="--batch-tokens must be a multiple of 8192"):
        pretrain.parse(["--context", "8192", "--batch-tokens", "10000"])


def test_a_context_longer_than_the_text_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"--context is 131072, but a half of the text in .* has only \d+ tokens"):
        pretrain.pretrain(arguments(tmp_path, text, "--context", "131072", "--batch-tokens", "131072"))


# Files


def test_files_that_cannot_be_read_or_written_are_named(trained, words, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    log = tmp_path / "logs/toy-128-moba-b16k3-seed0.json"
    log.write_text("{")
    with pytest.raises(UserError, match=r"seed0\.json is no log of this script: delete it, or choose another --output"):
        pretrain.pretrain(arguments(tmp_path, words, "--runs", "moba"))
    log.unlink()
    (tmp_path / "checkpoints/toy-128-moba-b16k3-seed0.pt").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"seed0\.pt cannot be read: delete it to begin this run anew"):
        pretrain.pretrain(arguments(tmp_path, words, "--runs", "moba"))
    for flag in ("--output", "--checkpoints"):
        with pytest.raises(UserError, match=f"argument {flag}: cannot write to the folder"):
            pretrain.pretrain(arguments(tmp_path, words, "--runs", "moba", flag, __file__))


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"x\.json is no log of pretrain"):
        pretrain.compare([tmp_path / "x.json"])


def test_other_settings_under_the_same_name_are_refused(trained, words):
    with pytest.raises(UserError, match=r"learning_rate was 0.004 and is 0.5"):
        pretrain.pretrain(arguments(trained, words, "--runs", "moba", "--learning-rate", "0.5"))


def test_a_log_from_before_a_setting_has_what_was_so_then(trained, words, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    file = tmp_path / "logs" / "toy-128-moba-b16k3-seed0.json"
    log = json.loads(file.read_text())
    assert log["settings"].pop("needle_share") == 0.0
    file.write_text(json.dumps(log))
    assert pretrain.pretrain(arguments(tmp_path, words, "--runs", "moba")) == 0  # which is done
    command = arguments(tmp_path, words, "--runs", "moba")
    command.needle_share = 0.1
    with pytest.raises(UserError, match=r"needle_share was 0.0 and is 0.1"):
        pretrain.pretrain(command)
    ((_, runs),) = group([json.loads(file.read_text()) for file in (tmp_path / "logs").glob("*.json")]).items()
    assert sorted(runs["moba (16, top-3)"]) == [0, 1]
    del log["settings"]["optimizer"]
    file.write_text(json.dumps(log))
    with pytest.raises(UserError, match=r"optimizer was adamw and is muon"):
        pretrain.pretrain(arguments(tmp_path, words, "--runs", "moba"))


def test_how_facts_are_asked_for_counts_where_there_are_some():
    without = {"needle_share": 0.0, "optimizer": "muon"}
    assert complete({**without, "needle_facts": 8, "needle_questions": "end"}) == complete(without) == without
    some = {"needle_share": 0.1, "optimizer": "muon"}
    before = {**some, "needle_facts": 8, "needle_questions": "end"}
    assert complete(some) == before  # which the first of such logs do not say
    assert complete({**before, "needle_questions": "anywhere"}) == {**before, "needle_questions": "anywhere"}
