"""Results of a script in a file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .command_line import UserError


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
