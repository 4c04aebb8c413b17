"""Random cases in a loop, of every implementation of a device, values and gradients:

    python -m tests.fuzz --cases 1000000 --seed 0
    python -m tests.fuzz --cases 1000000 --seed 0 --device cuda --minutes 20

Case number n of a seed is the same in every run. `--state FILE` (by default a file for each seed and device in the current folder) keeps
how far a run came, and a later one with the same seed goes on from there. A failure is printed as a test to paste, made small where that
is quick. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from .check import check
from .draws import SAME_KERNELS, draw
from .shrink import SECONDS, as_test, shrunk

Failure = tuple[int, str, str]  # the number of a case, what is wrong, and a test of it


@dataclass
class State:
    """How far a run came: all cases before `done` have been tried."""

    path: Path
    seed: int
    device: str
    done: int = 0
    failed: list[int] | None = None

    @classmethod
    def load(cls, path: Path, seed: int, device: str) -> State:
        """ValueError if the file belongs to another seed or device."""
        if not path.exists():
            return cls(path, seed, device, 0, [])
        kept = json.loads(path.read_text())
        if (kept["seed"], kept["device"]) != (seed, device):
            raise ValueError(f"{path} is of seed {kept['seed']} on {kept['device']}: name another file with --state, or delete it")
        return cls(path, seed, device, kept["done"], kept["failed"])

    def save(self) -> None:
        text = json.dumps({"seed": self.seed, "device": self.device, "done": self.done, "failed": self.failed})
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(text)
        new.replace(self.path)


def try_cases(seed: int, first: int, stop: int, device: str) -> list[Failure]:
    """The failures among some cases."""
    torch.set_num_threads(1)
    found = []
    for number in range(first, stop):
        one = draw(seed, number, device)
        if (what := check(one, device)) is not None:
            small, what = shrunk(
                one, what, lambda other: check(other, device), SECONDS if device == "cpu" else 0.0
            )  # others are compiled anew
            found.append((number, what, as_test(small, f"seed_{seed}_case_{number}", device)))
    return found


def chunks(first: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, stop, size):
        yield start, min(start + size, stop)


def results(args: argparse.Namespace, first: int) -> Iterator[tuple[int, list[Failure]]]:
    """How far it has come, and the failures since, in the order of cases."""
    parts = chunks(first, args.cases, args.chunk)
    if args.processes == 1:
        for start, stop in parts:
            yield stop, try_cases(args.seed, start, stop, args.device)
        return
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        waiting: list[tuple[int, int, Future]] = []
        try:
            for start, stop in parts:
                waiting.append((start, stop, pool.submit(try_cases, args.seed, start, stop, args.device)))
                if len(waiting) > 2 * args.processes:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next(waiting: list[tuple[int, int, Future]]) -> tuple[int, list[Failure]]:
    start, stop, future = waiting.pop(0)
    try:
        return stop, future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"a process died in one of the cases {start} to {stop + 1}: try them with --processes 1 --first {start}"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="how many in all, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="by default one for each core")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long")
    parser.add_argument("--most-failures", type=int, default=20, help="stop after so many")
    parser.add_argument("--state", type=Path, default=None, help="the file that keeps how far it came")
    parser.add_argument("--first", type=int, default=None, help="begin with this case, whatever the file says")
    parser.add_argument("--chunk", type=int, default=None, help="cases that a process takes at a time")
    args = parser.parse_args(arguments)
    args.chunk = args.chunk or (100 if args.device == "cpu" else SAME_KERNELS)

    state = State.load(args.state or Path(f".fuzz-{args.device}-{args.seed}.json"), args.seed, args.device)
    first = state.done if args.first is None else args.first
    began, told, failures = time.monotonic(), 0.0, 0
    print(f"seed {args.seed}, {args.device}: cases {first:,} to {args.cases:,}", flush=True)
    for done, found in results(args, first):
        for number, what, test in found:
            print(f"\ncase {number}: {what}\n\n{test}", flush=True)
        failures += len(found)
        state.done, state.failed = max(state.done, done), [*state.failed, *(number for number, _, _ in found)]
        state.save()
        seconds = time.monotonic() - began
        if seconds - told > 20 or done == args.cases:
            told, rate = seconds, (done - first) / seconds
            print(f"{done:,} of {args.cases:,} cases, {failures} failures, {rate:.0f} cases/s", file=sys.stderr, flush=True)
        if failures >= args.most_failures or (args.minutes is not None and seconds > 60 * args.minutes):
            break
    print(f"{state.done:,} cases of seed {args.seed} on {args.device} have been tried; failed: {state.failed or 'none'}", flush=True)
    return 1 if state.failed else 0
