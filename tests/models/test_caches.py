"""Whatever becomes of a cache, its block means stay right: cropped, reordered, copied, reset, quantized, written to by others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from support import families
from support.cached_generation import FULL, GREEDY, SPARSE, build, filled, means, padded, recomputed, run, tokens
from support.families import each_decode
from support.small_models import loaded, names, small_model
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from moba_flex.models import block_means, full_attention, patch, set_attention, unpatch
from moba_flex.models.state import means_beside


def assert_right(model: PreTrainedModel, cache, ids: Tensor, new: Tensor, case: str = "", **inputs) -> None:
    """Decoding `new` behind what the cache holds of `ids`, token by token, is recomputation."""
    whole = torch.cat([ids, new], 1)
    expected = run(model, whole, None, **inputs)[:, ids.shape[1] :]
    mask = inputs.get("attention_mask")
    for i in range(new.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, : ids.shape[1] + i + 1]}
        actual = run(model, new[:, i : i + 1], cache, **seen)
        torch.testing.assert_close(actual[:, 0], expected[:, i], rtol=1e-4, atol=2e-4, msg=lambda m, i=i: f"{case}, token {i}: {m}")


@each_decode
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_a_model_of_several_parts_generates_with_a_static_cache(name, decode):
    """`generate` makes the masks of the language model before it calls the whole, whose own configuration names other attention."""
    model, inputs = small_model(*loaded(name, *names()[name])[1:]), {"input_ids": tokens(2, 53)}
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    static = {"cache_implementation": "static"}
    padding = torch.ones(2, 53, dtype=torch.int64)
    padding[1, :5] = 0
    for mask in (padding, torch.ones_like(padding)):
        inputs["attention_mask"] = mask
        expected = unpatch(model).generate(**inputs, **how)
        patch(model, **families.SPARSE, decode=decode)
        assert torch.equal(model.generate(**inputs, **how, **static), model.generate(**inputs, **how))
        patch(model, block_size=8, top_k=100, decode=decode)
        assert torch.equal(model.generate(**inputs, **how, **static), expected)
        set_attention(model, "full")
        assert torch.equal(model.generate(**inputs, **how, **static), expected)


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

    def in_place(cache):
        for layer in cache.layers:
            layer.keys.mul_(-2)

    def in_place_before_a_crop(cache):
        for layer in cache.layers:
            layer.keys[:, :, 3:30] *= -2
        cache.crop(-1)

    for change in (by_full_attention, by_an_unpatched_model, by_hand, by_hand_before_a_crop, in_place, in_place_before_a_crop):
        cache = filled(model, ids)
        change(cache)
        fresh = DynamicCache(config=model.config)  # the same keys and values, and no means
        for i, layer in enumerate(cache.layers):
            fresh.update(layer.keys.clone(), layer.values.clone(), i)
        for i in range(12):
            torch.testing.assert_close(run(model, new[:, i : i + 1], cache), run(model, new[:, i : i + 1], fresh), msg=change.__name__)


def test_keys_that_are_written_to_in_a_static_cache_are_noticed():
    model, ids, new = build(**SPARSE), tokens(), tokens(1, 12, seed=5)
    cache, fresh = (StaticCache(config=model.config, max_cache_len=80) for _ in range(2))
    for one in (cache, fresh):
        run(model, ids, one)
        run(model, new[:, :1], one)
    for layer, other in zip(cache.layers, fresh.layers):
        layer.keys.mul_(-2)
        other.keys = other.keys * -2
    for i in range(1, 12):
        torch.testing.assert_close(run(model, new[:, i : i + 1], cache), run(model, new[:, i : i + 1], fresh))


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


# Caches and models of other kinds


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


@families.hrm_works
def test_layers_that_run_several_times_keep_no_means():
    """With each call they choose a layer of the cache, which a graph does not see."""
    torch.manual_seed(0)
    model = patch(transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**families.SIZES)).eval(), **SPARSE)
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    assert not any(means_beside(layer) for layer in cache.layers)


# What means cost, and hooks


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
