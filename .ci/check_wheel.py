"""Checks what `python -m build` has made: `python .ci/check_wheel.py dist`, from the repository's root.

The wheel holds every file of the package and nothing else, and its metadata are those of the repository.
"""

import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path


def main(folder: str) -> None:
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode())
    info = metadata.split("/")[0]
    package = {name for name in names if not name.startswith(f"{info}/")}
    expected = {path.as_posix() for path in Path("moba_flex").rglob("*.py")} | {"moba_flex/py.typed"}
    assert package == expected, f"missing: {sorted(expected - package)}; too many: {sorted(package - expected)}"
    assert f"{info}/licenses/LICENSE" in names, "the licence is missing"

    version = re.search(r'^__version__ = "(.+)"$', Path("moba_flex/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert said["Version"] == version, f"the wheel is of version {said['Version']}, the package of {version}"
    assert f"\n## [{version}]" in Path("CHANGELOG.md").read_text(encoding="utf-8"), f"CHANGELOG.md does not know {version}"
    assert re.search(rf"^version: \"?{re.escape(version)}\"?$", Path("CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert said["Name"] in ("moba_flex", "moba-flex") and said["Summary"] and said["Requires-Python"], said.items()
    sys.path.insert(0, ".")
    from setup import description, of_project

    readme = description(Path("README.md").read_text(encoding="utf-8"), of_project("Repository"), version)
    assert said.get_payload().strip() == readme.strip(), "the README is not the description"
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)\s]+)\)", readme)), "a link leads nowhere"
    extras = set(said.get_all("Provides-Extra"))
    assert extras == {"demo", "docs", "flash", "kernels", "serve", "test", "viz"}, extras
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert said["Author"] and said["Keywords"] and said["Description-Content-Type"] == "text/markdown"
    print(f"{wheel.name}: {len(package)} files, version {version}, extras {', '.join(sorted(extras))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
