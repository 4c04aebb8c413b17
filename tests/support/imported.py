"""What most processes of tests need, imported once: multiprocessing's fork server loads this module and forks, see `fork_server`.

Importing it all takes a process five to ten seconds of a core, and a fork of one that has done so a hundredth of that.
"""

import contextlib
import json
import os
import sys

sys.path[:] = json.loads(os.environ.pop("TESTS_SYS_PATH"))  # so that a fork imports what the tests do
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which is for CPUs alone: CUDA does not outlive a fork

import train  # noqa: E402, F401
from support import distributed_checks, generation_checks, watch_checks  # noqa: E402, F401

with contextlib.suppress(ImportError):  # of packages that not everybody has
    from shared import server  # noqa: F401
