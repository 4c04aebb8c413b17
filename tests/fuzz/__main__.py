"""`python -m tests.fuzz`: see `run.py`. A module that runs as `__main__` cannot be imported by the processes that it starts."""

import sys

from .run import main

sys.exit(main())
