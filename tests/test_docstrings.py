"""Every example in a doc-string of the package runs as pasted: in a namespace of its own, with the imports that it shows."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

import pytest

import moba_flex

MADE_BY = {
    "Calibration": "calibrate",
    "Candidate": "calibrate",
    "ContextParallel": "context_parallel",
    "Description": "describe",
    "Explanation": "explain",
    "LayerDescription": "describe",
    "Selection": "select_blocks",
    "Trace": "trace",
}  # whose example shows them
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> Iterator[str]:
    yield moba_flex.__name__
    for module in pkgutil.walk_packages(moba_flex.__path__, "moba_flex.", onerror=lambda name: None):
        if importlib.util.find_spec("triton") or not module.name.startswith("moba_flex.ops.triton"):
            yield module.name


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in modules():
        yield from (found for found in finder.find(importlib.import_module(name)) if found.examples)


@pytest.mark.parametrize("example", [pytest.param(example, id=example.name) for example in examples()])
def test_examples_run(example: doctest.DocTest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.globs = {"__name__": "__main__"}
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not result.failed, "".join(said)


def test_public_functions_and_classes_have_an_example():
    public = [(module, name) for module in (moba_flex, moba_flex.distributed) for name in module.__all__]
    public += [(moba_flex.compat, name) for name, x in vars(moba_flex.compat).items() if getattr(x, "__module__", "") == "moba_flex.compat"]
    public = [(name, getattr(module, MADE_BY.get(name, name))) for module, name in public if not name.startswith("_")]
    without = [name for name, x in public if callable(x) and not any(found.examples for found in doctest.DocTestFinder().find(x))]
    assert not without, f"no example in the doc-string of {', '.join(sorted(without))}"
