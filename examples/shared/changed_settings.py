"""A check before the examples continue with files of an earlier call."""

from __future__ import annotations

from collections.abc import Mapping


def changes(before: Mapping, now: Mapping) -> str:
    """The settings that have changed, "seed was 0 and is 1, top_k was 3 and is 4"; empty if none has."""
    return ", ".join(f"{name} was {before.get(name)} and is {x}" for name, x in now.items() if before.get(name) != x)
