"""Layers that are called as an earlier layer of their pass repeat its call of the original attention; all others decide anew."""

from __future__ import annotations

import pytest
import torch
from support.families import SPARSE, build, tokens
from support.families import logits as logits_with_gradients
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex import MobaConfig
from moba_flex.models import attention_function, patch, set_attention
from moba_flex.models.masks import moba_mask
from moba_flex.models.state import set_watcher
from moba_flex.models.upstream import causal_mask_function

READS_ALL = {"block_size": 8, "top_k": 100}


@pytest.fixture
def decided(monkeypatch) -> list[int]:
    """The layers whose call was decided."""
    layers, decide = [], attention_function.decide
    monkeypatch.setattr(attention_function, "decide", lambda call: layers.append(call.layer.layer_idx) or decide(call))
    return layers


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_with_gradients(model, ids)


def attention(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def test_the_first_layer_decides_for_all(decided):
    model = build("llama")
    expected = logits(model, tokens())
    assert torch.equal(logits(patch(model, **READS_ALL), tokens()), expected)
    assert decided == [0]


def test_tokens_decoded_with_full_attention_are_decided_once(decided):
    model, ids = build("llama"), tokens()[:1]
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = torch.cat([ids, model.generate(ids, **how)[:, ids.shape[1] :]], 1)
    patch(model, **READS_ALL, decode="full")
    assert torch.equal(model.generate(ids, **how), expected)
    assert decided == [0] * 4


def test_layers_with_moba_decide_each(decided):
    logits(patch(build("llama"), **SPARSE), tokens())
    assert decided == [0, 1, 2, 3]


def test_block_means_are_completed_by_each_layer(decided):
    model = patch(build("llama"), **READS_ALL, decode="sparse")
    with torch.no_grad():
        model(tokens(), use_cache=True)
    assert decided == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "stablelm"])  # the decoder layers of the second pass no keyword arguments on
def test_a_pass_with_gradients_decides_each(decided, family):
    patch(build(family), **READS_ALL)(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert decided == [0, 1, 2, 3]


def test_a_layer_that_differs_decides_anew(decided):
    """Full and MoBA layers in turn; then one that is watched."""
    model = patch(build("llama"), **SPARSE, full_attention_layers=[0, 2])
    reference = logits(patch(build("llama"), **SPARSE, full_attention_layers=[0, 2], implementation="naive"), tokens())
    decided.clear()
    torch.testing.assert_close(logits(model, tokens()), reference, rtol=1e-4, atol=2e-4)
    assert decided == [0, 1, 3]

    seen: list[int] = []
    patch(model, **READS_ALL)
    set_watcher(attention(model)[2], lambda layer, *_: seen.append(layer.layer_idx))
    decided.clear()
    logits(model, tokens())
    assert (decided, seen) == ([0, 2], [2])


def one_call(model: nn.Module, mask: object, index: int = 0, n: int = 8, **kwargs) -> torch.Tensor:
    layer = attention(model)[index]
    torch.manual_seed(n)
    q, k, v = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)
    with torch.no_grad():
        return ALL_ATTENTION_FUNCTIONS["moba"](layer, q, k, v, mask, **{"scaling": layer.scaling, "dropout": 0.0, **kwargs})[0]


def mask_of(n: int = 8) -> object:
    return moba_mask(1, n, n, mask_function=causal_mask_function)


def test_arguments_are_compared_by_value_and_tensors_by_identity(decided):
    model, mask = patch(build("llama"), **READS_ALL), mask_of()
    positions = torch.arange(8)
    one_call(model, mask, 0, position_ids=positions, scaling=float("0.5"))
    one_call(model, mask, 1, position_ids=positions, scaling=float("0.5"))
    assert decided == [0]
    one_call(model, mask, 1, position_ids=positions.clone(), scaling=0.5)
    one_call(model, mask, 2, position_ids=positions, scaling=0.25)
    one_call(model, mask, 3, position_ids=positions, scaling=0.25, is_causal=None)
    assert decided == [0, 1, 2, 3]


def test_a_repeated_call_passes_on_the_arguments_of_its_own_layer():
    model, mask = patch(build("llama"), **READS_ALL), mask_of()
    expected = one_call(model, mask_of(), 1)
    one_call(model, mask, 0)
    assert torch.equal(one_call(model, mask, 1), expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dropout": 0.1}, "attention dropout of 0.1"),
        ({"output_attentions": True}, "attention weights"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"n": 9}, "9 queries"),
    ],
)
def test_what_is_refused_is_refused_by_a_later_layer(wrong, message):
    model, mask = patch(build("llama"), **READS_ALL), mask_of()
    one_call(model, mask, 0)
    with pytest.raises(ValueError, match=message):
        one_call(model, mask, 1, **wrong)


def test_a_mask_that_outlives_its_pass_remembers_nothing_wrong():
    """The same mask, after the model was switched or got other settings."""
    model, mask = patch(build("llama"), **READS_ALL), mask_of()
    full = one_call(model, mask)
    patch(model, block_size=1, top_k=2)
    sparse = one_call(model, mask)
    assert torch.equal(sparse, one_call(model, mask_of())) and (sparse - full).abs().max() > 1e-3
    model.config.moba = MobaConfig(**READS_ALL)
    assert torch.equal(one_call(model, mask), full)
    model.config.moba = MobaConfig(block_size=1, top_k=2)
    assert torch.equal(one_call(model, mask), sparse)
    set_attention(model, "full", layers=[0])
    assert torch.equal(one_call(model, mask), full)
    set_attention(model, "moba", layers=[0])
    assert torch.equal(one_call(model, mask), sparse)
