"""The environment of a measurement."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

import moba_flex


def environment(device: torch.device) -> dict[str, str]:
    """The device, all versions that a time depends on, and a hash of this package's source, which changes more often than its version."""
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, threads: {torch.get_num_threads()}"}
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "flash_moba", "moba"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(moba_flex.__file__).parent
    source = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py"))))
    return found | {"moba_flex": f"{moba_flex.__version__}, source {source.hexdigest()[:8]}"}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")
