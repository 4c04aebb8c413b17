"""examples/benchmarks/serving.py serves the same requests in both ways, and says how long clients waited."""

from __future__ import annotations

import json

import pytest
import serving

from moba_flex.models import upstream

pytestmark = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")


def test_a_tiny_model_is_served_in_both_ways(tmp_path, capsys):
    file = tmp_path / "served.json"
    sizes = ["--tokens", "200", "--new", "3", "--requests", "3", "--rounds", "1", "--block-size", "32", "--top-k", "2", "--num-pages", "8"]
    assert serving.main(["--model", "tiny", "--device", "cpu", *sizes, "--max-batch-tokens", "256", "--output", str(file)]) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "| moba_flex |" in said and "| sdpa |" in said and f"moba_flex over sdpa: {found['ratio']:.2f}" in said
    for result in found["results"].values():
        assert all(value > 0 for value in result.values())
        assert result["first_token_median"] <= result["first_token_p95"] and result["per_token_median"] <= result["per_token_p95"]


def test_settings_that_do_not_fit_are_told_by_their_flags(capsys):
    assert serving.main(["--model", "tiny", "--top-k", "1"]) == 2
    assert "--sink-blocks" in capsys.readouterr().err
