"""examples/experiments/pretrain.py: runs differ in their attention alone, resume to the same losses, and are compared."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import needle
import pretrain
import pytest
import torch
from pretraining import captured
from pretraining.batches import Batches, order
from pretraining.compare import differences, draw, draw_sweep, group, held_out, table
from pretraining.corpus import Corpus, corpus, windows
from pretraining.optimizer import Muon, MuonAndAdamW
from pretraining.runs import NAMES, SIZES, complete, named, new_model, of_blocks
from shared.command_line import UserError
from shared.compiled_layers import compile_layers
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moba_flex

STDLIB = Path(os.__file__).parent / "json", Path(os.__file__).parent / "email", Path(os.__file__).parent / "encodings"
TOY = ["--cpu", "--size", "toy", "--context", "128", "--batch-tokens", "256", "--micro-tokens", "128", "--tokens", str(256 * 12)]
TOY += ["--block-size", "16", "--top-k", "3", "--held-out-tokens", "512"]
WITH_FACTS = ["--context", "1024", "--batch-tokens", "2048", "--micro-tokens", "1024", "--tokens", str(2048 * 6), "--needle-share", "0.5"]


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder, list(STDLIB))
    return folder


@pytest.fixture(scope="module")
def words(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that is the same with any version of Python, so that losses are too."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder, [text_folder])
    return folder


@pytest.fixture(scope="module")
def trained(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs and a sweep, for two seeds; the logs are in `logs`, the models in `checkpoints`, what the bars showed in `progress`."""
    folder = tmp_path_factory.mktemp("trained")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stderr((folder / "progress").open("w")):
        assert pretrain.pretrain(arguments(folder, words, "--runs", *NAMES, "--blocks", "4", "8")) == 0
    assert pretrain.pretrain(arguments(folder, words, "--runs", "full", "moba", "--seeds", "1")) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def arguments(folder: Path, text: Path, *more: str):
    return pretrain.parse(
        [*TOY, "--corpus", str(text), "--output", str(folder / "logs"), "--checkpoints", str(folder / "checkpoints"), *more]
    )


def logs(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "logs").glob("*.json"))}


# Text


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


def test_a_context_longer_than_the_text_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"--context is 131072, but a half of the text in .* has only \d+ tokens"):
        pretrain.pretrain(arguments(tmp_path, text, "--context", "131072", "--batch-tokens", "131072"))


# Models and runs


@pytest.mark.parametrize("size", [size for size in SIZES if size != "toy"])
def test_sizes_are_what_they_are_called(size):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], vocab_size=8192, tie_word_embeddings=True))
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(float(size[:-1]) * 1e6, rel=0.1)


def test_runs_of_a_seed_begin_with_the_same_weights():
    models = [new_model("toy", 300, 128, named(name, 16, 3), 0, torch.device("cpu")) for name in NAMES]
    expected = models[0].state_dict()
    for model in models:
        state = model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
        assert all((x == 0).all() for name, x in state.items() if name not in expected)


def test_a_sweep_reads_the_same_share_of_the_blocks():
    assert [of_blocks(n, 32768).settings for n in (8, 32, 128)] == [
        {"block_size": 4096, "top_k": 2},
        {"block_size": 1024, "top_k": 8},
        {"block_size": 256, "top_k": 32},
    ]
    with pytest.raises(UserError, match="divide the context, 32768, but 12 is not"):
        of_blocks(12, 32768)


# Training


@pytest.mark.parametrize(("name", "kinds"), [("full", 1), ("moba-then-full", 2), ("moba-last-3-full", 2), ("moba-conv-3", 1)])
def test_all_layers_with_the_same_attention_share_a_graph(name, kinds):
    torch.compiler.reset()
    run = named(name, 16, 3)
    model = new_model("toy", 300, 128, run, 0, torch.device("cpu"))
    plain, graphs, ids = copy.deepcopy(model), CompileCounter(), torch.randint(300, (2, 129))
    compile_layers(model, backend=graphs)
    for step in range(4):
        for each in (model, plain):
            moba_flex.MobaSchedule(switch_at=run.switch_at).apply(each, 6 + step, 10)
        compiled, wanted = (pretrain.losses(each, ids, pretrain.losses_of_hidden) for each in (model, plain))
        torch.testing.assert_close(compiled, wanted)
    assert graphs.frame_count == kinds
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.compiler.reset()


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


