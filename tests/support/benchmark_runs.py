"""Runs of `examples/benchmarks/benchmark.py` on a CPU, small ones, and a system whose calls are counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarking import measure
from benchmarking.attention import SYSTEMS, Settings, System

CPU = torch.device("cpu")
TOY = Settings(1, 4, 2, 16, block_size=16, top_k=2, dtype="float32", repeats=5)
FLAGS = ["--heads", "4", "--key-heads", "2", "--width", "16", "--block-size", "16", "--top-k", "2", "--repeats", "2"]


def run(file: Path, *flags: str, code: int = 0, lengths: str = "40 64", draw: bool = False) -> list[dict]:
    """The runs in the file after the benchmark, which draws no picture unless it is asked to: that takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))
        if not draw:
            patch.setattr(benchmark, "plot", lambda *_: None)
        assert benchmark.main([*FLAGS, "--json", str(file), *(["--lengths", *lengths.split()] if lengths else []), *flags]) == code
    return json.loads(file.read_text())


def by_key(run: dict) -> dict[tuple, dict]:
    found = {(r["system"], r["pass"], r["tokens"]): r for r in run["results"]}
    assert len(found) == len(run["results"]), "a measurement is there twice"
    return found


def fake(monkeypatch, call, growth: int = 1) -> list[int]:
    """Add the system "fake", and return the list of lengths with which it is called."""
    lengths = []

    def counted(query, key, value, settings):
        lengths.append(query.shape[2])
        return call(query, key, value)

    monkeypatch.setitem(SYSTEMS, "fake", System(counted, growth, ("cpu",)))
    return lengths
