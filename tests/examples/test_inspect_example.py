"""What `examples/inspect_blocks.py` promises: two pictures, the numbers of `moba_flex.trace`, and errors in one line."""

from __future__ import annotations

import struct
import sys

import inspect_blocks
import pytest
import torch

pytest.importorskip("matplotlib")  # the extra `viz`


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def flags(tiny, tmp_path) -> list[str]:
    """A small model and 100 words, which are several blocks."""
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{i * i % 50}" for i in range(100)))
    given = {"model": tiny, "prompt-file": tmp_path / "prompt.txt", "output": tmp_path / "pictures", "layer": 1}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def test_two_pictures_and_a_table(flags, tmp_path, capsys):
    assert inspect_blocks.main([*flags, "--block-size", "8", "--top-k", "3"]) == 0
    for name in ("blocks.png", "model.png"):
        content = (tmp_path / "pictures" / name).read_bytes()
        assert content.startswith(b"\x89PNG"), name
        width, height = struct.unpack(">II", content[16:24])
        assert width >= 400 and height >= 300, f"{name}: {width} by {height}"
    out = capsys.readouterr().out
    assert "prompt tokens" in out and "100" in out
    # Each token reads its own block of 8 up to itself, and two past ones if there are two.
    read = sum(t % 8 + 1 + 8 * min(t // 8, 2) for t in range(100))
    assert f"{read / 5050:.1%}" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--layer", "7"], ["--layer", "there is no layer 7", "0 to 1"]),
        (["--top-k", "1"], ["--top-k", "--sink-blocks"]),
        (["--top-k", "many"], ["--top-k", "many"]),
        (["--prompt-file", "no such file"], ["--prompt-file", "no such file"]),
        (["--output", __file__], ["--output", "folder"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value[0].startswith("--") else "",
)
def test_errors_are_one_line(flags, more, words, capsys):
    assert inspect_blocks.main([*flags, *more]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("inspect_blocks.py: error: ")
    for word in words:
        assert word in err


def test_without_matplotlib_it_says_what_to_install_before_any_work(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(inspect_blocks, "load", lambda *args: pytest.fail("the model was loaded"))
    assert inspect_blocks.main(flags) == 2
    assert 'pip install ".[demo,viz]"' in capsys.readouterr().err
