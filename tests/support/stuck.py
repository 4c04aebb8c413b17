"""Checks for `support.processes` itself. They import PyTorch alone: a new group has them at once."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist


def here() -> torch.device:
    """Processes that are to use CPUs see no GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def one_hangs() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait()
    dist.barrier()
