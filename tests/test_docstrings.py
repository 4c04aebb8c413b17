"""Every example in a doc-string of the package runs as pasted: in a namespace of its own, with the imports that it shows."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import moba_flex

PUBLIC = (moba_flex, moba_flex.compat, moba_flex.distributed)
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
    public = {f"{module.__name__}.{name}": getattr(module, name) for module in PUBLIC for name in module.__all__}
    without = [name for name, x in public.items() if callable(x) and ">>> " not in (inspect.getdoc(x) or "")]
    assert not without, f"no example in the doc-string of {', '.join(sorted(without))}"
