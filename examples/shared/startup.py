"""How a script begins and ends. Nothing here imports PyTorch.

if __name__ == "__main__":
    prepare()  # before PyTorch is imported
...
if __name__ == "__main__":
    run_script(main)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def prepare() -> None:
    """Let Ctrl-C end the script quietly during its imports, and let the threads of a busy CPU give up their turn early.

    An exception during an import may be caught by a module that is half imported. On Linux, PyTorch's threads wait for each other in a
    busy loop; beside another busy program that makes MoBA on the CPU over ten times slower. Both must be set before PyTorch is imported.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def run_script(main: Callable[[], int]) -> None:
    """End the process with what `main` returns, or with 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
