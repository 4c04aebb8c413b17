"""With `decode="sparse"` generation in every way gives the tokens of recomputation, however tokens are cut into calls, also compiled."""

from __future__ import annotations

import pytest
import torch
from support import families
from support.cached_generation import FULL, GREEDY, PROMPT, SPARSE, WAYS, build, call_of, padded, recomputed, run, tokens, ways
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from moba_flex.models import patch, set_attention
from moba_flex.models.layers import attention_of
from moba_flex.models.state import means_beside


@ways()
@pytest.mark.parametrize("more", [{}, {"share_selection": True, "sink_blocks": 1}], ids=["plain", "shared"])
def test_sparse_decoding_gives_the_tokens_of_recomputation(way, more, no_recomputation):
    model, ids = build(**SPARSE, **more), tokens()
    expected = recomputed(model, ids)
    assert not torch.equal(expected, recomputed(build(), ids)), "the case does not tell sparse from full attention"
    assert torch.equal(model.generate(ids, **call_of(way)), expected)


@ways(["growing cache", "static cache", "chunked prefill"])
def test_sparse_decoding_of_a_padded_batch_gives_the_tokens_of_recomputation(way, no_recomputation):
    model = build(**SPARSE)
    assert torch.equal(model.generate(**padded(), **call_of(way)), recomputed(model, padded()))


@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("static", [False, True])
def test_a_mask_function_that_joins_the_tokens_of_images_is_plain_behind_a_cache_where_there_are_none(decode, static, no_recomputation):
    model, ids = build(**{**SPARSE, "decode": decode}), tokens()

    def turns(with_function: bool) -> torch.Tensor:
        cache, out = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config), []
        for turn in ids.split([30, 1, ids.shape[1] - 31], dim=1):
            blocks = {"block_sequence_ids": torch.full_like(turn, -1)} if with_function else {}
            embeds = model.get_input_embeddings()(turn)
            mask = create_causal_mask(config=model.config, inputs_embeds=embeds, attention_mask=None, past_key_values=cache, **blocks)
            out.append(run(model, turn, cache, attention_mask=mask))
        return torch.cat(out, 1)

    torch.testing.assert_close(turns(True), turns(False))


def test_a_padding_token_that_the_mask_keeps_is_a_token_like_others(no_recomputation):
    model, ids = build(**SPARSE), tokens()
    ids[0, 20] = model.config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = recomputed(model, inputs)
    for name in ("growing cache", "static cache", "prompt lookup", "assisted"):
        assert torch.equal(model.generate(**inputs, **call_of(WAYS[name])), expected), name


@pytest.mark.parametrize("static", [False, True])
def test_beam_search_gives_the_sequences_of_recomputation(static, no_recomputation):
    model, beams = build(**SPARSE), {"num_beams": 4, "num_return_sequences": 2}
    cache = {"cache_implementation": "static"} if static else {}
    assert torch.equal(model.generate(**padded(), **GREEDY, **beams, **cache), recomputed(model, padded(), **beams))


@pytest.mark.parametrize("offloading", [False, True])
def test_a_hybrid_of_full_and_sparse_layers_gives_the_tokens_of_recomputation(offloading, no_recomputation):
    model, ids = build(layers=3, **SPARSE, full_attention_layers=(-1,)), tokens()
    cache = DynamicCache(config=model.config)
    cache.offloading = offloading  # what makes its layers move; streams, which the rest of it is, are for GPUs
    if offloading:
        cache.update = lambda key, value, index, *_, **__: (cache.layers[index].update(key, value), cache.layers[index].offload())[0]
    out = model.generate(ids, past_key_values=cache, **GREEDY)
    assert means_beside(cache.layers[2]) is None, "a layer with full attention needs no means"
    full = build(layers=3, **FULL, full_attention_layers=(-1,))
    patch(full, **SPARSE, full_attention_layers=(-1,))
    assert torch.equal(out, recomputed(full, ids))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [(53,), (1,) * 53, (20, 1, 1, 17, 14), (3, 50), (40, 2, 2, 2, 7), (8, 8, 8, 8, 8, 8, 5)], ids=str)
def test_logits_do_not_depend_on_how_tokens_are_cut_into_calls(sizes, static):
    model, ids = build(**SPARSE), tokens(2)
    cache = StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    parts = torch.cat([run(model, part, cache) for part in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(parts, run(model, ids, None), rtol=1e-4, atol=2e-4)


def test_set_attention_to_the_specification_decodes_alike():
    model, ids = build(**SPARSE), tokens()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(set_attention(model, "moba_naive").generate(ids, **GREEDY), expected)


def test_padding_between_real_tokens_is_refused_with_a_static_cache_too():
    model, inputs = build(**SPARSE), padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # padding on the right, and then new tokens
    for cache in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="padding between real tokens"):
            model.generate(**inputs, **GREEDY, **cache)


# Drafts


@pytest.mark.parametrize("full_layers", [(), (0, 2), (-1,), (1, -1)], ids=str)
@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_the_first_layers_alone_may_draft(decode, full_layers):
    """While they do, transformers sets the configuration's number of layers to theirs: layers are still the ones that were named."""
    model, ids = build(layers=3, **{**SPARSE, "decode": decode}, full_attention_layers=full_layers), tokens()
    call = {**GREEDY, "suppress_tokens": [0]}  # transformers takes a padding token among those generated for padding of the drafts
    expected, seen = model.generate(ids, **call), []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda *_: seen.append((model.config.num_hidden_layers, attention_of(attention, model.config.moba)))
    )
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **call), expected)
    assert set(seen) == {(n_layers, "full" if 1 in full_layers else "moba") for n_layers in (2, 3)}
    set_attention(model, "moba_naive")
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **call), expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_drafts_are_verified_beside_sliding_layers(family, decode):
    model, ids = patch(families.build(family), **{**SPARSE, "decode": decode}), tokens()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY), expected)
    if decode == "sparse":
        assert torch.equal(recomputed(model, ids), expected)


# torch.compile


@pytest.mark.parametrize("batch", ["one row", "padded"])
@pytest.mark.parametrize("full_layers", [(), (1,)], ids=["sparse", "hybrid"])
def test_decoding_with_a_static_cache_is_compiled_once(batch, full_layers):
    from torch._dynamo.utils import counters

    model = build(**SPARSE, full_attention_layers=full_layers)
    inputs = padded() if batch == "padded" else {"input_ids": tokens()}
    expected = model.generate(**inputs, **GREEDY)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    compiled = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    # With layers of full attention transformers' own mask compiles once more when the cache is full.
    assert counters["stats"]["unique_graphs"] <= 1 + len(full_layers), dict(counters["stats"])
    torch._dynamo.reset()


def test_a_compiled_step_without_a_mask_serves_every_token():
    from torch._dynamo.utils import counters

    model, ids = build(**SPARSE), tokens()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 20)
    expected = run(model, ids, None)
    run(model, ids[:, :30], cache)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for i in range(30, PROMPT):
        torch.testing.assert_close(run(step, ids[:, i : i + 1], cache)[:, 0], expected[:, i], rtol=1e-4, atol=2e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
