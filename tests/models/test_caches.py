"""Generation with every cache: what `decode` promises, however tokens are cut into calls and whatever becomes of the cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from support import families
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from moba_flex.models import attention_function, block_means, full_attention, patch, set_attention, unpatch
from moba_flex.models.layers import attention_of
from moba_flex.models.state import means_beside

VOCABULARY, PROMPT, NEW = 64, 53, 14
SPARSE = {"block_size": 8, "top_k": 3, "decode": "sparse"}
FULL = {"block_size": 8, "top_k": 2, "decode": "full"}
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def build(seed: int = 0, layers: int = 2, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return patch(model, **settings) if settings else model


def tokens(rows: int = 1, length: int = PROMPT, seed: int = 1) -> Tensor:
    """Six words again and again, so that n-grams of the prompt are good drafts."""
    words = torch.randint(2, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return words.repeat(1, length // 6 + 1)[:, :length].clone()


def padded() -> dict[str, Tensor]:
    ids, mask = tokens(3), torch.ones(3, PROMPT, dtype=torch.int64)
    mask[1, :21] = mask[2, :40] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def recomputed(model: PreTrainedModel, inputs: dict[str, Tensor] | Tensor, **call) -> Tensor:
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    return model.generate(**inputs, use_cache=False, **{**GREEDY, **call})


@pytest.fixture
def no_recomputation(monkeypatch):
    """From here on no decoding may compute the means of a whole cache."""

    def refuse(*args):
        raise AssertionError("all block means were computed again")

    monkeypatch.setattr(attention_function, "write_means", refuse)


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cache, **inputs) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, **inputs).logits


def means(cache, layer: int = 0):
    return means_beside(cache.layers[layer])


# With decode="sparse", each gives the tokens that recomputation gives

WAYS = {
    "growing cache": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 9},
    "chunked prefill of few tokens": {"prefill_chunk_size": 33},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "long prompt lookup": {"prompt_lookup_num_tokens": 40},
    "assisted": {"assistant_model": lambda: build(3, 1)},
    "assisted by itself": {"assistant_model": lambda: build()},
}


def ways(names=WAYS):
    return pytest.mark.parametrize("way", [{k: v for k, v in WAYS[name].items()} for name in names], ids=list(names))


def call_of(way: dict) -> dict:
    return {**GREEDY, **{name: value() if callable(value) else value for name, value in way.items()}}


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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [(53,), (1,) * 53, (20, 1, 1, 17, 14), (3, 50), (40, 2, 2, 2, 7), (8, 8, 8, 8, 8, 8, 5)], ids=str)
def test_logits_do_not_depend_on_how_tokens_are_cut_into_calls(sizes, static):
    model, ids = build(**SPARSE), tokens(2)
    cache = StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    parts = torch.cat([run(model, part, cache) for part in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(parts, run(model, ids, None), rtol=1e-4, atol=2e-4)


# Whatever becomes of a cache, its means stay right


def assert_right(model: PreTrainedModel, cache, ids: Tensor, new: Tensor, case: str = "", **inputs) -> None:
    """Decoding `new` behind what the cache holds of `ids`, token by token, is recomputation."""
    whole = torch.cat([ids, new], 1)
    expected = run(model, whole, None, **inputs)[:, ids.shape[1] :]
    mask = inputs.get("attention_mask")
    for i in range(new.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, : ids.shape[1] + i + 1]}
        actual = run(model, new[:, i : i + 1], cache, **seen)
        torch.testing.assert_close(actual[:, 0], expected[:, i], rtol=1e-4, atol=2e-4, msg=lambda m, i=i: f"{case}, token {i}: {m}")


def filled(model: PreTrainedModel, ids: Tensor, **inputs) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    run(model, ids, cache, **inputs)
    return cache


@pytest.mark.parametrize("removed", [1, 5, 8, 13, 52])
def test_cropping_keeps_the_means_and_what_follows_is_right(removed, no_recomputation):
    model, ids = build(**SPARSE), tokens()
    cache = filled(model, ids)
    cache.crop(-removed)
    assert not means(cache).stale
    assert_right(model, cache, ids[:, :-removed], tokens(1, 20, seed=5))


def test_rows_are_reordered_repeated_and_selected_with_their_means(no_recomputation):
    model, ids, new = build(**SPARSE), tokens(3), tokens(6, 12, seed=4)
    cache = filled(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_right(model, copy_with_means(cache), ids[[2, 0, 0]], new[:3], "reordered")
    cache.batch_repeat_interleave(2)
    assert_right(model, copy_with_means(cache), ids[[2, 2, 0, 0, 0, 0]], new, "repeated")
    cache.batch_select_indices(torch.tensor([1, 4, 5]))
    assert not means(cache).stale
    assert_right(model, cache, ids[[2, 0, 0]], new[1:4], "selected")


def copy_with_means(cache: DynamicCache) -> DynamicCache:
    return copy.deepcopy(cache)


def test_rows_of_a_padded_batch_take_their_padding_along():
    model, inputs, new = build(**SPARSE), padded(), tokens(3, 12, seed=4)
    cache = filled(model, **{"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    rows = torch.tensor([2, 2, 1])
    cache.batch_select_indices(rows)
    assert means(cache).starts == (40, 40, 21)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(3, 12, dtype=torch.int64)], 1)
    assert_right(model, cache, inputs["input_ids"][rows], new, attention_mask=mask)


@pytest.mark.parametrize("static", [False, True])
def test_several_turns_and_a_reset_on_one_cache(static, no_recomputation):
    model = build(**SPARSE)
    cache = StaticCache(config=model.config, max_cache_len=120) if static else DynamicCache(config=model.config)
    for seed in (1, 2):  # another conversation in the same cache
        ids = tokens(1, 20, seed=seed)
        for turn in range(3):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = model.generate(**given, past_key_values=cache, **GREEDY)
            assert torch.equal(ids, recomputed(model, given)), f"conversation {seed}, turn {turn}"
            ids = torch.cat([ids, tokens(1, 11, seed=7 + turn)], 1)
        cache.reset()
        if cache.get_seq_length():  # before transformers 5.18 a growing cache kept its length
            cache.crop(-cache.get_seq_length())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"])
def test_a_copied_cache_goes_on_by_itself(copied):
    model, ids = build(**SPARSE), tokens()
    cache = filled(model, ids)
    same = copied(cache)
    assert_right(model, cache, ids, tokens(1, 9, seed=5), "the original")
    assert_right(model, same, ids, tokens(1, 9, seed=6), "the copy")


def test_keys_that_sparse_attention_did_not_see_are_noticed():
    model, ids, new = build(**SPARSE), tokens(), tokens(1, 12, seed=5)

    def by_full_attention(cache):
        cache.crop(-20)
        with full_attention(model):
            run(model, new[:, :9], cache)
            run(model, ids[:, 42:], cache)

    def by_an_unpatched_model(cache):
        unpatch(model)
        cache.crop(-20)
        run(model, new, cache)
        run(model, ids[:, 45:], cache)
        patch(model, **SPARSE)

    def by_hand(cache):
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)

    def by_hand_before_a_crop(cache):
        by_hand(cache)
        cache.crop(-1)

    for change in (by_full_attention, by_an_unpatched_model, by_hand, by_hand_before_a_crop):
        cache = filled(model, ids)
        change(cache)
        fresh = DynamicCache(config=model.config)  # the same keys and values, and no means
        for i, layer in enumerate(cache.layers):
            fresh.update(layer.keys.clone(), layer.values.clone(), i)
        for i in range(12):
            torch.testing.assert_close(run(model, new[:, i : i + 1], cache), run(model, new[:, i : i + 1], fresh), msg=change.__name__)


@pytest.mark.parametrize("static", [False, True])
def test_one_cache_serves_calls_with_and_without_inference_mode(static):
    model, ids = build(**SPARSE), tokens()
    cache = StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    parts = []
    for i, part in enumerate(ids.split((30, 1, 1, 4, 1, 1, 7, 1, 7), 1)):
        with torch.inference_mode(i % 2 == 1), torch.no_grad():
            parts.append(model(part, past_key_values=cache, use_cache=True).logits.clone())
    torch.testing.assert_close(torch.cat(parts, 1), run(model, ids, None), rtol=1e-4, atol=2e-4)


def test_other_settings_make_other_means():
    model, ids = build(**SPARSE), tokens()
    cache = filled(model, ids)
    run(model, ids[:, :1], cache)
    cache.crop(-1)
    patch(model, **{**SPARSE, "block_size": 5})
    fresh = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        fresh.update(layer.keys.clone(), layer.values.clone(), i)
    for i in range(9):
        torch.testing.assert_close(run(model, ids[:, i : i + 1], cache), run(model, ids[:, i : i + 1], fresh))


def test_a_cache_of_another_kind_is_right_without_means():
    class Own(DynamicLayer):
        """A cache layer that somebody wrote; who knows what it does."""

    model, ids = build(**SPARSE), tokens()
    cache = DynamicCache(config=model.config)
    cache.layers = [Own() for _ in cache.layers]
    out = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(out, recomputed(model, ids))
    assert type(cache.layers[0]) is Own


class Rounded(QuantizedLayer):
    """A quantized layer whose keys and values are rounded to sixteenths."""

    def _quantize(self, tensor, axis):
        return (tensor * 16).round().to(torch.int32)

    def _dequantize(self, q_tensor):
        return q_tensor / 16


@pytest.mark.parametrize("call", [{}, {"num_beams": 2}, {"prefill_chunk_size": 9}])
def test_a_quantized_cache_keeps_the_means_until_it_quantizes_anew(call, monkeypatch):
    if "num_beams" in call and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("this version loses the order of the beams")
    made, write = [], block_means.write_means
    monkeypatch.setattr(block_means, "write_means", lambda *args: made.append(args) or write(*args))

    def generated() -> tuple[Tensor, int]:
        made.clear()
        cache = Cache(layers=[Rounded(residual_length=7) for _ in range(3)])
        out = build(**SPARSE).generate(tokens(2), **{**GREEDY, **call, "past_key_values": cache})
        return out, len(made) // 3

    kept, n_kept = generated()
    monkeypatch.setattr(block_means, "quantized_keys", lambda layer: None)
    anew, n_anew = generated()
    assert torch.equal(kept, anew)
    assert n_kept < n_anew - 3 or "num_beams" in call, "means are made for each token"


def test_a_model_loaded_by_name_alone_is_right_too(tmp_path):
    model, ids = build(**SPARSE), tokens()
    expected = recomputed(model, ids)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="moba").eval()
    assert torch.equal(loaded.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("block_size", [128, 512])
def test_means_take_less_than_two_hundredths_of_the_cache(block_size):
    model = build(block_size=block_size, top_k=3, decode="sparse").bfloat16()
    cache = DynamicCache(config=model.config)
    for part in tokens(1, 4500).split((3000, *[1] * 20, 1480), 1):
        run(model, part, cache)
        for layer in cache.layers:
            extra = means_beside(layer).means.nbytes
            assert extra < 0.02 * (layer.keys.nbytes + layer.values.nbytes)


def test_unpatch_takes_the_hooks_away():
    model = build(layers=3)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    patch(model, **FULL)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2  # full decoding wants no layer's cache
    patch(model, **SPARSE)
    patch(model, **FULL)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 5  # three layers, and the model with and without its head
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        unpatch(same)
        assert [dict(module._forward_pre_hooks) for module in same.modules()] == before
        assert not any(module._forward_pre_hooks_with_kwargs for module in same.modules())


# With decode="full", plain, assisted and prompt-lookup generation give the same tokens


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


# What cannot be


def test_padding_between_real_tokens_is_refused_with_a_static_cache_too():
    model, inputs = build(**SPARSE), padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # padding on the right, and then new tokens
    for cache in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="padding between real tokens"):
            model.generate(**inputs, **GREEDY, **cache)


def test_set_attention_to_the_specification_decodes_alike():
    model, ids = build(**SPARSE), tokens()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(set_attention(model, "moba_naive").generate(ids, **GREEDY), expected)


@families.hrm_works
def test_layers_that_run_several_times_keep_no_means():
    """With each call they choose a layer of the cache, which a graph does not see."""
    torch.manual_seed(0)
    model = patch(transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**families.SIZES)).eval(), **SPARSE)
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    assert not any(means_beside(layer) for layer in cache.layers)
