"""examples/benchmarks/prefill_scaling.py without torchrun: one process, which sends nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/benchmarks/prefill_scaling.py"


def test_one_process_needs_no_launcher():
    flags = ["--tokens", "512", "--block-size", "64", "--top-k", "2", "--heads", "4", "--key-heads", "2", "--width", "32", "--repeats", "1"]
    alone = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, [str(EXAMPLE.parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    said = subprocess.run([sys.executable, str(EXAMPLE), *flags], env=environment, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(said.stdout)
    assert (found["processes"], found["tokens"], found["GB_sent_by_each"]) == (1, 512, 0.0) and found["milliseconds"] > 0
