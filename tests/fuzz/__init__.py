"""Random cases in a loop: `python -m tests.fuzz --cases 100000 --seed 0`, from the repository's root. `__main__.py` says what it can do."""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:  # `support` is imported as pytest does it
    sys.path.insert(0, _TESTS)
