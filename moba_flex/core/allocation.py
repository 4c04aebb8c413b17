"""Memory that outlives the call that it was made in."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


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

    thread = Thread(target=on_the_same_stream)  # it begins outside of inference mode; an executor has none once the main thread has ended
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()  # kept here, it would keep itself, and the memory that its frames hold
    return made.pop()
