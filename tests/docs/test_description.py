"""The wheel's description is the README without links that lead nowhere outside of the repository."""

from __future__ import annotations

import importlib.util
import re

import pytest
from doc_pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGET = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("moba_flex_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_an_address_of_the_repository_links_are_text(setup):
    text = setup.description(README, None, "1.2.3")
    assert all(target.startswith("https://") for target in TARGET.findall(text))
    assert "![" not in text and "| Patch a model | switch layers, save and load |" in text
    assert "1. `moba_flex/attention.py`: forward" in text
    for code in re.findall(r"```.*?```", README, flags=re.DOTALL):
        assert code in text


def test_with_one_they_are_absolute_and_lead_to_the_version(setup):
    text = setup.description(README, "https://example.org/us/moba_flex/", "1.2.3")
    assert all(target.startswith("https://") for target in TARGET.findall(text))
    assert "](https://example.org/us/moba_flex/raw/v1.2.3/docs/images/benchmark.png)" in text
    assert "[docs/limits.md](https://example.org/us/moba_flex/blob/v1.2.3/docs/limits.md)" in text
    assert len(TARGET.findall(text)) == len(TARGET.findall(README)) - README.count("](#")


@pytest.mark.parametrize(
    ("written", "without", "with_one"),
    [
        ("[`a[0].py`](a/b.py#part)", "`a[0].py`", "[`a[0].py`](r/blob/v1/a/b.py#part)"),
        ("see [Results](#results).", "see Results.", "see Results."),
        ("[MoBA](https://arxiv.org)", "[MoBA](https://arxiv.org)", "[MoBA](https://arxiv.org)"),
        ("before\n\n![p](x.png)\n\nBelow it.\n\nafter", "before\n\nafter", "before\n\n![p](r/raw/v1/x.png)\n\nBelow it.\n\nafter"),
    ],
)
def test_each_kind_of_link(setup, written: str, without: str, with_one: str):
    assert setup.description(written, None, "1") == without
    assert setup.description(written, "r", "1") == with_one


def test_the_version_is_found_in_the_project(setup):
    assert f'\nversion = "{setup.of_project("version")}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
