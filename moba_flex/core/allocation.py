"""Memory that outlives the call that it was made in."""

from __future__ import annotations

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread
from typing import TypeVar

import torch

from .upstream import is_under_dispatch_mode

T = TypeVar("T")


def may_be_kept(device: torch.device) -> bool:
    """Whether what is made now on `device` may serve later calls.

    Under a dispatch mode, that of fake tensors say, it is for the mode alone; in a CUDA graph it has no contents before a replay, which may
    then follow from other values.
    """
    return not is_under_dispatch_mode() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def stream_of(device: torch.device) -> int | None:
    """The stream that what is kept is for: another may read it before it is written, or still when its memory has a new use."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


class _Worker(Thread):
    """Runs what it is given, one after another. It begins outside of inference mode and of every memory pool, and stays there."""

    def __init__(self) -> None:
        super().__init__(name="moba_flex-allocation", daemon=True)  # an executor takes nothing once the main thread has ended
        self.process, self._jobs = os.getpid(), SimpleQueue[Callable[[], None]]()
        self.start()

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # which holds what it has made

    def __call__(self, job: Callable[[], None]) -> None:
        """Run it and wait for it. It must raise nothing."""
        if current_thread() is self:
            return job()
        done = Event()

        def and_say_so() -> None:
            job()
            done.set()

        self._jobs.put(and_say_so)
        done.wait()


_worker: _Worker | None = None
_lock = Lock()


def _the_worker() -> _Worker:
    global _worker
    with _lock:
        if _worker is None or _worker.process != os.getpid():  # threads do not come along when a process forks
            _worker = _Worker()
        return _worker


def allocate_persistent(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns: tensors on `device` that are kept for later calls, for use in inference mode and out of it.

    On a GPU a thread of its own makes them. Within `torch.cuda.use_mem_pool`, and while PyTorch warms up for CUDA graphs of its own
    (`torch.compile(mode="reduce-overhead")`), the memory that the calling thread asks for belongs to somebody else, who gives it to others
    afterwards, or finds what is still there and raises.
    """
    if device.type != "cuda":
        with torch.inference_mode(False):
            return make()
    stream = torch.cuda.current_stream(device)

    made: list[T] = []
    errors: list[BaseException] = []

    def on_the_same_stream() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(make())
        except BaseException as error:
            errors.append(error)

    _the_worker()(on_the_same_stream)
    if errors:
        raise errors.pop()  # kept here, it would keep itself, and the memory that its frames hold
    return made.pop()
