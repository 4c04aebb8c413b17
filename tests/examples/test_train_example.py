"""examples/train.py: no step that is done is lost or done twice, and losses do not depend on who shares the work."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import launch as launcher
import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from shared import training
from shared.command_line import UserError
from support.scripts import Script
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

ROOT = Path(__file__).parents[2]
TINY = [
    *("--tiny", "--cpu", "--text", str(ROOT / "examples/llama.py"), str(ROOT / "examples/train.py")),
    *("--sequence-length", "200", "--block-size", "24", "--top-k", "3", "--sink-blocks", "1", "--full-attention-layers", "-1"),
    *("--batch-size", "4", "--learning-rate", "1e-3", "--warmup", "2", "--moba-share", "0.5"),
]
SHORT = [*TINY, "--steps", "6", "--checkpoint-every", "3"]


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What a run in this process leaves behind: handlers of signals, and accelerate's state, which it keeps for the life of a process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def alone() -> Iterator[None]:
    with undone():
        yield


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process, from beginning to end."""
    output = tmp_path_factory.mktemp("short")
    with undone():
        assert train.train(train.parse([*SHORT, "--micro-batch-size", "2", "--output", str(output)])) == 0
    return output


def environment() -> dict[str, str]:
    here = {name: x for name, x in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**here, **loopback, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(config: str, script: str, *arguments: str, processes: int = 2, **parallelism: int) -> list[str]:
    """The script on several processes, by examples/launch.py."""
    options = [part for name, x in parallelism.items() for part in (f"--parallelism_config_{name}", str(x))]
    launcher = ["examples/launch.py", "--config_file", f"examples/accelerate/{config}", "--mixed_precision", "no"]
    return [*launcher, "--num_processes", str(processes), *options, script, *arguments]


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """What a command prints."""
    return tmp_path / "said.txt"


@pytest.fixture
def launched(said: Path) -> Callable[[list[str]], Script]:
    """Starts such a command, without the imports."""
    return lambda command: Script(command, environment(), said)


@pytest.fixture
def launch(launched: Callable[[list[str]], Script], said: Path) -> Callable[..., None]:
    """Runs such a command. One that hangs or fails says why, and its processes are ended."""

    def run(*arguments: str, **options: int) -> None:
        with launched(command(*arguments, **options)) as job:
            try:
                assert job.wait(150) == 0, said.read_text()[-6000:]
            except subprocess.TimeoutExpired:
                pytest.fail(f"{' '.join(arguments)} did not end in 150 seconds:\n{said.read_text()[-6000:]}")

    return run


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    entries = log(output)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def assert_same_losses(output: Path, expected: Path) -> None:
    torch.testing.assert_close(losses(output), losses(expected), rtol=1e-5, atol=0.0)


def up_to_step_3(run: Path, output: Path) -> Path:
    shutil.copytree(run, output, ignore=shutil.ignore_patterns("step-00000006", "model"))
    return output


def test_a_run_learns_logs_and_leaves_a_model_that_loads(short: Path) -> None:
    entries = log(short)
    assert [entry["attention"] for entry in entries] == ["moba"] * 3 + ["full"] * 3
    assert all(entry["tokens_per_second"] > 0 for entry in entries)
    assert losses(short)[-1] < losses(short)[0]
    model = AutoModelForCausalLM.from_pretrained(short / "model", attn_implementation="moba")
    assert model(torch.arange(64)[None]).logits.isfinite().all()
    assert dict(model.config.moba)["block_size"] == 24


@pytest.mark.parametrize("given", ["labels", "shift_labels", "num_items_in_batch"])
def test_the_loss_in_parts_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(training, "LOSSES_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 11, generator=generator, requires_grad=True)
    labels = torch.randint(11, (2, 20), generator=generator)
    labels[0, :3] = -100
    more = {"shift_labels": {"shift_labels": labels.roll(1, 1)}, "num_items_in_batch": {"num_items_in_batch": torch.tensor(13)}}.get(
        given, {}
    )
    actual, expected = (loss(logits, labels, vocab_size=11, **more) for loss in (training.mean_loss, ForCausalLMLoss))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))


