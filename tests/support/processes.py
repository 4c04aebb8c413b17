"""Processes for tests: a group that is started once and runs one check after another.

    with Processes(4, tmp_path) as group:
        results = group.run(check, *arguments)      # check(*arguments) on every process; one result each

A check is a function of an importable module. Processes are forks of one that has imported what most checks need, and talk through gloo
on the loopback device; or they are spawned, and talk through NCCL with a GPU each. They find each other through a file, so no port is
chosen by anyone. If a check raises on any process, or one ends, or time is up,
`run` raises `ProcessesFailed` with what every process was doing, and the group is ended: its collectives are out of step. The next `run`
starts a new one.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest.mock import patch

_START = 240.0  # seconds for imports on a busy machine
_COLLECTIVE = 60.0  # seconds that a process waits for the others in a collective


def fork_server() -> ForkServerContext:
    """Makes processes that have imported `support.imported`, in the environment of the first call. Its first process takes the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.imported"])
    tests = str(Path(__file__).parents[1])
    with patch.dict(os.environ, PYTHONPATH=tests, TESTS_SYS_PATH=json.dumps(sys.path)):
        forkserver.ensure_running()  # once; if the imports fail it goes on without them
    return context


class ProcessesFailed(AssertionError):
    """What went wrong, process by process."""


class Processes:
    def __init__(self, size: int, time_limit: float = 120.0, device: str = "cpu") -> None:
        self.size, self.time_limit, self.device = size, time_limit, device
        self._children: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def run(self, check: Callable, *arguments: Any) -> list[Any]:
        """`check(*arguments)` on every process; the results by rank."""
        if not self._children:
            self._start()
        for pipe in self._pipes:
            pipe.send((check, arguments))
        return self._collect(check.__name__, self.time_limit)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            child.kill()  # nothing of theirs is worth waiting for
        for child in self._children:
            child.join()
        self._children, self._pipes = [], []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = fork_server() if self.device == "cpu" else multiprocessing.get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            output = [_File(number) for number in (1, 2)]  # else it would print where the first of all groups did
            child = context.Process(target=_work, args=(rank, self.size, self.device, self._folder.name, there, output), daemon=True)
            child.start()
            there.close()
            self._children.append(child)
            self._pipes.append(here)
        self._collect("start", _START)

    def _collect(self, what: str, seconds: float) -> list[Any]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < self.size and all(kind == "result" for kind, _ in answers.values()):
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"{what}: no answer after {seconds:g} seconds", answers)
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pipe.recv()
                except (EOFError, ConnectionError):
                    child = self._children[waiting[pipe]]
                    child.join(5)
                    answers[waiting[pipe]] = ("ended", f"ended with exit code {child.exitcode}")
        if any(kind != "result" for kind, _ in answers.values()):
            self._fail(f"{what} failed", answers)
        return [answers[rank][1] for rank in range(self.size)]

    def _fail(self, message: str, answers: dict[int, tuple[str, Any]]) -> None:
        """Give the others a moment to say what they met, ask those that say nothing where they are, and raise."""
        deadline = time.monotonic() + 3
        for rank in set(range(self.size)) - set(answers):
            if self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionError):
                    answers[rank] = ("ended", "ended")
        silent = set(range(self.size)) - set(answers)
        where = {rank: self._where(rank) for rank in silent}
        self.end()
        lines = [message]
        for rank in range(self.size):
            kind, said = answers.get(rank) or ("silent", f"gave no answer; it was here:\n{where[rank]}")
            lines.append(f"--- process {rank}: " + ("had finished" if kind == "result" else str(said)))
        raise ProcessesFailed("\n".join(lines))

    def _where(self, rank: int) -> str:
        """A process's stack, innermost frame first."""
        path = Path(self._folder.name) / f"where{rank}"
        os.kill(self._children[rank].pid, signal.SIGUSR1)
        for _ in range(20):
            self._children[rank].join(0.1)
            if text := path.read_text():
                return text
        return "(it does not say)"


class _File:
    """An open file, which a process that is started gets with its arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _received, (DupFd(self.number),)


def _received(file: Any) -> _File:
    return _File(file.detach())


def _work(rank: int, size: int, device: str, folder: str, pipe: Connection, output: list[_File]) -> None:
    """The life of one process."""
    for number, file in enumerate(output, 1):
        os.dup2(file.number, number)
    where = open(Path(folder) / f"where{rank}", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=where)
    if platform.system() == "Linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=_COLLECTIVE))
    pipe.send(("result", None))
    while True:
        try:
            check, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send(("result", check(*arguments)))
        except BaseException:
            pipe.send(("raised", traceback.format_exc()))
