"""What the processes of `test_watch.py` do: live, come late, or go while others wait for them."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from moba_flex.distributed import collectives, watch_processes


def all_live_and_end() -> list[str]:
    """For some times the limit, at different places, and then done one after the other; twice."""
    for _ in range(2):
        watch = watch_processes(silent=1.0, late=1.0)
        for step in range(3):
            watch.at(f"step {step}")
            time.sleep(0.2)
        time.sleep(1.5 * (dist.get_rank() == 1))
        watch.end()
    return [thread.name for thread in threading.enumerate() if "moba_flex" in thread.name]


def one_is_late() -> str:
    """Others wait for it in an exchange until that gives up."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    watch = watch_processes(silent=2.0, late=0.5)
    watch.at("step 7")
    said = ""
    if dist.get_rank() == 1:
        time.sleep(4)
    else:
        watch.at("step 8")
        try:
            collectives.gathered(torch.ones(1), impatient)
        except RuntimeError as error:
            said = str(error)
    watch.end()
    return said


def one_is_killed() -> None:
    """One of the others is in an exchange with it, the third one where no exception reaches it, as in a kernel of NCCL."""
    pair = dist.new_group([0, 1])
    watch = watch_processes(silent=1.5)
    watch.at("step 3")
    if dist.get_rank() == 0:
        collectives.gathered(torch.ones(1), pair)
    if dist.get_rank() == 1:
        time.sleep(0.7)  # the others have heard where it is
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()
