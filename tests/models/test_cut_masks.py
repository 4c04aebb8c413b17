"""Models whose last layers read the keys of others (Gemma 4) let a prompt's last tokens alone through these, and cut the mask to them."""

from __future__ import annotations

import pytest
import torch
from support.families import ALL_BLOCKS, FAMILIES, SPARSE, TOKENS, assert_close, build, each_decode, logits, padded, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moba_flex import patch, set_attention
from moba_flex.models.masks import MobaMask, moba_mask

pytestmark = pytest.mark.skipif("gemma4" not in FAMILIES, reason="this version of transformers has no Gemma 4")


def patched(**settings) -> PreTrainedModel:
    return patch(build("gemma4"), **SPARSE, **settings)


def last_logits(model: PreTrainedModel, ids: Tensor, keep: int, **inputs) -> Tensor:
    with torch.no_grad():
        return model(ids, logits_to_keep=keep, use_cache=True, **inputs).logits


@each_decode
@pytest.mark.parametrize("side", ["none", "left"])
def test_the_last_token_of_a_prompt_reads_what_it_would_without_the_cut(decode, side):
    model, inputs = patched(decode=decode), padded(side)
    cut = {}
    record = model.model.layers[-1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: cut.update(shape=kwargs["hidden_states"].shape), with_kwargs=True
    )
    kept = last_logits(model, inputs.pop("input_ids"), 1, **inputs)
    record.remove()
    cuts = hasattr(model.model, "_maybe_slice_kv_shared_inputs")  # older versions let all tokens through
    assert cut["shape"][1] == (1 if cuts else TOKENS)
    with torch.no_grad():
        assert_close(kept, model(padded(side)["input_ids"], use_cache=False, **inputs).logits[:, -1:], f"decode {decode}, padding {side}")


def test_drafts_behind_a_prompt_read_all_keys_and_the_prompt_does_not():
    model, ids = patched(), tokens()
    got = last_logits(model, ids, 5, past_key_values=DynamicCache(config=model.config))  # four drafts
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        prompt = model(ids[:, :-4], past_key_values=cache, use_cache=True)
        one_by_one = [prompt.logits[:, -1:]]
        one_by_one += [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1] - 4, ids.shape[1])
        ]
    assert_close(got, torch.cat(one_by_one, 1), "four drafts")


@each_decode
def test_prompt_lookup_gives_the_tokens_of_greedy_decoding(decode):
    model, ids = patched(decode=decode), tokens(1).repeat(1, 2)
    greedy, looked_up = (model.generate(ids, max_new_tokens=12, do_sample=False, **more) for more in ({}, {"prompt_lookup_num_tokens": 3}))
    assert torch.equal(greedy, looked_up)


def test_full_attention_behind_a_cut_is_the_unpatched_model_s():
    model, ids = build("gemma4"), tokens()
    before = [last_logits(model, ids, keep) for keep in (1, 5)]
    for settings in (ALL_BLOCKS, SPARSE):
        set_attention(patch(model, **settings), "moba" if settings is ALL_BLOCKS else "full")
        for keep, expected in zip((1, 5), before):
            assert_close(last_logits(model, ids, keep), expected, f"{settings}, the last {keep}")


@pytest.mark.parametrize("keep", [1, 2])
def test_one_query_behind_a_cut_reads_no_key_that_a_static_cache_has_not_got_yet(keep):
    model, ids = build("gemma4"), tokens()
    before = last_logits(model, ids, keep)
    patch(model, **{**ALL_BLOCKS, "implementation": "auto"})
    cache = StaticCache(config=model.config, max_cache_len=200)
    assert_close(last_logits(model, ids, keep, past_key_values=cache), before, f"the last {keep}")


def test_other_cuts_are_refused_and_the_whole_is_the_same_mask():
    mask = moba_mask(2, 9, 20, 11)
    assert mask[:, :, -0:, :] is mask and mask[:, :, -30:] is mask
    cut = mask[:, :, -4:, :]
    assert isinstance(cut, MobaMask) and cut.shape == (2, 1, 4, 20)
    for index in (
        0,
        (0,),
        (slice(None), 0),
        (slice(None), slice(None), slice(0, 4)),
        (slice(None), slice(None), slice(-4, None), slice(0, 5)),
    ):
        with pytest.raises(AttributeError, match="which MoBA does not build"):
            mask[index]


def test_a_model_with_shared_keys_learns():
    model = patched().train()
    ids = tokens()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)
    assert logits(model.eval(), ids).isfinite().all()
