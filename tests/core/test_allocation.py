"""What outlives a call is made where no memory pool of the caller's is in force."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from moba_flex.core import layout_builders
from moba_flex.core.allocation import allocate_persistent
from moba_flex.core.layout import BlockLayout
from moba_flex.core.layout_builders import _persistent_layout, dense_layout

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def streams(monkeypatch) -> list:
    """The streams that were made current, each with its thread: stand-ins for those of a GPU."""
    seen = []

    @contextlib.contextmanager
    def stream(which):
        seen.append((which, threading.get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's stream on {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return seen


def test_on_a_gpu_another_thread_makes_it_on_the_same_stream(streams):
    assert allocate_persistent(threading.get_ident, GPU) != threading.get_ident()
    ((stream, thread),) = streams
    assert stream == "the caller's stream on cuda:1"
    assert thread != threading.get_ident()


def test_elsewhere_the_caller_makes_it(streams):
    assert allocate_persistent(threading.get_ident, CPU) == threading.get_ident()
    assert not streams


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_is_made_in_inference_mode_serves_out_of_it(streams, device):
    with torch.inference_mode():
        assert not allocate_persistent(lambda: torch.zeros(1), device).is_inference()
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_errors_reach_the_caller(streams, device):
    with pytest.raises(ZeroDivisionError):
        allocate_persistent(lambda: 1 // 0, device)


def test_an_error_holds_no_memory_once_it_is_handled(streams):
    seen = []

    def runs_out() -> None:
        first = torch.empty(8)
        seen.append(weakref.ref(first))
        raise torch.OutOfMemoryError

    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            allocate_persistent(runs_out, GPU)
        assert seen[0]() is None
    finally:
        gc.enable()


PROGRAM = """
import contextlib, threading, torch
from moba_flex.core.allocation import allocate_persistent

torch.cuda.current_stream, torch.cuda.stream = lambda device: None, lambda stream: contextlib.nullcontext()
main = threading.main_thread()
threading.Thread(target=lambda: (main.join(), print("made", allocate_persistent(lambda: 7, torch.device("cuda", 0))))).start()
"""


@pytest.mark.skipif((3, 12, 0) <= sys.version_info[:3] < (3, 12, 2), reason="Python itself starts no threads then (its issue 113964)")
def test_threads_that_go_on_when_the_main_thread_has_ended_are_served(fresh):
    done = fresh.run(PROGRAM)
    assert done.stdout == "made 7\n", done.stderr


def test_each_stream_of_a_gpu_has_layouts_of_its_own(monkeypatch, streams):
    """Nothing orders two streams: one could read what the other has yet to write."""
    real = layout_builders._dense_layout
    monkeypatch.setattr(layout_builders, "_dense_layout", lambda *settings: real(*settings[:-1], CPU))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def layout_on(stream: int) -> BlockLayout:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
        return dense_layout(2, 300, 300, 32, 32, GPU)

    _persistent_layout.cache_clear()
    first, second = layout_on(0), layout_on(7)
    assert first is not second
    assert first.own is not second.own
    assert layout_on(0) is first
    _persistent_layout.cache_clear()


def test_layouts_that_later_calls_use_and_what_they_keep_are_made_so(monkeypatch):
    made = []
    recorded = lambda make, device: made.append(device) or allocate_persistent(make, device)  # noqa: E731
    for module in ("layout", "layout_builders"):
        monkeypatch.setattr(f"moba_flex.core.{module}.allocate_persistent", recorded)
    _persistent_layout.cache_clear()
    layout = dense_layout(2, 300, 300, 32, 32, CPU)
    assert dense_layout(2, 300, 300, 32, 32, CPU) is layout
    part = layout.part(slice(0, 1), slice(0, 10))
    assert part.cached(("name",), lambda: 3) == layout.part(slice(0, 1), slice(0, 10)).cached(("name",), lambda: 4) == 3
    assert made == [CPU] * 3  # the layout, its part, and what the part keeps


def test_what_is_made_within_may_ask_for_more_and_from_many_threads(streams):
    def nested(n: int) -> int:
        return n if n == 0 else 1 + allocate_persistent(lambda: nested(n - 1), GPU)

    found: list[int] = []
    threads = [threading.Thread(target=lambda n=n: found.append(allocate_persistent(lambda: nested(n), GPU))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))


FORKED = """
import contextlib, os, torch
from moba_flex.core.allocation import allocate_persistent

torch.cuda.current_stream, torch.cuda.stream = lambda device: None, lambda stream: contextlib.nullcontext()
gpu = torch.device("cuda", 0)
allocate_persistent(lambda: 1, gpu)
child = os.fork()
if child == 0:
    print("made", allocate_persistent(lambda: 2, gpu), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_process_is_served(fresh):
    assert fresh.run(FORKED).stdout == "made 2\n"