def test_other_settings_under_the_same_name_are_refused(trained, words):
    with pytest.raises(UserError, match=r"learning_rate was 0.004 and is 0.5"):
        pretrain.pretrain(arguments(trained, words, "--runs", "moba", "--learning-rate", "0.5"))


def test_a_batch_that_is_not_whole_contexts_is_refused():
    with pytest.raises(UserError, match="--batch-tokens must be a multiple of 8192"):
        pretrain.parse(["--context", "8192", "--batch-tokens", "10000"])


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


def test_a_step_is_captured_once_it_has_run_twice_and_again_when_its_attention_changes(monkeypatch):
    ran = []

    class Graph:
        def __init__(self, function, model, ids):
            ran.append("capture")

        def __call__(self, ids):
            ran.append("replay")
            return ids.sum()

    def eager(ids):
        ran.append("eager")
        return ids.sum()

    monkeypatch.setattr(captured, "Graph", Graph)
    passes = captured.Passes(eager, torch.nn.Linear(1, 1))
    assert [passes(torch.tensor([i]), kind=i < 4).item() for i in range(8)] == list(range(8))
    assert ran == ["eager", "eager", "capture", "replay", "replay"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: only there steps are captured")
@pytest.mark.parametrize("name", ["full", "moba-then-full", "moba-conv-3"])
def test_captured_steps_have_the_losses_of_others(text, tmp_path, monkeypatch, name):
    """Two parts a step, so that gradients add up within a graph; on a GPU not all sums are of one order, so not to the bit."""
    replays = []
    replay = captured.Graph.__call__
    monkeypatch.setattr(captured.Graph, "__call__", lambda self, ids: replays.append(0) or replay(self, ids))
    losses = []
    for more in ([], ["--no-step-graphs"]):
        args = arguments(tmp_path / str(len(more)), text, "--runs", name, "--tokens", str(256 * 60), *more)
        args.cpu = False
        assert pretrain.pretrain(args) == 0
        (log,) = logs(tmp_path / str(len(more))).values()
        losses.append([loss for _, loss in log["train"] + log["held_out"]])
        steps = {"full": (0, 58), "moba-then-full": (52, 56), "moba-conv-3": (58, 58)}  # all but two of each attention
        assert len(replays) == steps[name][pretrain.CAPTURES_FULL]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0][0] > losses[0][5]


def test_matrices_taken_together_move_as_pytorchs_muon_moves_each():
    shapes, generator = [(8, 8), (16, 8), (8, 8), (8, 24), (16, 8)], torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(x.detach().clone()) for x in ours]
    both = Muon(ours, 1e-2, 0.1), torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        for optimizer in both:
            optimizer.step()
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)  # in bfloat16, and a step is a hundredth


def test_muon_has_the_matrices_of_layers_and_only_matrices_decay():
    model = new_model("toy", 64, 128, named("moba-conv-3", 16, 3), 0, torch.device("cpu"))
    muon, adamw = MuonAndAdamW(model, 1e-3, 0.1)._optimizers
    name_of = {x: name for name, x in model.named_parameters()}
    in_muon = {name_of[x] for group in muon.param_groups for x in group["params"]}
    decayed, others = ({name_of[x] for x in group["params"]} for group in adamw.param_groups)
    assert in_muon | decayed | others == set(name_of.values())
    assert {name.split(".")[-2] for name in in_muon} == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert decayed == {"model.embed_tokens.weight"}
    assert any("key_conv" in name for name in others) and any("norm" in name for name in others)


# Retrieval


