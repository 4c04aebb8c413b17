"""Memory that outlives the call that it was made in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def kept(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns: tensors on `device` that are kept for later calls, for use in inference mode and out of it.

    On a GPU a thread of its own makes them. Within `torch.cuda.use_mem_pool`, and while PyTorch warms up for CUDA graphs of its own
    (`torch.compile(mode="reduce-overhead")`), the memory that the calling thread asks for belongs to somebody else, who gives it to others
    afterwards, or finds what is still there and raises.
    """
    if device.type != "cuda":
        with torch.inference_mode(False):
            return make()
    stream = torch.cuda.current_stream(device)

    def on_the_same_stream() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:  # which begins outside of inference mode
        return thread.submit(on_the_same_stream).result()
