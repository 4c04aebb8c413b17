"""Text that exists on any machine with Python packages: their source code, and their prose (documentation, READMEs, licences).

    documents = collect([Path("/usr/lib/python3.12")], megabytes=20)
    documents["code"].train, documents["prose"].held_out

The hash of a file's bytes decides whether it is held out. Machines with different packages hold out the same of the files that they share.
No training file repeats much of a held-out file.
"""

from __future__ import annotations

import hashlib
import os
import re
import site
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

KINDS = ("prose", "code")
SMALLEST, LARGEST = 500, 1_000_000  # bytes of a file: smaller ones say little, larger ones are data
HELD_OUT_OF = 10  # one file in this many is held out
MOST_REPEATED = 0.3  # largest share of a file's lines that earlier files may contain
_PROSE = re.compile(r".*\.(md|rst)|(readme|licen[cs]e|copying|notice|changes|changelog|history|news|metadata)(\..*)?", re.IGNORECASE)
_LETTERS = re.compile(r"[^a-z]+")


@dataclass(frozen=True)
class Document:
    name: str  # the first 16 digits of the SHA-256 of the file's bytes
    text: str


@dataclass
class Split:
    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)


def default_roots() -> list[Path]:
    """The folders of the standard library and of all packages."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    found = sorted({Path(folder).resolve() for folder in folders if Path(folder).is_dir()})
    return [folder for folder in found if not any(folder.is_relative_to(other) for other in found if other != folder)]


def collect(roots: Iterable[Path], megabytes: float) -> dict[str, Split]:
    """All files of each kind under `roots`, at most `megabytes` of each: split by file, without near-duplicates.

    Files are in the order of their hashes, a mixture of all packages that is the same in every run. Raises ValueError if a root is not a
    folder.
    """
    files: dict[str, dict[str, Path]] = {kind: {} for kind in KINDS}
    for path, kind in tqdm(_walk(roots), desc="Looking for text", unit=" files"):
        files[kind].setdefault(hashlib.sha256(path.read_bytes()).hexdigest()[:16], path)
    return {kind: _split(found, megabytes * 1e6) for kind, found in files.items()}


def _walk(roots: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"text is read from folders, but {root} is none")
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                kind = "code" if name.endswith(".py") else "prose" if _PROSE.fullmatch(name) else None
                path = Path(folder, name)
                if kind and path.is_file() and SMALLEST <= path.stat().st_size <= LARGEST:
                    yield path, kind


def _split(files: dict[str, Path], most_bytes: float) -> Split:
    """Held-out files first, so that a file that repeats one of them is not trained on."""
    split, seen = Split(), set()
    for held_out in (True, False):
        limit = most_bytes / HELD_OUT_OF * (1 if held_out else HELD_OUT_OF - 1)
        documents, size = (split.held_out if held_out else split.train), 0
        for name in sorted(files):
            if is_held_out(name) == held_out and size < limit:
                text = _read(files[name])
                lines = {hash(line) for line in _fingerprints(text)}
                if lines and len(lines & seen) <= MOST_REPEATED * len(lines):
                    documents.append(Document(name, text))
                    size += len(text)
                seen |= lines
    return split


def is_held_out(name: str) -> bool:
    """Whether a file with that hash is held out, on every machine."""
    return int(name[:8], 16) % HELD_OUT_OF == 0


def _fingerprints(text: str) -> Iterator[str]:
    """The letters of each line, by which lines are compared. Short lines and copyright lines say nothing about a text's origin."""
    for line in text.lower().splitlines():
        letters = _LETTERS.sub("", line)
        if len(letters) >= 20 and not letters.startswith("copyright"):
            yield letters


def _read(path: Path) -> str:
    """The text; of a package's metadata only the description, which follows the first empty line. Empty if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return text.partition("\n\n")[2] if path.name == "METADATA" else text
