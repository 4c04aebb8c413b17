"""What the examples' flags may be, as `type=` of argparse."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """At least one of something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {number}")
    return number


def fraction(text: str) -> float:
    """From none to all."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, but is {number:g}")
    return number
