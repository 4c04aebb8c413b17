"""Runs of `examples/experiments/pretrain.py` that take seconds on a CPU: their command, and the logs that they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pretrain

STDLIB = Path(os.__file__).parent / "json", Path(os.__file__).parent / "email", Path(os.__file__).parent / "encodings"
TOY = ["--cpu", "--size", "toy", "--context", "128", "--batch-tokens", "256", "--micro-tokens", "128", "--tokens", str(256 * 12)]
TOY += ["--block-size", "16", "--top-k", "3", "--held-out-tokens", "512"]
WITH_FACTS = ["--context", "1024", "--batch-tokens", "2048", "--micro-tokens", "1024", "--tokens", str(2048 * 6), "--needle-share", "0.5"]


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Runs handle interrupts in their own way. Behind the `with` block they are handled as before it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arguments(folder: Path, text: Path, *more: str):
    return pretrain.parse(
        [*TOY, "--corpus", str(text), "--output", str(folder / "logs"), "--checkpoints", str(folder / "checkpoints"), *more]
    )


def logs(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "logs").glob("*.json"))}
