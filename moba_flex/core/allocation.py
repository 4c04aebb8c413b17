"""Memory that outlives the call that allocates it."""

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
    """Whether tensors created now on `device` may be cached for later calls.

    Under a dispatch mode, for example FakeTensorMode, they belong to that mode. While a CUDA graph is captured, they have no contents
    before a replay, which may compute them from other values.
    """
    return not is_under_dispatch_mode() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def stream_of(device: torch.device) -> int | None:
    """The stream that cached tensors are valid on: another one could read them before they are written or after their memory is reused."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


class _Worker(Thread):
    """Runs jobs one after another, outside of inference mode and of any memory pool."""

    def __init__(self) -> None:
        super().__init__(name="moba_flex-allocation", daemon=True)  # an executor accepts no job once the main thread has ended
        self.process, self._jobs = os.getpid(), SimpleQueue[Callable[[], None]]()
        self.start()

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # it references its results

    def __call__(self, job: Callable[[], None]) -> None:
        """Run `job` and wait for it. It must not raise."""
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
        if _worker is None or _worker.process != os.getpid():  # a forked child process has no threads
            _worker = _Worker()
        return _worker


def allocate_persistent(make: Callable[[], T], device: torch.device) -> T:
    """The result of `make`: tensors on `device` that are cached for later calls, usable inside and outside of inference mode.

    On a GPU a dedicated thread allocates them. Within `torch.cuda.use_mem_pool`, and while PyTorch warms up its own CUDA graphs
    (`torch.compile(mode="reduce-overhead")`), memory that the calling thread allocates belongs to a pool whose owner reuses it later, or
    raises because it is still in use.
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
        raise errors.pop()  # popped, since the traceback's frames would otherwise form a reference cycle that holds memory
    return made.pop()
