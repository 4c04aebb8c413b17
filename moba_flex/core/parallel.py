"""Runs pieces of CPU work in parallel in a few threads, each with its share of PyTorch's intra-op threads.

PyTorch splits every operation among all threads and waits for the last of them. On a busy machine, each of thousands of small operations
can then wait for an occupied core, up to a time slice of the scheduler. A piece, or a small call, that one thread computes from start to
end does not wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from .upstream import is_under_dispatch_mode

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8  # with more, threads would wait for the GIL between operations

_lock = threading.Lock()
_workers: ThreadPoolExecutor | None = None
_of_worker = threading.local()


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """Yields `function(item)` for each item, in order. Workers run ahead by at most twice as many items as there are workers.

    Items run one after another in the calling thread on a GPU, with one thread, within a worker, and under a dispatch mode.
    """
    n_threads = torch.get_num_threads() if device.type == "cpu" else 1
    n_workers = min(n_threads, len(items), MOST_WORKERS)
    if n_workers < 2 or hasattr(_of_worker, "is_one") or is_under_dispatch_mode():
        yield from map(function, items)
        return
    share, inference = n_threads // n_workers, torch.is_inference_mode_enabled()
    results: list[Future[Result]] = [Future() for _ in items]
    numbers, ahead, stopped = iter(range(len(items))), threading.Semaphore(2 * n_workers), False

    def work() -> None:
        _of_worker.is_one = True
        if torch.get_num_threads() != share:  # the getter must come first: a thread's first use resets its number to the last one set
            torch.set_num_threads(share)
        with torch.inference_mode(inference), torch.no_grad():
            while ahead.acquire() and not stopped and (number := next(numbers, None)) is not None:
                try:
                    results[number].set_result(function(items[number]))
                except BaseException as error:
                    results[number].set_exception(error)

    workers = [_pool().submit(work) for _ in range(n_workers)]
    try:
        for number, result in enumerate(results):
            yield result.result()
            results[number] = Future()  # releases the result
            ahead.release()
    finally:  # nothing continues in the background, even after an error or Ctrl-C
        stopped = True
        ahead.release(n_workers)
        wait(workers)
        torch.set_num_threads(n_threads)  # new threads start with the last number set


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """If `wanted`, operations of this thread run on one thread within the context."""
    n_threads = torch.get_num_threads() if wanted else 1
    if n_threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if n_threads > 1:
            torch.set_num_threads(n_threads)


def _pool() -> ThreadPoolExecutor:
    global _workers
    with _lock:
        if _workers is None:
            _workers = ThreadPoolExecutor(MOST_WORKERS, "moba_flex")
        return _workers


def _forget() -> None:
    """Resets the pool in a forked child process, which has none of its threads."""
    global _workers, _lock
    _workers, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
