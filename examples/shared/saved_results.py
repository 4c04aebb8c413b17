"""Results of a script in a file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .command_line import UserError


def write(file: Path, results: Mapping) -> None:
    """Write the file atomically."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(file)


def check_writable(folder: Path, flag: str = "--output") -> None:
    """Raise UserError if the folder named by a flag cannot be created or written to. Leaves nothing behind."""
    try:
        there = next(part for part in (folder, *folder.parents) if part.exists())
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:  # its own message names a temporary file
        raise UserError(f"argument {flag}: cannot write to the folder {folder}: {error.strerror}") from error
