"""Scripts of `examples/` in forks of a process that has imported what they need; by `examples/launch.py`, so are those that it starts.

A process takes five to eight seconds of a core for these imports. All else is as in `python SCRIPT ...`: processes with pids, sessions,
signals and exit codes of their own. Only their start is another one: tests of that start a new Python.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from .processes import fork_server

ROOT = Path(__file__).parents[2]


class Script:
    """`with Script(["examples/train.py", ...], environment, output) as script: script.wait(60)`, much like subprocess.Popen.

    It writes to the file or named pipe `output`, and its errors to `errors` if there is one. Its folder is the root of the repository.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], output: Path, errors: Path | None = None) -> None:
        self.name, files = arguments[0], (str(output), str(errors or output))
        self._process = fork_server().Process(target=_live, args=(arguments, environment, files))
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.terminate()  # a launcher then ends its processes, which are no children of this one
            self._process.join(60)
            self._process.kill()
        self._process.join()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return code

    def wait_for(self, words: str, file: Path, timeout: float = 120) -> None:
        """Until the words stand in a file that it writes."""
        deadline = time.monotonic() + timeout
        while not file.exists() or words not in file.read_text():
            assert self._process.is_alive() and time.monotonic() < deadline, f"{self.name} did not write {words!r} to {file}"
            time.sleep(0.01)


def _live(arguments: list[str], environment: dict[str, str], files: tuple[str, str]) -> None:
    """The life of the script, or of the launcher."""
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    n_processes = [int(arguments[i]) for i in range(1, len(arguments)) if arguments[i - 1] in ("--num_processes", "--nproc-per-node")]
    waiting = [_Waiting() for _ in range(sum(n_processes[:1]))]
    SubprocessHandler._popen = lambda self, args, env: waiting.pop(0).begin(args, env)  # type: ignore[method-assign]
    _run(arguments)


def _run(arguments: list[str]) -> None:
    """As `python -u SCRIPT ...` does, or `python -u -m MODULE ...`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
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
