"""Layers that are called as an earlier layer of their pass repeat its call of the original attention; all others decide anew."""

from __future__ import annotations

import pytest
import torch
from support.families import SPARSE, build, each_decode, tokens
from support.families import logits as logits_with_gradients
from support.serving import Serving, alone
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex import MobaConfig
from moba_flex.models import attention_function, patch, set_attention, upstream
from moba_flex.models.masks import moba_mask
from moba_flex.models.paged_cache import PAGED
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


# Continuous batching

batches = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """The layers whose call in continuous batching was decided."""
    layers, attend = [], attention_function.attend_paged
    monkeypatch.setattr(attention_function, "attend_paged", lambda call, keys: layers.append(call.layer.layer_idx) or attend(call, keys))
    return layers


def serve(model: nn.Module, *lengths: int, new: int = 8) -> None:
    """Serve prompts of these lengths together: each must get the tokens that it gets alone."""
    serving = Serving(model, max_batch_tokens=256)
    wanted = {serving.add(prompt): prompt for prompt in (tokens(1, n, seed=n)[0].tolist() for n in lengths)}
    got = serving.finish()
    for name, prompt in wanted.items():
        assert got[name] == alone(model, prompt, new), f"a prompt of {len(prompt)} tokens"


@batches
@each_decode
def test_requests_that_read_all_keys_are_decided_once_a_pass(attended, decode):
    serve(patch(build("llama"), block_size=16, top_k=100, decode=decode), 20, 33, 1)
    assert set(attended) == {0} and len(attended) >= 8


@batches
@each_decode
def test_requests_of_which_some_use_moba_are_decided_by_each_layer(attended, decode):
    """With `decode="full"` the passes of generated tokens are those of full attention."""
    serve(patch(build("llama"), block_size=16, top_k=2, decode=decode), 20, 70)
    passes = attended.count(0)
    assert passes >= 8 and attended.count(1) == attended.count(3) == (passes if decode == "sparse" else 1)


@batches
def test_block_means_are_updated_while_all_keys_are_read():
    """The prompt and the first tokens read all keys; later ones choose among blocks that were completed meanwhile."""
    model, (prompt,) = patch(build("llama"), block_size=16, top_k=2, decode="sparse"), tokens(1, 10)
    serving = Serving(model, new=60)
    assert serving.cache._means is not None
    name = serving.add(prompt.tolist())
    assert serving.finish()[name] == alone(model, prompt.tolist(), 60)


@batches
def test_layers_with_full_attention_do_not_repeat_those_with_moba(attended):
    serve(patch(build("llama"), block_size=16, top_k=2, decode="sparse", full_attention_layers=[1, 2]), 70, 40)
    assert attended.count(0) == attended.count(1) == attended.count(3) > attended.count(2) == 0


@batches
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_layers_with_windows_are_decided_anew(attended, family):
    serve(patch(build(family), block_size=16, top_k=100, decode="sparse"), 20, 33)
    assert {0, 1, 2} <= set(attended)


@batches
@pytest.mark.parametrize("change", ["keys", "window"])
def test_a_layer_that_reads_other_keys_is_decided_anew(attended, monkeypatch, change):
    moba = ALL_ATTENTION_FUNCTIONS["moba"]

    def changed(layer, query, key, value, mask, **kwargs):
        if layer.layer_idx == 2 and change == "keys":
            key = key.clone()
        elif layer.layer_idx == 2:
            kwargs[PAGED] = kwargs[PAGED]._replace(window=4, length=lambda past, new: past + new)
        return moba(layer, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "moba", changed)
    serving = Serving(patch(build("llama"), block_size=16, top_k=100))
    serving.add(tokens(1, 20)[0].tolist())
    if change == "keys":
        with pytest.raises(ValueError, match="changes its keys or values after it has read them"):
            serving.step()
    else:
        serving.step()
    assert attended == [0, 2]
