"""Start a training script on several processes: `accelerate launch`, with the script's own message printed last.

    python examples/launch.py --config_file examples/accelerate/ddp.yaml examples/train.py --model NAME --text *.txt --output run
    python examples/launch.py --config_file examples/accelerate/cpu.yaml examples/train.py --tiny --text README.md --output run

All flags before the script are those of `accelerate launch`. When a process fails, or after Ctrl-C, `accelerate launch` prints forty lines
of its own. Here the script's message is the last one, and the exit code is that of the script.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

import torch.distributed.run  # noqa: F401 - creates the loggers used below
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str] | None = None) -> int:
    """Run the job, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    signal.signal(signal.SIGINT, lambda *_: None)  # the processes get Ctrl-C too: wait for them to end
    for name in list(logging.root.manager.loggerDict):  # each has its own level
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        killed = {rank: x for rank, x in error.failures.items() if x.exitcode < 0 and -x.exitcode != signal.SIGTERM}
        if killed:  # these printed nothing, and the others failed without them, or were terminated and then killed by the launcher
            rank = min(killed, key=lambda rank: killed[rank].timestamp)
            number = -killed[rank].exitcode
            advice = ": is there enough memory?" if number == signal.SIGKILL else ""
            print(f"launch.py: process {rank} was ended by signal {number} ({signal.Signals(number).name}){advice}", file=sys.stderr)
            return 128 + number
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
