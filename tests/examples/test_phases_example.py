"""examples/benchmarks/phases.py and decode_speed.py where there is no GPU."""

from __future__ import annotations

import decode_speed
import phases
import pytest
import torch


@pytest.mark.parametrize(("script", "needs"), [(phases, "this needs a CUDA GPU, and Triton"), (decode_speed, "this needs a CUDA GPU")])
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys, script, needs: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert capsys.readouterr().err.startswith(f"{script.__name__}.py: error: {needs}")
