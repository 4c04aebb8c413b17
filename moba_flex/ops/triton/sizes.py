"""Integers for the host, and what a GPU has. Triton's versions of the former also work within kernels, and take thirty times as long."""

from __future__ import annotations

from functools import lru_cache

import torch


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for `n >= 1`."""
    return 1 << (n - 1).bit_length()


def padded_width(width: int) -> int:
    """The number of columns of a tile for a head dimension: a power of two, at least 16 for matrix products."""
    return max(16, next_power_of_2(width))


@lru_cache(maxsize=16)
def gpu_memory(device: torch.device) -> tuple[int, int]:
    """The maximum shared memory per program in bytes, and the major compute capability of an NVIDIA GPU, 0 for others."""
    if device.type != "cuda":  # Triton's interpreter has no limit
        return 1 << 20, 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:  # ROCm does not report the former
        return 64 << 10, 0
    return properties.shared_memory_per_block_optin, properties.major  # type: ignore[attr-defined]  # missing from PyTorch's types