def test_two_processes_have_the_losses_of_one(short: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    launch("cpu.yaml", "examples/train.py", *SHORT, "--activation-checkpointing", "--output", str(tmp_path))
    assert_same_losses(tmp_path, short)


def test_sharded_parameters_and_sequences_have_the_losses_of_one_process(short: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    sizes = {"dp_shard_size": 1, "cp_size": 2}
    launch("fsdp2_cp.yaml", "tests/support/train_on_cpus.py", *SHORT, "--micro-batch-size", "2", "--output", str(tmp_path), **sizes)
    assert_same_losses(tmp_path, short)


def test_one_process_checkpoint_goes_on_with_sharded_parameters_on_two(short: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    output = up_to_step_3(short, tmp_path / "run")
    launch("fsdp2.yaml", "tests/support/train_on_cpus.py", *SHORT, "--resume", "--output", str(output))
    assert_same_losses(output, short)


def test_a_killed_process_is_named_and_three_others_go_on(tmp_path: Path, said: Path, launched, launch) -> None:
    """Parameters are sharded over two processes, one of which is killed in the middle of a step, and then over three."""
    arguments, output = [*SHORT, "--batch-size", "6", "--steps", "7", "--output"], tmp_path / "run"
    with launched(command("fsdp2.yaml", "tests/support/train_on_cpus.py", *arguments, str(output))) as job:
        while not (output / "step-00000003").exists():
            with pytest.raises(subprocess.TimeoutExpired):  # it still runs
                job.wait(0.01)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert job.wait(60) == 137, said.read_text()
    words = said.read_text()
    assert words.splitlines()[-1] == "launch.py: process 1 was ended by signal 9 (SIGKILL): is there enough memory?"
    assert "train.py: error: process 1 of 2 (pid " in words and "ended without a word; process 0 was at step " in words

    launch("fsdp2.yaml", "tests/support/train_on_cpus.py", *arguments, str(output), "--resume", processes=3)
    one = [*arguments, str(tmp_path / "one")]
    with undone():
        assert train.train(train.parse([*one, "--micro-batch-size", "6"])) == 0
    assert_same_losses(output, tmp_path / "one")


def test_the_launcher_names_the_process_that_was_killed_first_and_the_others_have_time_to_name_it(monkeypatch, capsys) -> None:
    """Others that wait in a kernel for the killed one are killed too, by the launcher, half a minute later."""
    failures = {}
    for rank, (code, at) in {0: (-9, 131), 1: (1, 121), 2: (-9, 100), 3: (-9, 131)}.items():
        failures[rank] = ProcessFailure(rank, 1000 + rank, code, "no file")
        failures[rank].timestamp = at

    def fail(_) -> None:
        raise ChildFailedError("train.py", failures)

    monkeypatch.setattr(launcher, "launch_command", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launcher.main(["examples/train.py"]) == 137
    assert capsys.readouterr().err == "launch.py: process 2 was ended by signal 9 (SIGKILL): is there enough memory?\n"
    its_patience = inspect.signature(PContext.close).parameters["timeout"].default
    assert its_patience > train.SILENT + 5, "a word a second, and a look a second"


def test_an_interrupted_job_says_so_and_goes_on_to_the_same_end(alone: None, tmp_path: Path, capsys) -> None:
    """A terminal's Ctrl-C for two processes and their launcher, which passes it on to them; one process goes on."""
    arguments, output = [*TINY, "--steps", "40", "--output"], tmp_path / "interrupted"
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = [sys.executable, *command("cpu.yaml", "examples/train.py", *arguments, str(output))]
    process = subprocess.Popen(job, **options, start_new_session=True)
    try:
        while not (output / "log.jsonl").exists() or len(log(output)) < 3:
            with pytest.raises(subprocess.TimeoutExpired):  # it still runs
                process.wait(0.01)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    steps = len(log(output))
    assert process.returncode == 130 and 3 <= steps < 40 and (output / f"step-{steps:08d}").is_dir(), said
    last_words = f"interrupted after step {steps}, whose checkpoint is written: the same command with --resume goes on from there\n"
    assert said.endswith(last_words) and "death signal" not in said

    assert train.train(train.parse([*arguments, str(tmp_path / "whole")])) == 0
    AcceleratorState._reset_state(True)
    capsys.readouterr()
    assert train.train(train.parse([*arguments, str(output), "--resume"])) == 0
    torch.testing.assert_close(losses(output), losses(tmp_path / "whole"), rtol=1e-3, atol=0.0)
    out, err = capsys.readouterr()
    loss, model = losses(output)[-1], output / "model"
    assert out == (
        f"done after step 40, final loss {loss:.4f}; the model is in {model}\n"
        f"load it: moba_flex.AutoModelForCausalLM.from_pretrained({str(model)!r})\n"
    )
    assert "Warning" not in err
    assert re.search(rf"40/40 .*loss {loss:.4f}, [\d,]+ tokens/s, full", err)


def test_a_job_has_one_error_in_one_line(tmp_path: Path, said: Path, launched) -> None:
    with launched(command("cpu.yaml", "examples/train.py", *TINY, "--text", "nowhere.txt", "--output", str(tmp_path / "run"))) as job:
        assert job.wait(120) == 2, said.read_text()
    (line,) = [line for line in said.read_text().splitlines() if "nowhere" in line or "rror" in line or "Traceback" in line]
    assert line.startswith("train.py: error: argument --text: cannot read the file: ")


@pytest.mark.parametrize(("launched", "seconds", "ends"), [(False, 0.1, True), (True, 0.1, False), (True, 6.0, True)])
def test_a_second_ctrl_c_ends_at_once_but_not_one_that_the_launcher_passes_on(
    alone: None, monkeypatch: pytest.MonkeyPatch, launched: bool, seconds: float, ends: bool
) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training.os, "_exit", ended.append)
    monkeypatch.setenv("RANK", "0")
    if not launched:
        monkeypatch.delenv("RANK")
    stop = training.Stop()
    signal.raise_signal(signal.SIGINT)
    assert stop.wanted and stop.exit_code == 130 and not ended
    now[0] += seconds
    signal.raise_signal(signal.SIGINT)
    assert ended == [130] * ends and stop.exit_code == 130


@pytest.mark.parametrize("done", [0, 1, 3])  # after three steps the checkpoint is there already
def test_ctrl_c_ends_a_step_between_its_micro_batches(alone: None, tmp_path: Path, monkeypatch, capsys, done: int) -> None:
    """Two a step, of two sequences. Steps that are done are kept, the other one begins anew, and the bits are those of a whole run."""
    calls, forward = [], train.forward

    def interrupted(*args) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 2 * done + 1:
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(train, "forward", interrupted)
    arguments = [*SHORT, "--micro-batch-size", "2", "--output", str(tmp_path / "run")]
    assert train.train(train.parse(arguments)) == 130
    assert len(calls) == 2 * done + 1
    checkpoints = [path.name for path in (tmp_path / "run").glob("step-*")]
    said = capsys.readouterr().out
    if not done:
        assert not checkpoints and "interrupted before the first step was done: nothing is saved" in said
        return
    assert checkpoints == [f"step-{done:08d}"] and f"interrupted after step {done}, whose checkpoint is written" in said
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    assert train.train(train.parse([*arguments, "--resume"])) == 0
    AcceleratorState._reset_state(True)
    assert train.train(train.parse([*arguments[:-1], str(tmp_path / "whole")])) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tp_size", "sp_size"])
def test_parallelism_that_the_script_does_not_do_is_refused(name: str, tmp_path: Path) -> None:
    parallelism = SimpleNamespace(**{"tp_size": 1, "sp_size": 1, "cp_size": 1, name: 2})
    with pytest.raises(UserError, match=f"configuration has {name} 2, which this script does not do"):
        accelerator = SimpleNamespace(parallelism_config=parallelism, num_processes=2, process_index=0)
        train.Share(accelerator, train.parse([*SHORT, "--output", str(tmp_path)]))


@pytest.mark.parametrize(("processes", "rows"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_every_sequence_is_read_once_an_epoch_whoever_shares_the_work(tmp_path: Path, processes: int, rows: int) -> None:
    """Also where an epoch ends in the middle of a step."""
    (tmp_path / "text").write_text(" ".join(map(str, range(2100))))
    args = train.parse([*SHORT, "--text", str(tmp_path / "text"), "--output", "-"])
    text, alone = train.Text(args, None), train.Text(args, None)
    shares = [SimpleNamespace(size=processes, rank=rank, rows=rows) for rank in range(processes)]
    n = text.fingerprint[0] // args.sequence_length
    assert n % args.batch_size == 2
    steps = range(-(-2 * n // args.batch_size))
    parts = range(args.batch_size // (processes * rows))
    read = torch.cat([text.batch(step, i, share) for step in steps for i in parts for share in shares])
    one = SimpleNamespace(size=1, rank=0, rows=args.batch_size)
    assert read.equal(torch.cat([alone.batch(step, 0, one) for step in steps]))
    first, second = read[:n], read[n : 2 * n]
    assert len(first.unique(dim=0)) == n and first.unique(dim=0).equal(second.unique(dim=0)) and not first.equal(second)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batch-size", "3"], "--batch-size, the sequences of one step, is 4, but must be a multiple of 3"),
        (["--context-parallel", "2"], "--context-parallel must divide the 1 processes, but is 2"),
        (["--sequence-length", "1000000"], "--text has .* tokens, but one sequence .* has 1000000"),
        (["--resume"], "--resume: there is no checkpoint in"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(alone: None, tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train.train(train.parse([*SHORT, *arguments, "--output", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "nowhere.txt"], "argument --text: cannot read the file: .*nowhere.txt"),
        (["--top-k", "1"], "these flags do not fit together: .*--sink-blocks"),
        (["--full-attention-layers", "7"], "argument --full-attention-layers: there is no layer 7: the model has the layers 0 to 1"),
        (["--log-with", "nosuch"], "accelerate cannot begin: .*nosuch"),
        (["--output", __file__], "argument --output: cannot write to the folder "),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_the_model_is_made(
    alone: None, tmp_path: Path, arguments: list[str], words: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(train, "load", lambda _: pytest.fail("loaded"))
    assert train.main([*SHORT, "--output", str(tmp_path / "run"), *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(f"train.py: error: {words}", said) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block-size", "0"], "argument --block-size: must be at least 1, but is 0"),
        (["--batch-size", "0"], "argument --batch-size: must be at least 1, but is 0"),
        (["--checkpoint-every", "0"], "argument --checkpoint-every: must be at least 1, but is 0"),
        (["--sequence-length", "1"], "argument --sequence-length: a sequence of 1 token has nothing to predict"),
        (["--moba-share", "3"], "argument --moba-share: must be from 0 to 1, but is 3"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be finite and above 0, but is -1"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be finite and above 0, but is nan"),
        (["--weight-decay", "inf"], "argument --weight-decay: must be finite and at least 0, but is inf"),
        (["--clip", "nan"], "argument --clip: must be above 0, but is nan"),
        (["--warmup", "-1"], "argument --warmup: must be at least 0, but is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        train.parse([*SHORT, "--output", str(tmp_path), *arguments])


def test_a_line_of_the_log_that_was_cut_off_is_dropped(alone: None, short: Path, tmp_path: Path) -> None:
    output = up_to_step_3(short, tmp_path / "run")
    with open(output / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 3.1')
    train.train(train.parse([*SHORT, "--micro-batch-size", "2", "--resume", "--output", str(output)]))
    assert_same_losses(output, short)


def test_a_run_is_not_overwritten(alone: None, short: Path) -> None:
    with pytest.raises(UserError, match="has checkpoints already: go on from the last one with --resume"):
        train.train(train.parse([*SHORT, "--output", str(short)]))


def test_what_a_step_depends_on_must_not_change(alone: None, short: Path) -> None:
    with pytest.raises(UserError, match="these must not change: seed was 0 and is 1, top_k was 3 and is 4"):
        train.train(train.parse([*SHORT, "--resume", "--seed", "1", "--top-k", "4", "--output", str(short)]))
    assert len(losses(short)) == 6
