"""Test MoBA's training script when a process is killed: the others name it and end, and one process fewer resumes from the checkpoint.

    python examples/benchmarks/kill_and_resume.py --processes 4 --output results/resume -- \\
        --config_file examples/accelerate/fsdp2.yaml examples/train.py --model NAME --text *.txt --batch-size 12

The arguments after `--` are those of examples/launch.py, without the number of processes, the output, the steps and the checkpoint
interval. `--batch-size` must be a multiple of both numbers of processes. Prints the output of both runs, and one line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import json
import re
import shutil
import subprocess
import time

import psutil
from benchmarking.processes import kill_all
from shared.command_line import Parser, UserError, exit_code
from shared.flag_types import count
from shared.startup import run_script

EVERY, STEPS = 3, 12  # steps between checkpoints, and in total
SECONDS = 120  # limit for the other processes to end; more than a minute is reported as wrong


def kill_and_resume(args: argparse.Namespace) -> dict:
    folder = args.output / "run"
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    log = args.output / "killed.log"
    with open(log, "w") as file:
        job = start(args, args.processes, [], file)
        try:
            while len(losses(folder)) <= EVERY:
                if job.poll() is not None:
                    raise UserError(f"the run that was to be killed ended by itself with exit code {job.returncode}")
                time.sleep(0.01)
            killed = max(psutil.Process(job.pid).children(), key=lambda child: child.pid)  # not the first one, which holds the store
            killed.kill()
            at = time.monotonic()
            try:
                code, seconds = job.wait(SECONDS), time.monotonic() - at
            except subprocess.TimeoutExpired:
                raise UserError(f"the other processes still ran {SECONDS} seconds after one was killed") from None
        finally:
            kill_all(job)
            print(log.read_text(), flush=True)
    before, checkpoint = losses(folder), max(folder.glob("step-????????"))
    said = [line for line in log.read_text().splitlines() if f"(pid {killed.pid} on " in line]

    job = start(args, args.processes - 1, ["--resume"], None)
    try:
        if job.wait():
            raise UserError(f"the run that was to go on ended with exit code {job.returncode}")
    finally:
        kill_all(job)
    return {
        "processes": args.processes,
        "exit_code": code,
        "seconds_until_all_ended": seconds,
        "processes_that_named_it": len(set(re.findall(r"; process (\d+) was at", "\n".join(said)))),
        "said": said,
        "resumed_at": int(checkpoint.name.removeprefix("step-")),
        "steps": STEPS,
        "loss_before": before,
        "loss": losses(folder),
    }


def start(args: argparse.Namespace, n: int, more: list[str], file) -> subprocess.Popen:
    flags = ["--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--output", str(args.output / "run"), *more]
    command = [sys.executable, "examples/launch.py", "--num_processes", str(n), *args.command, *flags]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=file, stderr=subprocess.STDOUT if file else None)


def losses(folder: Path) -> list[float]:
    """The losses of the steps that are done. An incomplete last line is ignored."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--processes", type=count, default=2, metavar="N", help="of which one is killed")
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for the run; what is there is removed (required)")
    flag("command", nargs="+", metavar="COMMAND", help="for examples/launch.py")

    def work() -> None:
        args = parser.parse_args(argv)
        args.output = args.output.resolve()
        if args.processes < 2:
            raise UserError(f"argument --processes: must be at least 2, but is {args.processes}: one is killed")
        try:
            print(json.dumps(kill_and_resume(args)), flush=True)
        finally:
            shutil.rmtree(args.output / "run", ignore_errors=True)  # gigabytes of checkpoints

    return exit_code("kill_and_resume.py", work)


if __name__ == "__main__":
    run_script(main)
