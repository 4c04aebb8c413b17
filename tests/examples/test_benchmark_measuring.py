"""How `examples/benchmarks/benchmark.py` takes times and memory: samples, the median, how often within its seconds, and the peak."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from benchmarking import measure
from benchmarking.attention import FORWARD
from support.benchmark_runs import CPU, by_key, fake, run

# Times


@pytest.mark.parametrize("repeats", [5, 7])
def test_every_sample_has_inputs_of_its_own_after_a_warm_up(repeats):
    samples = []
    record = measure.measure(lambda i: samples.append(i) or (lambda: torch.ones(1)), CPU, repeats, 300)
    assert samples == list(range(repeats + 2)) and record["repeats"] == repeats


@pytest.mark.parametrize("times", [[999.0, 50.0, 9.0, 1.0, 2.0, 3.0, 4.0], [99999.0, 9000.0, 1000.0, 2000.0, 3000.0, 4000.0]])
def test_the_median_counts(monkeypatch, times):
    left = iter(times)
    monkeypatch.setattr(measure, "milliseconds", lambda *_: next(left))
    record = measure.measure(lambda i: None, CPU, 5, 300)
    wanted = times[-5:]
    assert (record["milliseconds"], record["least"], record["most"]) == (sorted(wanted)[2], min(wanted), max(wanted))
    assert next(left, None) is None


@pytest.mark.parametrize(("seconds", "repeats"), [(0.5, 1), (2.5, 2), (9, 3), (float("inf"), 3)])
def test_timings_end_after_so_many_seconds_but_one_is_made(monkeypatch, seconds, repeats):
    left = iter([7000.0, 2000.0, 2000.0, 2000.0])  # the warm-up, the call that shows memory and counts, two more
    monkeypatch.setattr(measure, "milliseconds", lambda *_: next(left))
    record = measure.measure(lambda i: None, CPU, 3, 300, seconds=seconds)
    assert record["repeats"] == repeats and record["milliseconds"] == 2000 and len(list(left)) == 3 - repeats


def test_long_calls_are_timed_once_without_a_warm_up_after_shorter_ones_of_this_process(file, monkeypatch):
    called = fake(monkeypatch, lambda query, key, value: query)

    def milliseconds(call, *_):
        call()
        return 3000.0 * called[-1] / 40

    monkeypatch.setattr(measure, "milliseconds", milliseconds)
    flags = ["--forward-only", "--systems", "fake", "--repeats", "4", "--seconds"]
    found = by_key(run(file, *flags, "4")[0])
    assert called == [40, 40, 40, 64], "a warm-up and two timings of 3 seconds each, then one of 4.8"
    assert [found["fake", FORWARD, n]["repeats"] for n in (40, 64)] == [2, 1]
    called.clear()
    run(file, *flags, "4", lengths="64 100")
    assert called == [100, 100], "the shorter length comes from the file, so that this process has compiled nothing"


# Memory


class Process:
    """In place of `psutil.Process`: how soon a real one gives freed memory back is its allocator's and its kernel's affair."""

    def __init__(self):
        self.rss, self.looked_at = 0, threading.Event()

    def memory_info(self):
        seen = SimpleNamespace(rss=self.rss)
        self.looked_at.set()
        return seen

    def hold_until_seen(self, n_bytes):
        self.rss += n_bytes
        for _ in range(2):  # the first look may have begun before
            self.looked_at.clear()
            assert self.looked_at.wait(60)
        self.rss -= n_bytes


def test_peak_memory_counts_inputs_and_the_most_that_a_call_takes_meanwhile(monkeypatch):
    process = Process()
    monkeypatch.setattr(measure.psutil, "Process", lambda: process)
    process.rss = 5000 + 100  # what was there before, and the inputs
    _, peak = measure.peak_memory(lambda: [process.hold_until_seen(n_bytes) for n_bytes in (10, 30, 20)], CPU)
    assert peak == 5000 + 100 + 30


def test_peak_memory_leaves_out_what_was_there_before():
    held = [torch.ones(20_000_000)]

    def fresh(_):
        given = torch.ones(10_000_000)
        return lambda: given.sum()

    peak = measure.measure(fresh, CPU, 1, 300)["peak_gb"]
    assert 0.039 < peak < 0.039 + held[0].nbytes / 1e9
