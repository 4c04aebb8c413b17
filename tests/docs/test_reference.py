"""The API reference has every public name, and the tables of settings have their defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

import pytest
from doc_pages import ROOT

import moba_flex
from moba_flex import MobaConfig, compat, distributed

MODULES = {"compat", "distributed"}
COMPAT = [name for name, function in vars(compat).items() if inspect.isfunction(function) and function.__module__ == compat.__name__]
PUBLIC = [
    *(f"moba_flex.{name}" for name in moba_flex.__all__ if name not in MODULES),
    *(f"moba_flex.distributed.{name}" for name in distributed.__all__),
    *(f"moba_flex.compat.{name}" for name in COMPAT if not name.startswith("_")),
]
ENTRY = re.compile(r"^::: (\S+)\n    options:\n      heading: (\S+)", re.MULTILINE)
ENTRIES = {name: path for page in (ROOT / "docs" / "reference").glob("*.md") for path, name in ENTRY.findall(page.read_text("utf-8"))}


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_every_public_name(name):
    assert name in ENTRIES, f"docs/reference has no entry for {name}"


def test_it_has_nothing_else():
    assert sorted(ENTRIES) == sorted(PUBLIC)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_what_its_heading_says(name):
    def find(path: str) -> object:
        module, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    assert find(ENTRIES[name]) is find(name)


def test_the_table_of_settings_has_the_defaults():
    page = (ROOT / "docs" / "how-to" / "patch.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", page, re.MULTILINE))
    assert rows == {field.name: repr(field.default).replace("'", '"') for field in dataclasses.fields(MobaConfig)}
