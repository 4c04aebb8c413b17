"""Settings that do nothing are told once for each model, with others to try: those of the table in the docs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from support.families import build, tokens

from moba_flex import describe, trace
from moba_flex.models import full_attention, patch, set_attention
from moba_flex.models.sizes import SHORTEST_TOLD, SIZES, suggested_blocks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "block-size.md"
LONG = {"max_position_embeddings": 4096}


def said(model: torch.nn.Module, ids: torch.Tensor, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(ids, **kwargs)
    return [str(w.message) for w in caught if "MoBA has no effect" in str(w.message) and issubclass(w.category, UserWarning)]


def test_it_is_said_once_with_the_numbers_and_the_remedy():
    model, ids = patch(build(**LONG)), tokens(1, 2000)
    (message,) = said(model, ids)
    assert "a prompt of 2,000 tokens has 1 block of block_size=4096, and top_k=12 reads them all: attention is full" in message
    assert "patch(model, block_size=64, top_k=12)" in message
    assert not said(model, ids) and not said(model, ids[:, :1500])


def test_the_remedy_keeps_all_other_settings():
    """`patch` resets what it is not given."""
    others = {"sink_blocks": 1, "full_attention_layers": (-1,), "decode": "sparse"}
    model, ids = patch(build(**LONG), **others), tokens(1, 2000)
    (message,) = said(model, ids)
    call = re.search(r"patch\(model, (.*?)\)\. moba_flex", message)[1]
    assert call == "block_size=64, top_k=12, sink_blocks=1, full_attention_layers=(-1,), decode='sparse'"
    assert eval(f"dict({call})") == {"block_size": 64, "top_k": 12, **others}
    (message,) = said(patch(build(**LONG), sink_blocks=10, recent_blocks=10, top_k=30), ids)
    assert "patch(model, block_size=64, top_k=21, sink_blocks=10, recent_blocks=10)" in message


def test_other_settings_that_do_nothing_and_other_models_are_told_too():
    ids = tokens(1, 1100)
    model = patch(build(**LONG))
    assert said(model, ids)
    assert len(said(patch(model, block_size=256, top_k=8), ids)) == 1
    assert len(said(patch(build(**LONG)), ids)) == 1
    assert not said(patch(model, block_size=64, top_k=12), ids), "the remedy is one"


def test_a_model_whose_settings_have_had_an_effect_is_told_nothing():
    model = patch(build(**LONG), block_size=64, top_k=20)
    assert not said(model, tokens(1, 1400))
    assert not said(model, tokens(1, 1100))


@pytest.mark.parametrize("settings", [{"implementation": "eager"}, {"implementation": "naive"}])
def test_an_implementation_that_is_asked_for_is_not_told(settings):
    assert not said(patch(build(**LONG), **settings), tokens(1, 1100))


def test_short_prompts_and_full_attention_are_told_nothing():
    model, ids = patch(build(**LONG)), tokens(1, 1100)
    assert not said(model, tokens(1, SHORTEST_TOLD - 1))
    with full_attention(model):
        assert not said(model, ids)
    assert not said(set_attention(model, "full"), ids)
    assert not said(patch(build(**LONG), full_attention_layers=range(4)), ids)


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_generated_tokens_are_told_nothing(decode):
    model, ids = patch(build(**LONG), decode=decode), tokens(1, 1000)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MoBA has no effect")
        model.generate(ids, max_new_tokens=40, do_sample=False)


def test_those_who_only_look_are_told_nothing():
    model, ids = patch(build(**LONG)), tokens(1, 1100)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MoBA has no effect")
        trace(model, ids)
        describe(model, length=1100)
    assert len(said(model, ids)) == 1, "and the model still is"


def test_a_graph_is_told_nothing():
    model, ids = patch(build(**LONG, num_hidden_layers=1)), tokens(1, 1100)
    assert not said(torch.compile(model, backend="eager", fullgraph=True), ids, use_cache=False)


def test_the_settings_are_those_of_the_docs_table():
    rows = re.findall(r"^\| ([\d,]+) \| (\d+), (\d+) \|.*\| ([\d.]+) % \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    lengths = [int(length.replace(",", "")) for length, *_ in rows]
    assert lengths == [2**n for n in range(12, 21)]
    before = 0
    for length, (_, block_size, top_k, percent) in zip(lengths, rows):
        for n in (before + 1, length):
            assert suggested_blocks(n) == (int(block_size), int(top_k)), f"{n} tokens"
        assert 100 * int(block_size) * int(top_k) / length == pytest.approx(float(percent), rel=0.25), f"{length} tokens"
        before = length
    assert suggested_blocks(10**9) == suggested_blocks(lengths[-1])


def test_the_settings_have_an_effect_wherever_they_are_suggested():
    for length in (SHORTEST_TOLD, *(longest + 1 for longest, *_ in SIZES)):
        block_size, top_k = suggested_blocks(length)
        assert block_size * top_k < length
