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
import traceback
from collections.abc import Callable


def prepare() -> None:
    """Let Ctrl-C end the script quietly during its imports, and let the threads of a busy CPU give up their turn early.

    An exception during an import may be caught by a module that is half imported. On Linux, PyTorch's threads wait for each other in a
    busy loop; beside another busy program that makes MoBA on the CPU over ten times slower. Both must be set before PyTorch is imported.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def run_script(main: Callable[[], int]) -> None:
    """End the process with what `main` returns, or with 130 after Ctrl-C.

    One that has a process group ends at once. On CPUs gloo's threads may still want Python's lock: to destroy their group would hold it
    for ever, and if Python ends under them they abort the process.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    code: str | int | None = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    sys.exit(code)
