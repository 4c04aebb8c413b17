"""The processes of a measurement on several devices: those of torchrun, or this one alone; and how to end a launcher."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
import torch.distributed as dist


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The default group of torchrun's processes, or of this process without a launcher; `device`: "cuda" or "cpu"."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **alone)
    yield
    if device == "cuda":
        dist.destroy_process_group()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kill_all(process: subprocess.Popen) -> None:
    """Kill the process, if it still runs, and all its descendants: those of a launcher are in other sessions."""
    if process.poll() is not None:
        return
    launcher = psutil.Process(process.pid)
    for each in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(30)
