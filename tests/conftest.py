"""How tests start: environment, paths, how many processes. The fixtures that all share are in `support/fixtures.py`."""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

import pytest
from hypothesis import settings

# Beside other busy programs PyTorch's threads lose minutes waiting for each other in a busy loop, see examples/shared/startup.py. Only
# possible before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Tests run side by side, a process for each core. Threads in each of them, and in what they start, would only take turns.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    # Each has one GPU, the next process the next one. Tests of several processes use all of them.
    gpus = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(glob("/dev/nvidia[0-9]*")))))).split(",") if x]
    if gpus and os.environ.get("MOBA_FLEX_DISTRIBUTED_TESTS") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(gpus)]

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples/experiments"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

pytest.register_assert_rewrite("support")  # so that what helpers assert says what it compared, as in test files

settings.register_profile("same cases in every run", derandomize=True, deadline=None)
settings.load_profile("same cases in every run")

MOST_PROCESSES = 8  # each takes a gigabyte or more, and imports PyTorch and transformers anew


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands tests out to others runs none. Without the fixtures it need not import PyTorch before they start."""
    hands_out = config.getoption("numprocesses", 0) and not config.getoption("collectonly") and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto`, the default, starts: one for each core that this process may use, up to eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the demo's model come first. They take longest, so that no process is left with them when the others are done; and as one
    process begins with all of them, no other one waits for it to read the model."""
    items.sort(key=lambda item: item.get_closest_marker("weights") is None)
