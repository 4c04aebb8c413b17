"""Results of a script that measures one thing after another: each is in its file as soon as it is known, and is not measured again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from .changed_settings import changes
from .command_line import UserError, one_line

T = TypeVar("T")


class SavedResults:
    """`{"settings": ..., kind: {name: result}}` in a file, `kind` being what is measured. Results are what JSON has."""

    def __init__(self, file: Path, resume: bool, kind: str, settings: Mapping) -> None:
        """Begin the file's contents, or go on with them. Raises UserError if they are there unasked, or of other settings."""
        self._file, self._kind, self._found = file, kind, {"settings": dict(settings), kind: {}}
        with one_line("argument --output: cannot write to the folder"):
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if not resume:
                raise UserError(f"{file} is there already: go on with --resume, or choose another --output")
            with one_line(f"{file} is no result of this script"):
                self._found = json.loads(file.read_text())
                before = self._found["settings"]
            if changed := changes(before, settings):
                raise UserError(f"{file} was measured with other settings: {changed}")

    def get(self, name: str, measure: Callable[[], T]) -> T:
        """The result of that name, measured if it is not there."""
        results = self._found[self._kind]
        if name not in results:
            results[name] = measure()
            write(self._file, self._found)
        return results[name]


def write(file: Path, results: Mapping) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(file)


def check_writable(folder: Path, flag: str = "--output") -> None:
    """Raises UserError if the folder that a flag names cannot be made, or nothing be made in it. Leaves nothing behind."""
    try:
        there = next(part for part in (folder, *folder.parents) if part.exists())
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:  # which names a file that nobody asked for
        raise UserError(f"argument {flag}: cannot write to the folder {folder}: {error.strerror}") from error
