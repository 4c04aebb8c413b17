"""Measurements in a file: each is written as soon as it is made, and is not repeated."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.messages import shown

_LONGEST_NAME = 500  # characters of a path that are shown
Measured = dict[str, Any]


class Saved:
    """`{"about": ..., "measured": {name: result}}` in a file, or only in memory if there is none.

    Raises ValueError if the file belongs to another calibration or is not a calibration's file; OSError if it cannot be written.
    """

    def __init__(self, file: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self._file = None if file is None else file_named("file", file)
        self._found: dict[str, Any] = {"about": dict(about), "measured": {}}
        if self._file is None:
            return
        with said_of(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            exists = self._file.exists()
        if exists:
            self._found = self._read(about)
        write(self._file, self._found)  # whether that works is known before anything is measured

    def _read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with said_of(Path(str(self._file))):
                found = json.loads(Path(str(self._file)).read_text(encoding="utf-8"))
            before = dict(found["about"])
            for measured in dict(found["measured"]).values():
                dict(measured)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{self._file} holds no measurements of calibrate: name another file, or remove it") from None
        changed = [f"{name} was {before.get(name)!r} and is {x!r}" for name, x in about.items() if before.get(name) != x]
        if changed:
            raise ValueError(f"{self._file} cannot be continued: {', '.join(changed)}; name another file, or remove it")
        return dict(found)

    def get(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """The result of that name, measured if it does not exist yet."""
        results = self._found["measured"]
        if name not in results:
            begin = time.perf_counter()
            results[name] = {**measure(), "took": time.perf_counter() - begin}
            if self._file is not None:
                write(self._file, self._found)
        return {key: x for key, x in results[name].items() if key != "took"}

    def spent(self) -> tuple[int, float]:
        """The number of measurements, and their time in seconds, including those of earlier calls."""
        results = self._found["measured"].values()
        return len(results), sum(result.get("took", 0.0) for result in results)


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Write the file atomically. Raises OSError, and leaves nothing behind if it cannot be written."""
    partial = file.with_name(f"{file.name}.partial")
    with said_of(file):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, name a file in it")
        try:
            partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def file_named(name: str, file: object) -> Path:
    """The argument `name` as a path. Raises TypeError if it is no name of a file, and ValueError if no file can have it."""
    text = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be the name of a file, a str or a Path, but is {shown(file)}")
    if not Path(text).name or "\0" in text:
        raise ValueError(f"{name} must be the name of a file, but is {shown(text)}")
    return Path(text)


@contextmanager
def said_of(file: Path) -> Iterator[None]:
    """An OSError within the block names `file`, and not another that is written in its place."""
    try:
        yield
    except OSError as error:
        name = str(file) if len(str(file)) <= _LONGEST_NAME else shown(str(file))
        raise OSError(error.errno, f"{name} cannot be used: {error.strerror}") from error


def fingerprint(model: nn.Module, texts: Sequence[Tensor]) -> dict[str, str]:
    """Hashes of the weights and the texts, shortened to a few digits. They do not depend on the device."""
    weights, ids = hashlib.sha256(), hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].float().cpu()  # a sample: hashing all of a large model would take long
        weights.update(f"{name} {tuple(weight.shape)} {some.double().sum().item()!r} {some.double().square().sum().item()!r}".encode())
    for text in texts:
        ids.update(torch.as_tensor(text).numpy().tobytes())
    return {"weights": weights.hexdigest()[:12], "texts": ids.hexdigest()[:12]}
