"""One measurement: the median time and peak memory of a call, or the reason why there is none."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch

from .results import FULL, TOO_LONG

Call = Callable[[], object]


def attempt(fresh: Callable[[int], Call], device: torch.device, repeats: int, limit: float, **options: float | bool) -> dict:
    """`measure`; a call that fails gives a record with the reason instead of an exception."""
    try:
        return measure(fresh, device, repeats, limit, **options)
    except Exception as error:  # third-party kernels fail in many ways, and the other systems must still be measured
        said = str(error).strip() or type(error).__name__
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in said or "can't allocate memory" in said
        return {"skipped": FULL} if full else {"failed": said.splitlines()[0][:200]}


def measure(
    fresh: Callable[[int], Call],
    device: torch.device,
    repeats: int,
    limit: float,
    seconds: float = math.inf,
    warm: bool = False,
) -> dict:
    """The median of `repeats` timings in milliseconds, and the peak memory of a call in gigabytes, including its inputs.

    `fresh(i)` gives the call on the i-th random inputs. The first call compiles and warms up. The second call measures memory and gives an
    estimate of the time. If all calls would take more than `limit` seconds, the record says so and has only the estimate. No timing begins
    once the timings have taken `seconds`. `warm`: shorter calls have compiled everything, so there is no warm-up.
    """
    before = release(device)
    if not warm:
        milliseconds(fresh(0), device)
    estimate, peak = peak_memory(fresh(1), device)
    # A long call needs no more warm-up. Short ones are timed several at a time, so that launches overlap with work.
    times = [estimate] if estimate >= 1000 else []
    together = min(10, max(1, int(20 / estimate)))
    if (record := over_limit(estimate * together, repeats - len(times), limit)) is not None:
        return record
    for i in range(len(times), repeats):
        if times and sum(times) * together >= seconds * 1000:
            break
        times.append(milliseconds(fresh(i + 2), device, together))
    record = {"milliseconds": statistics.median(times), "least": min(times), "most": max(times), "repeats": len(times)}
    return record | {"peak_gb": (peak - before) / 1e9}


def over_limit(estimate: float, calls: int, limit: float) -> dict | None:
    """The record of a measurement that is skipped because `calls` of `estimate` milliseconds exceed `limit` seconds, or None."""
    if estimate * calls <= limit * 1000:
        return None
    return {"skipped": TOO_LONG, "estimate": estimate}


def milliseconds(call: Call, device: torch.device, together: int = 1) -> float:
    """The time of one of `together` consecutive calls: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(together):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / together
    start = time.perf_counter()
    for _ in range(together):
        call()
    return (time.perf_counter() - start) / together * 1000


def peak_memory(call: Call, device: torch.device) -> tuple[float, int]:
    """The call's milliseconds, and the peak of bytes in use during it: the GPU allocator's, or the resident size of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(call, device)
        return taken, torch.cuda.max_memory_allocated()
    process, seen, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        taken = milliseconds(call, device)
    finally:
        done.set()
        watcher.join()
    return taken, max([*seen, process.memory_info().rss])


def release(device: torch.device) -> int:
    """Free memory left by earlier calls. Returns the bytes that do not count as a call's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return 0
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory, which would hide the next call's use
        library.malloc_trim(0)
    return psutil.Process().memory_info().rss
