"""How a script ends: with its exit code, also while threads of its process group still want Python's lock."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fresh import FreshPython

PROGRAM = """
import sys
sys.path.insert(0, "examples")
import torch, torch.distributed as dist
from shared.startup import run_script

def busy(_):
    sum(range(10_000_000))

def main():
    dist.init_process_group("gloo", store=dist.FileStore({store!r}, 1), rank=0, world_size=1)
    for _ in range(20):
        dist.all_reduce(torch.ones(1), async_op=True).get_future().then(busy)
    print("done")
    {end}

run_script(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("raise OSError('no disk')", 1, "OSError: no disk\n"),
    ],
)
def test_a_process_with_a_group_ends_with_its_own_exit_code(end: str, code: int, said: str, fresh: FreshPython, tmp_path: Path) -> None:
    ended = fresh.run(PROGRAM.format(store=str(tmp_path / "store"), end=end))
    assert ended.returncode == code and ended.stdout == "done\n" and ended.stderr.endswith(said), ended.stderr
