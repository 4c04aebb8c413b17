"""Drafted tokens that are verified count as decoding, whoever drafts them and whatever mode the model was left in."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import SPARSE, build, each_decode, tokens
from torch import Tensor

from moba_flex.models import full_attention, patch, set_attention


def repeated(length: int = 53) -> Tensor:
    return tokens(1, 6).repeat(1, 9)[:, :length]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("assisted", ["prompt lookup", "assistant"])
def test_drafts_give_the_tokens_of_greedy_decoding_in_either_mode(training, assisted):
    model, ids = patch(build(), **SPARSE).train(training), repeated()
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    drafts = {"prompt_lookup_num_tokens": 5} if assisted == "prompt lookup" else {"assistant_model": build()}
    assert torch.equal(model.generate(ids, **drafts, **call), model.generate(ids, **call))


@each_decode
@pytest.mark.parametrize("attention", ["moba", "moba_naive", "full", "within full_attention"])
def test_multi_token_prediction_gives_the_tokens_of_greedy_decoding(attention, decode, monkeypatch):
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip(f"transformers {transformers.__version__} has no multi-token prediction")
    model, ids = build("deepseek_v3"), tokens(1, 40)
    model.config.num_mtp_layers = 1
    monkeypatch.setattr(layers.MtpModel, "from_pretrained", classmethod(lambda cls, main, device_map=None: cls(main, 1).eval()))
    patch(model, **SPARSE, decode=decode)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    if attention == "within full_attention":
        with full_attention(model):
            assert torch.equal(model.generate(ids, use_mtp=True, **call), model.generate(ids, **call))
        return
    set_attention(model, attention)
    assert torch.equal(model.generate(ids, use_mtp=True, **call), model.generate(ids, **call))
