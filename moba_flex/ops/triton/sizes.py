"""Triton's `cdiv` and `next_power_of_2` for the host: its own also serve within kernels, and take thirty times as long."""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, which is 1 or more."""
    return 1 << (n - 1).bit_length()
