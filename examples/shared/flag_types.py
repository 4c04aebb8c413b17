"""The values that the examples' flags accept, as `type=` of argparse."""

from __future__ import annotations

import argparse
import math
from typing import TypeVar

T = TypeVar("T", int, float)


def count(text: str) -> int:
    """An integer of at least 1."""
    return _checked(number := int(text), number >= 1, "at least 1")


def count_from_0(text: str) -> int:
    """An integer of at least 0."""
    return _checked(number := int(text), number >= 0, "at least 0")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _checked(number := float(text), 0 <= number <= 1, "from 0 to 1")


def positive(text: str) -> float:
    return _checked(number := float(text), 0 < number < math.inf, "finite and above 0")


def not_negative(text: str) -> float:
    return _checked(number := float(text), 0 <= number < math.inf, "finite and at least 0")


def positive_or_inf(text: str) -> float:
    """A number above 0; infinity means no limit."""
    return _checked(number := float(text), number > 0, "above 0")


def duration(text: str) -> float:
    """Seconds or minutes, at least 0; infinity means no limit."""
    return _checked(number := float(text), number >= 0, "at least 0")


def _checked(number: T, fits: bool, words: str) -> T:
    if not fits:
        raise argparse.ArgumentTypeError(f"must be {words}, but is {number:g}")
    return number
