"""`examples/launch.py` in a fork of a process that has imported what it and its script need, and the processes that it starts too.

Each of them else takes five to eight seconds of a core for the same imports. All else is as in `python examples/launch.py ...`: the
launcher, accelerate and PyTorch's elastic agent do what they do, on processes of their own with pids, sessions and exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from .processes import fork_server


class Launched:
    """`with Launched(["examples/launch.py", ...], environment, folder, output) as job: job.wait(60)`, much like subprocess.Popen.

    All processes write to `output`, which `said` reads.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path, output: Path) -> None:
        self._output, given = output, (arguments, environment, str(folder), str(output))
        self._process = fork_server().Process(target=_launch, args=given)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.is_alive():
            self._process.terminate()  # the launcher then ends its processes, which are no children of this one
            self._process.join(60)
            self._process.kill()
        self._process.join()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def said(self) -> str:
        return self._output.read_text()

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("examples/launch.py", timeout)
        return self._process.exitcode


def _launch(arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """The life of the launcher."""
    _to_file(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    n_processes = int(arguments[arguments.index("--num_processes") + 1])
    waiting = [_Waiting() for _ in range(n_processes)]
    SubprocessHandler._popen = lambda self, args, env: waiting.pop(0).begin(args, env)  # type: ignore[method-assign]
    _run(arguments)


def _to_file(output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _run(arguments: list[str]) -> None:
    """As `python -u SCRIPT ...` does."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
    runpy.run_path(arguments[0], run_name="__main__")


class _Waiting:
    """A fork that waits for what it is to run, with what PyTorch's launcher uses of subprocess.Popen.

    It is made before the launcher has threads, for none of them outlives a fork, nor lets go of a lock.
    """

    def __init__(self) -> None:
        job, self._job = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.close(self._job)
            self._live(job)
        os.close(job)

    def begin(self, command: tuple[str, ...], environment: dict[str, str]) -> _Waiting:
        python, unbuffered, *arguments = command
        assert (python, unbuffered) == (sys.executable, "-u"), command
        with open(self._job, "w") as job:
            job.write(json.dumps([arguments, environment]) + "\n")
        return self

    def _live(self, job: int) -> None:
        code = 1
        try:
            os.setsid()
            with open(job) as file:
                text = file.readline()
            if text:  # or the launcher has ended
                arguments, environment = json.loads(text)
                os.environ.clear()
                os.environ.update(environment)
                _run(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else end.code is not None
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(sys.argv, timeout)
            time.sleep(0.01)
        return code
