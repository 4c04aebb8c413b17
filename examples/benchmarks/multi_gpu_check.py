"""Test MoBA on a host with several GPUs, unattended: losses, a killed process, speeds, tests, ten million tokens, a whole model.

    python examples/benchmarks/multi_gpu_check.py --output results              # all parts; about 20 minutes on four H200
    python examples/benchmarks/multi_gpu_check.py --output results --minutes 9  # what fits; the same command continues with the rest
    python examples/benchmarks/multi_gpu_check.py --output results --list       # the parts, their time, and which are done
    python examples/benchmarks/multi_gpu_check.py --output results --dry        # toy sizes on CPU processes, to try it out

It runs from a checkout, with the package and its "test" and "demo" extras installed. Nothing is downloaded: the trained model has the shape
of SmolLM2-135M and random weights, and reads bytes of Python's standard library. Each part writes NAME.json and NAME.log; a part with a
JSON file is not run again. Parts that are not timed run side by side. Everything ends when the minutes are over. results.json and the final
output compare all results with the predictions of docs/scaling.md. Exit code: 0 if all parts are done and right, 1 if one failed or has
wrong results, 3 if the time was too short for some. NVLink multicast stays off, because some hosts cannot map it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

if __name__ == "__main__":
    script_started = time.monotonic()  # the import of PyTorch takes a minute if it is not in the file cache

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from benchmarking.multi_gpu_parts import ROOT, Part, parts, save_model
from benchmarking.multi_gpu_summary import summary
from benchmarking.processes import kill_all
from shared import saved_results
from shared.command_line import Parser, UserError, exit_code
from shared.flag_types import positive
from shared.startup import run_script

OVERTIME = 180  # seconds by which a part may exceed its time before it is killed
LEAST = 60  # minimum time in seconds for a part that need not be complete
OF_TEST = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) |^tests/\S+ ([A-Z]+) .*\[ *\d+%\]$", re.MULTILINE)  # with several processes, or one

LAUNCHER_SAYS = re.compile(r"^[EW]\d{4} [\d:.]+ \d+ \S*torch/distributed/", re.MULTILINE)  # a path, relative to the folder


@dataclass
class Job:
    """A running part. Its output goes to its log."""

    part: Part
    output: Path
    end: float  # of all parts
    code: int | None = None

    def __post_init__(self) -> None:
        part, self.started = self.part, time.monotonic()
        if part.run is not None:
            shutil.rmtree(part.run, ignore_errors=True)  # of an interrupted run
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"NCCL_NVLS_ENABLE": "0", **os.environ, "PYTHONPATH": path, **part.environment}
        with open(self.log, "w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            self._process = subprocess.Popen(part.command, cwd=ROOT, env=environment, **options)

    @property
    def log(self) -> Path:
        return self.output / f"{self.part.name}.log"

    def runs(self) -> bool:
        """Whether it still runs. Kills it when its time is up."""
        self.code = self._process.poll()
        if self.code is None and time.monotonic() < min(self.started + self.part.seconds + OVERTIME, self.end):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        kill_all(self._process)

    def save(self) -> str:
        """Write the result to a file, and return "done", "cut off" if the time was too short, or "failed"."""
        part, result = self.part, result_of(self.part, self.log)
        if part.run is not None:
            shutil.rmtree(part.run, ignore_errors=True)  # gigabytes of checkpoints
        cut = self.code is None and time.monotonic() >= self.end
        if cut and part.whole:
            return "cut off"
        if not cut and ((self.code != 0 and not result.get("out_of_memory")) or (part.run is not None and not result)):
            return "failed"
        result = {"part": part.name, "cut": cut, "seconds": time.monotonic() - self.started, "command": part.command, **result}
        saved_results.write(self.output / f"{part.name}.json", result)
        return "cut off" if cut else "done"


def result_of(part: Part, log: Path) -> dict:
    if part.run is not None:
        lines = (part.run / "log.jsonl").read_text().splitlines() if (part.run / "log.jsonl").exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        names = ("loss", "tokens_per_second")
        return {name: [entry[name] for entry in entries] for name in names} if entries else {}
    text = log.read_text(errors="replace")
    if of_tests := [first or second for first, second in OF_TEST.findall(text)]:
        return {name.lower(): of_tests.count(name) for name in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # not JSON, but starts with a brace
            found += [json.loads(line)] if line.startswith("{") else []
    return {"rows": found, **found[-1]} if found else {}


def run(group: Iterable[Part], args: argparse.Namespace, failed: list[str], left: list[str]) -> None:
    """Run parts side by side. Adds their names to `failed` and `left`."""
    jobs = []
    try:
        for part in group:
            if time.monotonic() + (part.seconds if part.whole else LEAST) > args.end:
                left.append(part.name)
                continue
            print(f"{part.name}: {part.seconds} s ...", flush=True)
            jobs.append(Job(part, args.output, args.end))
        waiting = list(jobs)
        while waiting:
            for job in [job for job in waiting if not job.runs()]:
                waiting.remove(job)
                outcome = job.save()
                print(f"{job.part.name}: {outcome} after {time.monotonic() - job.started:.0f} s", flush=True)
                {"done": [], "failed": failed, "cut off": left}[outcome].append(job.part.name)
            time.sleep(0.05)
    finally:
        for job in jobs:
            job.kill()


def groups(chosen: list[Part], most: int) -> list[list[Part]]:
    """Groups of parts that run side by side, at most `most` each."""
    found = []
    for timed, some in groupby(chosen, lambda part: part.timed):
        rest, size = list(some), 1 if timed else most
        found += [rest[i : i + size] for i in range(0, len(rest), size)]
    return found


def check(args: argparse.Namespace) -> int:
    every = {part.name: part for part in parts(args)}
    if unknown := sorted(set(args.only) - set(every)):
        raise UserError(f"argument --only: there is no part {', '.join(unknown)}, but {', '.join(every)}")
    chosen = [every[name] for name in args.only or every]
    done = {name for name, x in results_of(args.output, every).items() if not x.get("cut")}
    rest = groups([part for part in chosen if part.name not in done], 2 if args.dry else len(every))
    seconds = sum(max(part.seconds for part in group) for group in rest)
    n_done, where = sum(part.name in done for part in chosen), "; CPU processes take other times" if args.dry else ""
    print(f"{len(chosen)} parts, {n_done} done; the others take about {seconds / 60:.0f} minutes on four H200{where}")
    if args.list:
        for part in chosen:
            print(f"{part.name:20} {part.seconds:5} s  {'done' if part.name in done else '' if part.timed else 'side by side'}")
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    same_as_before(args)
    if not args.dry and not (args.output / "model" / "tokenizer.json").exists():
        save_model(args.output / "model")
    failed: list[str] = []
    left: list[str] = []
    for group in rest:
        run(group, args, failed, left)
    return report(args.output, every, failed, left)


def results_of(output: Path, names: Iterable[str]) -> dict[str, dict]:
    files = [output / f"{name}.json" for name in names]
    return {file.stem: json.loads(file.read_text()) for file in files if file.exists()}


def same_as_before(args: argparse.Namespace) -> None:
    """Raise UserError if the folder has results of another kind of run."""
    file, settings = args.output / "settings.json", {"gpus": args.gpus, "dry": args.dry}
    before = json.loads(file.read_text()) if file.exists() else settings
    if before != settings:
        raise UserError(f"--output {args.output} has results of {before}, but these would be of {settings}: name another folder")
    saved_results.write(file, settings)


def report(output: Path, names: Iterable[str], failed: list[str], left: list[str]) -> int:
    results = results_of(output, names)
    lines, numbers = summary(results)
    saved_results.write(output / "results.json", {"failed": failed, "left": left, "parts": results, **numbers})
    print(*lines, sep="\n")
    for name in failed:
        words = last_words((output / f"{name}.log").read_text(errors="replace"))
        print(f"{name} failed, see {output / name}.log: {' | '.join(words)}")
    if left:
        print(f"no time was left for {', '.join(left)}: the same command goes on with them")
    return 1 if failed or numbers["wrong"] else 3 if left else 0


def last_words(log: str) -> list[str]:
    """The last lines of the processes: PyTorch's launcher appends fifty lines of its own."""
    return LAUNCHER_SAYS.split(log)[0].splitlines()[-3:]


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for results and logs (required)")
    flag("--minutes", type=positive, default=1e9, metavar="X", help="a part begins only if its time fits (default: no limit)")
    flag("--only", nargs="+", default=[], metavar="NAME", help="these parts (default: all)")
    flag("--list", action="store_true", help="print the parts and run none")
    flag("--dry", action="store_true", help="toy sizes on CPU processes")
    flag("--gpus", type=int, default=0, metavar="N", help="how many, or processes with --dry (default: all, or 2)")

    def work() -> int:
        args = parser.parse_args(argv)
        args.output, args.end = args.output.resolve(), (time.monotonic() if started is None else started) + 60 * args.minutes
        args.gpus = args.gpus or (2 if args.dry else torch.cuda.device_count())
        if args.gpus < 2:
            raise UserError(f"needs at least 2 GPUs, but there are {args.gpus}: --dry tries it out on CPU processes")
        return check(args)

    return exit_code("multi_gpu_check.py", work)


if __name__ == "__main__":
    run_script(lambda: main(started=script_started))
