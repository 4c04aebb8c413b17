"""Pieces of work on a CPU, side by side in a few threads, each of which computes with its share of PyTorch's threads.

PyTorch cuts every operation up among all threads and waits for the last of them. Thousands of small operations then wait for a core that
has something else to do, a time slice of the system each. A piece that one thread computes from start to end waits for nobody, and nor
does a small call that one thread computes alone.
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

MOST_WORKERS = 8  # between operations only one thread runs Python, so that more of them would wait for each other

_lock = threading.Lock()
_workers: ThreadPoolExecutor | None = None
_of_worker = threading.local()


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """`function(item)` of each, in order. Results wait for those before them, twice as many as there are threads at most.

    On a GPU, with one thread, and where a dispatch mode watches this thread, one comes after the other in this thread.
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
        if torch.get_num_threads() != share:  # asked for first, since a thread takes what was set last when it first needs to know
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
            results[number] = Future()  # whose result is nobody's now
            ahead.release()
    finally:  # after an error or Ctrl-C too nothing goes on in the background
        stopped = True
        ahead.release(n_workers)
        wait(workers)
        torch.set_num_threads(n_threads)  # PyTorch gives what was set last to threads that are yet to come


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Within it no operation of this thread is cut up among PyTorch's threads, if that is wanted."""
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
    """In a child process, which has none of the threads."""
    global _workers, _lock
    _workers, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
