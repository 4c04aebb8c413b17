"""What the processes of `test_watch.py` do: live, come late, or go while others wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from moba_flex.distributed import collectives, watch_processes

EXCHANGE_FAILED = "the exchange failed"


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
    """Others wait for it in an exchange until that gives up, and it for their word that it has."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    watch = watch_processes(silent=2.0, late=0.5)
    watch.at("step 7")
    said = ""
    if dist.get_rank() == 1:
        for other in (0, 2):
            dist.recv(torch.empty(1), other)
    else:
        watch.at("step 8")
        try:
            collectives.gathered(torch.ones(1), impatient)
        except RuntimeError as error:
            said = str(error)
        dist.send(torch.ones(1), 1)
    watch.end()
    return said


def one_is_killed(connections_stay: bool) -> None:
    """One of the others is in an exchange with it, the third one where no exception reaches it, as in a kernel of NCCL.

    The kernel closes its connections, at once or later; where another process has them too they stay, and the exchange ends no sooner than
    its own time is up.
    """
    pair = dist.new_group([0, 1])
    watch = watch_processes(silent=1.5)
    watch.at("step 3")
    if dist.get_rank() == 0:
        try:
            collectives.gathered(torch.ones(1), pair)
        except RuntimeError:
            print(EXCHANGE_FAILED, file=sys.stderr, flush=True)
            time.sleep(1)  # an error may take its time until a script has printed it
            raise
    if dist.get_rank() == 1:
        if connections_stay:
            subprocess.Popen(["sleep", "10"], pass_fds=connections())
        time.sleep(0.7)  # the others have heard where it is
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def connections() -> list[int]:
    """The files of this process that are connections over a network."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:  # another kind of file
            found += [number] if one.family in (socket.AF_INET, socket.AF_INET6) else []
    return found
