"""Links, pictures and file names in README and docs lead somewhere."""

from __future__ import annotations

import re

import pytest
from doc_pages import PAGES, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Files and folders of the repository that prose, tables and commands name.
PATH = re.compile(r"(?<![\w/.])((?:moba_flex|examples|tests|docs|results)/[\w./*-]*[\w/])")
WRITTEN_BY_COMMANDS = re.compile(r"\bresults/(?:losses\.png|blocks\.png|\*\.json)")


def _without_code(text: str) -> str:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`(?!\])", "", text)  # links whose text is code stay


def _anchor(heading: str) -> str:
    """As MkDocs and GitHub write it, of the headings that there are."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def _anchors(text: str) -> set[str]:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    reference = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)} | set(reference)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(_without_code(text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert ROOT in file.parents
        if anchor:
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"
        if page.is_relative_to(ROOT / "docs"):
            assert file.is_relative_to(ROOT / "docs"), f"{target} is outside of the site"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_is_there(page):
    text = WRITTEN_BY_COMMANDS.sub("", page.read_text(encoding="utf-8"))
    for name in PATH.findall(text):
        places = (ROOT, ROOT / "docs") if name.startswith("results/") else (ROOT,)
        assert any(any(place.glob(name.rstrip("/"))) for place in places), f"{name} is not there"


def test_no_page_asks_a_browser_to_fetch_from_elsewhere():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            assert not re.match(r"https?://", "".join(target)), f"{page.name}: {target}"
