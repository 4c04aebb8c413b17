"""With `decode="full"` plain, assisted and prompt-lookup generation give the same tokens: drafts read all keys."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cached_generation import FULL, GREEDY, PROMPT, build, call_of, filled, padded, run, tokens, ways
from torch import Tensor
from transformers import CompileConfig, DynamicCache


@ways(["static cache", "prompt lookup", "long prompt lookup", "assisted", "assisted by itself"])
@pytest.mark.parametrize("length", [1, 2, PROMPT])
def test_full_decoding_gives_the_same_tokens_in_every_way(way, length):
    model, ids = build(**FULL), tokens(1, length)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **call_of(way)), expected)


@ways(["growing cache", "static cache"])
@pytest.mark.parametrize("n", [1, 4])
def test_the_end_of_a_prompt_reads_all_keys_if_its_logits_are_asked_for(way, n):
    model, ids = build(**FULL), tokens()
    cache = filled(model, ids[:, :-n])
    for token in ids[:, -n:-1].split(1, 1) if n > 1 else ():
        run(model, token, cache)

    def first_logits(**call) -> Tensor:
        return model.generate(ids, **GREEDY, **call, return_dict_in_generate=True, output_logits=True).logits[0]

    expected = first_logits(past_key_values=cache)
    torch.testing.assert_close(first_logits(logits_to_keep=n + 1, **way), expected, rtol=1e-4, atol=2e-4)
    assert (first_logits(**way) - expected).abs().max() > 1e-2, "the case does not tell the end of a prompt from the rest"


def test_no_token_is_a_draft_in_training():
    """PEFT passes prefixes that it trains as a cache, and a loss may want the last logits alone."""
    model, ids = build(**FULL).train(), tokens()
    cache = filled(model, ids[:, :9])
    expected = model(ids[:, 9:], past_key_values=copy.deepcopy(cache)).logits[:, -30:]
    torch.testing.assert_close(model(ids[:, 9:], past_key_values=cache, logits_to_keep=30).logits, expected)


@pytest.mark.parametrize("cached", [0, 20])  # a later turn: transformers' own assisted generation cannot have one
def test_drafts_behind_a_prompt_read_all_keys_and_the_prompt_its_blocks(cached):
    model, ids = build(**FULL), tokens()
    prompt, drafts = ids[:, :-4], ids[:, -4:]
    cache = filled(model, prompt)
    expected = torch.cat([run(model, token, cache) for token in drafts.split(1, 1)], 1)

    def together(**call) -> Tensor:
        cache = filled(model, ids[:, :cached]) if cached else DynamicCache(config=model.config)
        return run(model, ids[:, cached:], cache, **call)[:, -4:]

    torch.testing.assert_close(together(logits_to_keep=5), expected, rtol=1e-4, atol=2e-4)
    assert (together() - expected).abs().max() > 1e-2, "the case does not tell drafts from a prompt"
    with torch.no_grad():  # without a cache there is no generation: the logits of the end, as they are
        torch.testing.assert_close(model(ids, logits_to_keep=5, use_cache=False).logits, run(model, ids, None)[:, -5:])


def test_full_decoding_with_a_static_cache_is_compiled():
    from torch._dynamo.utils import counters

    model, inputs = build(**FULL), padded()
    expected = model.generate(**inputs, **GREEDY)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config), expected)
    assert counters["stats"]["unique_graphs"] <= 2, dict(counters["stats"])
    torch._dynamo.reset()
