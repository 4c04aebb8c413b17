"""Results of a script that measures one thing after another: each is in its file as soon as it is known, and is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from changed_settings import changes
from demo_weights import DemoError
from llama import one_line
from needle import write

T = TypeVar("T")


class KeptResults:
    """`{"settings": ..., kind: {name: result}}` in a file, `kind` being what is measured. Results are what JSON has."""

    def __init__(self, file: Path, resume: bool, kind: str, settings: Mapping) -> None:
        """Begin the file's contents, or go on with them. Raises DemoError if they are there unasked, or of other settings."""
        self._file, self._kind, self._found = file, kind, {"settings": dict(settings), kind: {}}
        with one_line("cannot write to the folder"):
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if not resume:
                raise DemoError(f"{file} is there already: go on with --resume, or choose another --output")
            with one_line(f"{file} is no result of this script"):
                self._found = json.loads(file.read_text())
                before = self._found["settings"]
            if changed := changes(before, settings):
                raise DemoError(f"{file} was measured with other settings: {changed}")

    def get(self, name: str, measure: Callable[[], T]) -> T:
        """The result of that name, measured if it is not there."""
        results = self._found[self._kind]
        if name not in results:
            results[name] = measure()
            write(self._file, self._found)
        return results[name]
