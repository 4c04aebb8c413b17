"""Programs in a Python that has loaded transformers' model classes and nothing of moba_flex.

Loading them takes five seconds. One process does it once, and runs each program in a fork of itself, to the end of the interpreter and as
`python -c` would.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
SECONDS = 240.0  # that a program may take, with the imports of the first one, on a busy machine
_SERVER = """
import json, os, sys, warnings
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
for line in sys.stdin:
    program, *files = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    break
else:
    raise SystemExit
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class FreshPython:
    """`with FreshPython() as fresh: fresh.run("import moba_flex")`."""

    def __init__(self, time_limit: float = SECONDS) -> None:
        self._time_limit = time_limit
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FreshPython:
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)

    def run(self, program: str) -> Done:
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen([sys.executable, "-c", _SERVER], cwd=ROOT, text=True, start_new_session=True, **pipes)
        with TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            self._process.stdin.write(json.dumps([program, *map(str, files)]) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], self._time_limit)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.communicate()
                self._process = None
                raise TimeoutError(f"no end after {self._time_limit:g} seconds: {program}\n{files[1].read_text()}")
            returncode = int(self._process.stdout.readline())
            return Done(returncode, *(file.read_text() for file in files))