@pytest.fixture(scope="module")
def with_facts(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_facts")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert pretrain.pretrain(arguments(folder, text, *WITH_FACTS, "--runs", "full", "moba", "moba-then-full", "moba-conv-3")) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
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


# Comparing


def test_the_table_has_differences_to_full_attention_of_the_same_seed(trained):
    ((title, runs),) = group(list(logs(trained).values())).items()
    assert "size toy, context 128" in title
    moba, found = "moba (16, top-3)", logs(trained)
    expected = [held_out(found[f"toy-128-moba-b16k3-seed{seed}"]) - held_out(found[f"toy-128-full-seed{seed}"]) for seed in (0, 1)]
    assert differences(runs, moba, held_out) == expected
    lines = table(runs)
    assert lines[2].startswith("| full |")
    (row,) = [line for line in lines if line.startswith(f"| {moba} |")]
    mean, deviation = sum(expected) / 2, abs(expected[0] - expected[1]) / 2**0.5
    assert f"{mean:+.4f} ± {deviation:.4f}" in row and row.endswith("| 0, 1 |")
    absolute = [held_out(found[f"toy-128-moba-b16k3-seed{seed}"]) for seed in (0, 1)]
    assert f"| {sum(absolute) / 2:.4f} ± {abs(absolute[0] - absolute[1]) / 2**0.5:.4f} |" in row


def log_of(run: str, seed: int = 0, device: str = "H100", speed: int = 1000, **settings) -> dict:
    """A log of a run that was done on that device; each is a little different."""
    rule = {"size": "toy", "context": 1024, "run": run, "seed": seed, "needle_share": 0.0, **settings}
    loss = 2 + 0.1 * seed + 0.01 * settings.get("block_size", 0) / 16
    return {
        "settings": rule,
        "train": [[10, 3.0], [20, loss]],
        "held_out": [[20, loss]],
        "by_position": [loss] * 16,
        "trailing": loss,
        "tokens_per_second": [speed - 1, speed, speed + 500],
        "environment": {"device": device},
        "done": True,
    }


def test_speeds_of_different_devices_have_no_mean():
    ((_, runs),) = group([log_of("full", 0), log_of("full", 1, speed=3000), log_of("full", 2, "H200", 5000)]).items()
    assert "| 2,000 ± 1,414; 5,000 | H100; H200 | 0, 1, 2 |" in table(runs)[2]


def test_a_sweep_comes_in_the_order_of_its_blocks_and_is_drawn_over_them():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    sweep = [log_of(f"moba-{n}-blocks", seed, block_size=1024 // n, top_k=n // 4) for n in (128, 8, 32) for seed in (0, 1)]
    ((_, runs),) = group([*sweep, log_of("moba", block_size=16, top_k=3), log_of("full", 0), log_of("full", 1)]).items()
    blocks = [f"moba-{n}-blocks ({1024 // n}, top-{n // 4})" for n in (8, 32, 128)]
    assert list(runs) == ["full", "moba (16, top-3)", *blocks]
    axes = figure.subplots()
    draw_sweep(axes, {name: (runs[name], differences(runs, name, held_out)) for name in blocks})
    assert axes.lines[0].get_xydata() == pytest.approx(torch.tensor([[8, 0.08], [32, 0.02], [128, 0.005]]).numpy(), rel=1e-5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "32", "128"]


def test_a_picture_of_a_sweep_has_no_curve_of_full_attention_alone(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *given, **more: (figures.append(self), save(self, *given, **more)))
    sweep = [log_of(f"moba-{n}-blocks", block_size=1024 // n, top_k=n // 4) for n in (8, 32)]
    draw(group([*sweep, log_of("full")]), tmp_path / "blocks.png")
    draw(group([*sweep, log_of("full"), log_of("moba", block_size=16, top_k=3)]), tmp_path / "both.png")
    alone, both = ([axes.get_title() for axes in figure.subfigs[0].axes] for figure in figures)
    assert alone == ["held-out text, by number of blocks"] and both == ["training", "held-out text, by position", *alone]
    assert figures[0].get_figwidth() < figures[1].get_figwidth()


def test_logs_of_several_folders_are_one_table_unless_two_of_them_are_the_same_run(tmp_path, capsys):
    undone = {**log_of("moba", 1, block_size=16, top_k=3), "done": False}
    for name, log in {"a": log_of("full"), "b": log_of("moba", block_size=16, top_k=3), "a again": log_of("full"), "c": undone}.items():
        (tmp_path / name).write_text(json.dumps(log))
    pretrain.compare(sorted(tmp_path.iterdir()))
    out = capsys.readouterr().out
    assert out.count("| run |") == 1 and "+0.0100" in out and "not done: 1 of the 4 runs" in out
    (tmp_path / "a again").write_text(json.dumps(log_of("full", device="H200")))
    with pytest.raises(UserError, match=r"two logs are of full, seed 0, with size toy, .*needle_share 0\.0, optimizer adamw: name one"):
        pretrain.compare(sorted(tmp_path.iterdir()))


def test_compare_prints_and_plots(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pretrain.compare(sorted((trained / "logs").glob("*.json")), tmp_path / "losses.png")
    assert "moba-8-blocks (16, top-2)" in capsys.readouterr().out
    assert (tmp_path / "losses.png").stat().st_size > 20_000


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"x\.json is no log of pretrain"):
        pretrain.compare([tmp_path / "x.json"])
