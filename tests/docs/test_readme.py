"""The README is short, its commands are the ones that CI runs, and its figures have a source in `docs/`."""

from __future__ import annotations

import json
import re

import pytest
from doc_pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 185


def test_it_is_short():
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("command", ['pip install ".[demo]" && python examples/llama.py', 'pip install ".[test]" && pytest'])
def test_it_has_the_two_commands(command):
    assert f"\n```\n{command}\n```\n" in README


def test_its_table_of_speed_is_that_of_the_benchmarks():
    (run,) = json.loads((ROOT / "docs" / "benchmark" / "h200-attention.json").read_text(encoding="utf-8"))
    measured = {(r["system"], r["pass"], r["tokens"]): r for r in run["results"]}
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page[page.index("### One attention call") : page.index("### Strides of model projections")].split("\n")
    lines = [line for line in README.split("\n") if re.match(r"\| [\d,]+ \| [\d.]+ / [\d.]+ \|", line)]
    assert len(lines) == 4
    for line in lines:
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        times_there, memory_there = (row for row in section if row.startswith(f"| {shown[0]} |"))
        assert all(f"| {cell} |" in times_there for cell in shown[1:-1]) and f"| {shown[-1]} |" in memory_there, line
        tokens, *times, memory = (cell.replace(",", "") for cell in shown)
        cells = [*zip(("moba_flex", "moba_flex-triton", "dense-cudnn", "flash-moba"), times, ["milliseconds"] * 4)]
        for system, cell, unit in [*cells, ("moba_flex", memory, "peak_gb")]:
            results = [measured[system, name, int(tokens)].get(unit) for name in ("forward", "forward + backward")]
            said = [float(x) for x in cell.split(" / ")] if "/" in cell else None
            assert said == (None if None in results else pytest.approx(results, rel=6e-3)), line


def test_its_losses_are_those_of_the_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = README[README.index("| model, context, tokens") : README.index("## Options")]
    losses = re.findall(r"[+-]0\.\d+", table)
    assert len(losses) == 7
    for loss in losses:
        assert loss in page, f"{loss} has no source"
