"""What README, `tests/README.md`, `pyproject.toml` and the tables of packages say of each other and of the files that there are."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from doc_pages import ROOT

MAP = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_map_names_every_test_file_and_no_other():
    named = re.findall(r"^\| `([\w/*]+\.py)` \|", MAP, re.MULTILINE)
    files = [path.relative_to(ROOT / "tests").as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert not [file for file in files if not any(fnmatch(file, name) for name in named)], "tests/README.md does not say what they promise"
    assert not [name for name in named if not any(fnmatch(file, name) for file in files)], "tests/README.md names files that are gone"


def test_the_readme_claims_the_versions_of_the_package():
    least = dict(re.findall(r'"(torch|transformers|accelerate)>=([\d.]+)"', PROJECT))
    least["Python"] = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1]
    line = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("Python 3."))
    for name, known_as in {"Python": "Python", "torch": "PyTorch", "transformers": "transformers", "accelerate": "accelerate"}.items():
        assert f"{known_as} {least[name]} or newer" in line


@pytest.mark.parametrize("package", ["models", "distributed"])
def test_a_package_s_table_names_every_file_of_it(package):
    folder = ROOT / "moba_flex" / package
    named = re.findall(r"^\| `(\w+\.py)` \|", (folder / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(file.name for file in folder.glob("*.py") if file.name != "__init__.py")
