"""examples/phases.py where there is no GPU."""

from __future__ import annotations

import sys

import phases
import pytest
import torch


def test_without_a_gpu_it_prints_its_help_and_says_what_it_needs(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["phases.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        phases.main()
    assert "--lengths" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["phases.py"])
    with pytest.raises(SystemExit, match=r"phases\.py needs a CUDA GPU, and Triton"):
        phases.main()
