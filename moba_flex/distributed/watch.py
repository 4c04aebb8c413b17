"""Which process is missing. A thread in each process writes a heartbeat and its current place to the process group's store, and reads those
of the others.

A collective cannot tell: on GPUs it waits for a dead process inside a kernel, and gloo only names a port. A killed process stops writing,
and so does one whose machine hangs. A process that is busy elsewhere still writes its place, from its thread.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..core.messages import shown
from ..core.upstream import connection_to_store

_PROCESSES_PER_SECOND = 64  # that a process reads; with more processes it reads less often
_RUNS, _FAILED, _ENDED = "runs", "failed", "ended"
_numbers = itertools.count()  # of watches, the same on all processes
_current: Watch | None = None  # this process's watch


def watch_processes(silent: float = 30.0, late: float = 240.0) -> Watch:
    """Let the processes of a job monitor each other: if one is killed or hangs, the others print which one, and exit.

    All processes call it together, after `init_process_group`. In each, a thread writes a heartbeat to the group's store about once a
    second.

    Args:
        silent: seconds without a heartbeat after which the other processes print a sentence that names the silent one, and exit with code
            1, wherever they are. Python must be able to run a thread within that time, so do not set it too low. PyTorch's launcher kills
            the others 30 seconds after one has died: a program that continues after SIGTERM needs a lower value for its sentence to be
            printed.
        late: seconds that a process waits at one place, see `Watch.at`, before it prints which processes have not reached it. It continues
            to wait: PyTorch ends it when the collective times out (10 minutes with NCCL, 30 with gloo, unless `init_process_group` says
            otherwise).

    Returns:
        The `Watch`. A job has one at a time; a second call ends the first. Errors of failed exchanges name the missing process while there
        is one.

    Raises:
        ValueError: there is no process group, or a number is not above 0.

    >>> import torch.distributed as dist
    >>> from moba_flex.distributed import watch_processes
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> watch = watch_processes()
    >>> for step in range(3):
    ...     watch.at(f"step {step}")
    >>> watch.end()
    >>> dist.destroy_process_group()
    """
    global _current
    for name, value in (("silent", silent), ("late", late)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name} must be a number of seconds above 0, but is {shown(value)}")
    if not dist.is_initialized():
        raise ValueError("watch_processes needs a process group: call torch.distributed.init_process_group first")
    if _current is not None:
        _current.end()
    _current = Watch(dist.get_rank(), dist.get_world_size(), silent, late)
    return _current


def missing_processes() -> str | None:
    """After a failed collective: a sentence that names the missing processes; None without a watch, or if none is missing."""
    return None if _current is None else _current.failed()


@dataclass(frozen=True)
class _Word:
    """What a process reports about itself."""

    state: str
    beat: int  # increases while the process lives
    n_places: int  # places reached so far
    place: str
    where: str  # pid and host

    def dumps(self) -> str:
        return json.dumps(list(vars(self).values()))

    @staticmethod
    def loads(text: bytes) -> _Word:
        return _Word(*json.loads(text))


class Watch:
    """Monitors the other processes of a job. Created by `watch_processes`.

    >>> import torch.distributed as dist
    >>> from moba_flex.distributed import watch_processes
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> watch = watch_processes(silent=60.0)
    >>> watch.at("the first evaluation")
    >>> watch.end()
    >>> dist.destroy_process_group()
    """

    def __init__(self, rank: int, size: int, silent: float, late: float) -> None:
        self.rank, self.size, self._silent, self._late = rank, size, silent, late
        self._interval = min(1.0, silent / 5) * max(1.0, size / _PROCESSES_PER_SECOND)
        self._state, self._beat, self._n_places, self._place = _RUNS, 0, 0, "the start"
        self._where = f"pid {os.getpid()} on {socket.gethostname()}"
        self._arrived = time.monotonic()
        self._spared_until = -math.inf  # no exit before this time: the caller of `failed` reports the missing process
        self._told: str | None = None  # the place for which late processes were reported
        self._lock, self._stop = threading.Lock(), threading.Event()
        number = next(_numbers)
        self._keys = [f"moba_flex/watch/{number}/{r}" for r in range(size)]
        self._store = connection_to_store()
        self._say()
        self._store.wait(self._keys, timedelta(seconds=max(60.0, silent)))
        now = time.monotonic()
        self._heard = {r: (word, now) for r, word in enumerate(self._read())}
        self._thread = threading.Thread(target=self._run, name="moba_flex watch", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Record that this process has reached a place that all processes reach, such as "step 17". Cheap: only the thread writes it."""
        self._place, self._arrived = place, time.monotonic()
        self._n_places += 1

    def end(self) -> None:
        """Stop watching. The other processes no longer expect heartbeats of this one."""
        global _current
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._state = _ENDED
        with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended too
            self._say()
        if _current is self:
            _current = None

    def failed(self) -> str | None:
        """After a failure: a sentence that names the missing processes, or the lost store; else None. Takes about five seconds."""
        self._state, self._spared_until = _FAILED, math.inf
        try:
            for _ in range(6):
                self._say()
                time.sleep(0.75 * self._interval)
                self._listen()
        except RuntimeError:
            return f"the store of the process group cannot be reached: process 0 or the launcher, which holds it, has ended{self._here()}"
        finally:
            self._spared_until = time.monotonic() + self._silent
        gone = [r for r in self._others(_RUNS) if self._quiet_for(r) > 3 * self._interval]
        return self._sentence("ended without a word", gone) or self._sentence("has not come", self._behind())

    def _run(self) -> None:
        reached = time.monotonic()
        while not self._stop.wait(self._interval):
            try:
                if not dist.is_initialized():  # the group was destroyed, so this process is no longer part of it
                    self._state = _ENDED
                    return self._say()
                self._say()
                self._listen()
                reached = time.monotonic()
            except RuntimeError:
                if time.monotonic() - reached > self._silent:
                    self._end_process(
                        f"the store of the process group has not been reached for {self._silent:g} seconds: process 0 or the launcher, "
                        f"which holds it, has ended{self._here()}"
                    )
                continue
            gone = [r for r in self._others(_RUNS, _FAILED) if self._quiet_for(r) > self._silent]
            if sentence := self._sentence(f"has not been heard of for {self._silent:g} seconds: it was killed, or hangs", gone):
                self._end_process(sentence)
            if time.monotonic() - self._arrived > self._late and self._told != self._place:
                self._told = self._place
                if sentence := self._sentence(f"is missing for {self._late:g} seconds", self._behind()):
                    print(f"moba_flex: {sentence}", file=sys.stderr, flush=True)

    def _end_process(self, sentence: str) -> None:
        if time.monotonic() < self._spared_until:
            return
        print(f"moba_flex: {sentence}; this process ends", file=sys.stderr, flush=True)
        os._exit(1)

    def _say(self) -> None:
        with self._lock:
            self._beat += 1
            self._store.set(self._keys[self.rank], _Word(self._state, self._beat, self._n_places, self._place, self._where).dumps())

    def _read(self) -> list[_Word]:
        with self._lock:
            return [_Word.loads(text) for text in self._store.multi_get(self._keys)]

    def _listen(self) -> None:
        words, now = self._read(), time.monotonic()
        for r, word in enumerate(words):
            if word != self._heard[r][0]:
                self._heard[r] = word, now

    def _others(self, *states: str) -> list[int]:
        return [r for r, (word, _) in self._heard.items() if r != self.rank and word.state in states]

    def _quiet_for(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank][1]

    def _behind(self) -> list[int]:
        return [r for r in self._others(_RUNS) if self._heard[r][0].n_places < self._n_places]

    def _sentence(self, what: str, ranks: list[int]) -> str | None:
        if not ranks:
            return None
        which = ", ".join(f"process {r} of {self.size} ({self._heard[r][0].where}, last at {self._heard[r][0].place})" for r in ranks[:8])
        return f"{which}{' and others' if len(ranks) > 8 else ''} {what}{self._here()}"

    def _here(self) -> str:
        return f"; process {self.rank} was at {self._place}"
