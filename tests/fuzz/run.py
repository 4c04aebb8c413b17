"""Random cases in a loop, of every implementation of a device, values and gradients:

    python -m tests.fuzz --cases 1000000 --seed 0
    python -m tests.fuzz --cases 1000000 --seed 0 --device cuda --minutes 20

Case number n of a seed is the same in every run. `--state FILE` (by default a file for each seed and device in the current folder) keeps
which cases have been tried, and a later run with the same seed goes on with the others. A failure is printed as a test to paste, made small
where that is quick. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from .check import check
from .draws import SAME_KERNELS, draw
from .shrink import SECONDS, as_test, shrunk

Failure = tuple[int, str, str]  # the number of a case, what is wrong, and a test of it


@dataclass
class State:
    """Which cases have been tried: runs of them, in order and apart from each other, `start <= number < stop`."""

    path: Path
    seed: int
    device: str
    tried: list[tuple[int, int]]
    failed: list[int]

    @classmethod
    def load(cls, path: Path, seed: int, device: str) -> State:
        """ValueError if the file belongs to another seed or device."""
        if not path.exists():
            return cls(path, seed, device, [], [])
        kept = json.loads(path.read_text())
        if (kept["seed"], kept["device"]) != (seed, device):
            raise ValueError(f"{path} is of seed {kept['seed']} on {kept['device']}: name another file with --state, or delete it")
        return cls(path, seed, device, [(start, stop) for start, stop in kept["tried"]], kept["failed"])

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.tried)

    def add(self, start: int, stop: int, failed: list[int]) -> None:
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.tried, (start, stop)] if start < stop else self.tried):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        self.tried, self.failed = merged, sorted({*self.failed, *failed})
        text = json.dumps({"seed": self.seed, "device": self.device, "tried": self.tried, "failed": self.failed})
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(text)
        new.replace(self.path)

    def left(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of cases from `first` to `stop` that have not been tried."""
        for begin, end in [*self.tried, (stop, stop)]:
            if first < min(begin, stop):
                yield first, min(begin, stop)
            first = max(first, end)


def try_cases(seed: int, first: int, stop: int, device: str, until: float = math.inf) -> tuple[int, list[Failure]]:
    """Before which case the clock showed `until`, or `stop`; and the failures among those that were tried."""
    torch.set_num_threads(1)
    found = []
    for number in range(first, stop):
        if time.time() > until:
            return number, found
        one = draw(seed, number, device)
        if (what := check(one, device)) is not None:
            seconds = SECONDS if device == "cpu" else 0.0  # others are compiled anew
            small, what = shrunk(one, what, lambda other: check(other, device), seconds)
            found.append((number, what, as_test(small, f"seed_{seed}_case_{number}", device)))
    return stop, found


def chunks(runs: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Cut at multiples of `size`, where kernels change on a GPU."""
    for first, stop in runs:
        while first < stop:
            end = min(first - first % size + size, stop)
            yield first, end
            first = end


def in_time(parts: Iterable[tuple[int, int]], until: float) -> Iterator[tuple[int, int]]:
    return takewhile(lambda _: time.time() <= until, parts)


def results(args: argparse.Namespace, parts: Iterable[tuple[int, int]], until: float) -> Iterator[tuple[int, int, list[Failure]]]:
    """Which cases have been tried, and the failures among them, in the order of cases."""
    if args.processes == 1:
        for start, stop in in_time(parts, until):
            yield start, *try_cases(args.seed, start, stop, args.device, until)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, _take_device, (args.device, context.Value("i", 0))) as pool:
        waiting: list[tuple[int, int, Future]] = []
        try:
            for start, stop in in_time(parts, until):
                waiting.append((start, stop, pool.submit(try_cases, args.seed, start, stop, args.device, until)))
                if len(waiting) > 2 * args.processes:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take_device(device: str, n_processes: Synchronized[int]) -> None:
    """Of several GPUs each process uses one, the next process the next one."""
    with n_processes.get_lock():
        number = n_processes.value
        n_processes.value += 1
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())


def _next(waiting: list[tuple[int, int, Future]]) -> tuple[int, int, list[Failure]]:
    start, stop, future = waiting.pop(0)
    try:
        return start, *future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"a process died in one of the cases {start} to {stop - 1}: try them with --processes 1 --first {start}"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="how many in all, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="by default one for each core")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long")
    parser.add_argument("--most-failures", type=int, default=20, help="stop after so many")
    parser.add_argument("--state", type=Path, default=None, help="the file that keeps which cases have been tried")
    parser.add_argument("--first", type=int, default=None, help="begin with this case, whatever the file says")
    parser.add_argument("--chunk", type=int, default=None, help="cases that a process takes at a time")
    args = parser.parse_args(arguments)
    args.chunk = args.chunk or (100 if args.device == "cpu" else SAME_KERNELS)

    state = State.load(args.state or Path(f".fuzz-{args.device}-{args.seed}.json"), args.seed, args.device)
    first = 0 if args.first is None else args.first
    runs = [(first, args.cases)] if args.first is not None else list(state.left(0, args.cases))
    began, told, tried, failures = time.monotonic(), 0.0, 0, 0
    until = math.inf if args.minutes is None else time.time() + 60 * args.minutes
    print(f"seed {args.seed}, {args.device}: {sum(stop - start for start, stop in runs):,} of {args.cases:,} cases are left", flush=True)
    for start, stop, found in results(args, chunks(runs, args.chunk), until):
        for number, what, test in found:
            print(f"\ncase {number}: {what}\n\n{test}", flush=True)
        failures, tried = failures + len(found), tried + stop - start
        state.add(start, stop, [number for number, _, _ in found])
        seconds = time.monotonic() - began
        if seconds - told > 20 or state.count == args.cases:
            told = seconds
            print(
                f"{state.count:,} of {args.cases:,} cases, {failures} failures, {tried / seconds:.0f} cases/s", file=sys.stderr, flush=True
            )
        if failures >= args.most_failures:
            break
    print(f"{state.count:,} cases of seed {args.seed} on {args.device} have been tried; failed: {state.failed or 'none'}", flush=True)
    return 1 if state.failed else 0
