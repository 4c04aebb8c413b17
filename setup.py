"""Makes the wheel's description of the README; all else that a build needs is in pyproject.toml.

An index shows the description without the repository around it. With a `Repository` under `[project.urls]`, links to files of the
repository become absolute. Without one they become plain text, and pictures are left out with what stands beside them.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent
_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)#\s]+)\)")
_LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def description(readme: str, repository: str | None, version: str) -> str:
    """The README as it is read outside of the repository. Headings in it have no address there, so that links to them become text."""
    if repository is None:
        readme = re.sub(rf"^{_PICTURE.pattern}\n\n.*\n\n", "", readme, flags=re.MULTILINE)  # with the line below it
        return _LINK.sub(r"\1", readme)
    files = f"{repository.rstrip('/')}/{{}}/v{version}/{{}}"
    readme = _PICTURE.sub(lambda found: f"![{found[1]}]({files.format('raw', found[2])})", readme)

    def link(found: re.Match) -> str:
        return f"[{found[1]}]({files.format('blob', found[2])}{found[3] or ''})" if found[2] else found[1]

    return _LINK.sub(link, readme)


def of_project(name: str) -> str | None:
    """A string in pyproject.toml, which Python 3.10 cannot parse by itself."""
    found = re.search(rf'\b{name}\s*=\s*"([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found[1] if found else None


if __name__ == "__main__":
    from setuptools import setup

    text = description((ROOT / "README.md").read_text(encoding="utf-8"), of_project("Repository"), of_project("version"))
    setup(long_description=text, long_description_content_type="text/markdown")
