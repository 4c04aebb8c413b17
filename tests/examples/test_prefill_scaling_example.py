"""examples/benchmarks/prefill_scaling.py without torchrun: one process, which sends nothing."""

from __future__ import annotations

import json
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/benchmarks/prefill_scaling.py"
PROGRAM = f"""
import os, runpy, sys
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
flags = "--tokens 512 --block-size 64 --top-k 2 --heads 4 --key-heads 2 --width 32 --repeats 1"
sys.argv = [{str(EXAMPLE)!r}, *flags.split()]
sys.path[:1] = [{str(EXAMPLE.parent)!r}, {str(EXAMPLE.parents[2])!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_process_needs_no_launcher(fresh):
    done = fresh.run(PROGRAM)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["processes"], found["tokens"], found["GB_sent_by_each"]) == (1, 512, 0.0) and found["milliseconds"] > 0
