"""How a script starts and ends. Nothing here imports PyTorch.

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
    """Let Ctrl-C end the script quietly during its imports, and limit how long CPU threads wait in a busy loop.

    A partly imported module might catch an exception. On Linux, PyTorch's threads wait for each other in a busy loop. If another program
    uses the CPU, this makes MoBA over ten times slower. Both settings must come before the import of PyTorch.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def run_script(main: Callable[[], int]) -> None:
    """End the process with the result of `main`, or with 130 after Ctrl-C.

    A process with a process group exits immediately. On CPUs gloo's threads may still need Python's global lock. Destroying their group
    would hold that lock forever, and if Python shuts down first, they abort the process.
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
