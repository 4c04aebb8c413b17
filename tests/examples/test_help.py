"""Every script starts by itself, and its --help says in its first line what it does, and every flag's default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fresh import FreshPython

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(file.relative_to(ROOT / "examples"))
    for folder in ("", "experiments", "benchmarks")
    for file in (ROOT / "examples" / folder).glob("*.py")
    if file.name != "launch.py"  # which has no flags of its own
)
RUN_ALL = """
import contextlib, io, json, os, runpy, sys
from pathlib import Path

os.environ.update(COLUMNS="200", CUDA_VISIBLE_DEVICES="")
said, before = {}, [str(examples.parent), *sys.path[1:]]
for script in scripts:
    sys.path[:] = [str((examples / script).parent), *before]  # as for `python SCRIPT`
    for name in [name for name, module in sys.modules.items() if str(examples) in (getattr(module, "__file__", None) or "")]:
        if name != "__main__":
            del sys.modules[name]
    sys.argv = [script, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(str(examples / script), run_name="__main__")
    said[script] = out.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def help_of(fresh: FreshPython) -> dict[str, str]:
    """What all scripts print, one after another in one process, each with its own folder alone on the path."""
    done = fresh.run(f"from pathlib import Path\nexamples, scripts = Path({str(ROOT / 'examples')!r}), {SCRIPTS}\n{RUN_ALL}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_line_says_what_it_does(help_of: dict[str, str], script: str) -> None:
    usage, first, *_ = help_of[script].split("\n\n")
    assert usage.startswith("usage: ") and first.endswith(".") and "\n" not in first, first
    assert "MoBA" in first and first.split()[0].lower() in WORDS, first


WORDS = ("answer", "draw", "find", "fine-tune", "measure", "test", "train")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text_with_its_default(help_of: dict[str, str], script: str) -> None:
    flags, lines = {}, help_of[script].partition("\noptions:\n")[2].splitlines()
    for line in lines:
        if line.startswith("  -"):
            name = line.split()[0]
            flags[name] = line
        elif line.strip():
            flags[name] += f" {line.strip()}"
    assert len(flags) > 2
    for name, text in flags.items():
        if name != "-h,":
            assert "default" in text or "(required)" in text, text


def test_older_names_of_flags_are_not_shown(help_of: dict[str, str]) -> None:
    for script, text in help_of.items():
        for old in ("--moba-sink-blocks", "--moba-full-layers", "--full-layers", "--folder", "--groups"):
            assert old not in text, f"{script}: {old}"
        assert script == "llama.py" or ("--moba-chunk-size" not in text and "--moba-topk" not in text), script
