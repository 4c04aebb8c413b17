"""Compile Triton kernels for GPUs that are not there: what a call would launch is compiled for a given GPU and recorded instead."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest


@dataclass(frozen=True)
class Gpu:
    """A GPU to compile for, and what one program may take of it."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str
    shared_bytes: int
    major: int  # compute capability; 0 for others than NVIDIA's
    warp: int = 32

    def __str__(self) -> str:
        return self.name


GPUS = [
    Gpu("sm_80", "cuda", 80, 166_912, 8),
    Gpu("sm_86", "cuda", 86, 101_376, 8),
    Gpu("sm_89", "cuda", 89, 101_376, 8),
    Gpu("sm_90", "cuda", 90, 232_448, 9),
    Gpu("sm_100", "cuda", 100, 232_448, 10),
    Gpu("sm_120", "cuda", 120, 101_376, 12),
    Gpu("gfx942", "hip", "gfx942", 65_536, 0, 64),
]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its name, and what one program of it takes."""

    name: str
    shared_bytes: int
    tensor_columns: int  # of a Blackwell GPU's tensor memory
    registers: int
    stack_bytes: int  # spilled registers among them


@contextmanager
def compiling_for(gpu: Gpu) -> Iterator[list[Compiled]]:
    """Within the block kernels are compiled for `gpu` and not launched. Yields what was compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 interprets kernels instead of compiling them")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget(gpu.backend, gpu.arch, gpu.warp)
    device = GPUS.index(gpu) + 1000  # kernels are kept by device
    fake = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
    )
    compiled: list[Compiled] = []
    launch, before = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_usage(self.fn.__name__, kernel, gpu))
        return kernel

    JITFunction.run, driver._active = compile_only, fake
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = launch, before


def _usage(name: str, kernel, gpu: Gpu) -> Compiled:
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    if gpu.backend != "cuda":
        return Compiled(name, shared, columns, 0, 0)
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return Compiled(name, shared, columns, found["REG"], found["STACK"])
