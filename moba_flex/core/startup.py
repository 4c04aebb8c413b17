"""What `python -m moba_flex.calibrate` needs before PyTorch is imported: Python imports the package before the command's own module."""

from __future__ import annotations

import os
import signal
import sys

COMMAND = "moba_flex.calibrate"


def is_command() -> bool:
    """Whether Python imports the package to run the command, and not for another program."""
    return sys.argv[:1] == ["-m"] and COMMAND in sys.orig_argv  # "-m" stands there until Python has found the module


def prepare_command() -> None:
    """Let Ctrl-C end the command quietly during its imports, and limit how long CPU threads wait in a busy loop.

    A partly imported module might catch an exception. GNU OpenMP reads the variable when PyTorch is imported; without it threads on a busy
    CPU can wait for each other for minutes.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
