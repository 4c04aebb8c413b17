"""Drafted tokens that are verified count as decoding, whoever drafts them, whatever the model passes on and the mode it was left in."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers
from support.families import SPARSE, build, each_decode, tokens
from support.small_models import inputs_of, loaded, names, small_model
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from moba_flex.models import full_attention, patch, set_attention, unpatch

EVERY = names()
# Of the first two the decoder layers pass no extra keyword arguments on; `forward` of the others has no `logits_to_keep`.
SAYS_LESS = (
    *("NemotronForCausalLM", "StableLmForCausalLM", "MarianMTModel", "WhisperForCausalLM", "WhisperForConditionalGeneration"),
    *("MoonshineForConditionalGeneration", "SeamlessM4TForTextToText", "Qwen2AudioForConditionalGeneration"),
    "VideoLlama3ForConditionalGeneration",
)
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def repeated(length: int = 53) -> Tensor:
    return tokens(1, 6).repeat(1, 9)[:, :length]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("assisted", ["prompt lookup", "assistant"])
def test_drafts_give_the_tokens_of_greedy_decoding_in_either_mode(training, assisted):
    model, ids = patch(build(), **SPARSE).train(training), repeated()
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    drafts = {"prompt_lookup_num_tokens": 5} if assisted == "prompt lookup" else {"assistant_model": build()}
    assert torch.equal(model.generate(ids, **drafts, **call), model.generate(ids, **call))


def small(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A patched model, and what to generate with."""
    model, ids = small_model(*loaded(name, *EVERY[name])[1:]), repeated()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = inputs_of(model, ids, torch.ones_like(ids))
    return patch(model, **SPARSE), {name: x for name, x in inputs.items() if not name.startswith("decoder_attention")}


def same_with_drafts(model: PreTrainedModel, inputs: dict[str, Tensor], **drafts) -> bool:
    generate = GenerationMixin.generate  # Whisper's own takes no decoder_input_ids beside an assistant
    return torch.equal(generate(model, **inputs, **GREEDY, **drafts), generate(model, **inputs, **GREEDY))


@pytest.mark.parametrize("name", SAYS_LESS)
def test_drafts_reach_layers_whatever_a_model_passes_on(name):
    model, inputs = small(name)
    for seed in range(3):  # not every prompt tells drafts from a prompt
        ids = tokens(1, 6, seed).repeat(1, 9)[:, :53]
        assert same_with_drafts(model, inputs | {key: ids for key in inputs if key.endswith("input_ids")}, prompt_lookup_num_tokens=4)
    assistant = small(name)[0] if "Causal" not in name else unpatch(small(name)[0])
    assert same_with_drafts(model, inputs, assistant_model=assistant)


def test_a_model_without_logits_to_keep_says_its_drafts_until_it_is_unpatched():
    model, inputs = small("WhisperForConditionalGeneration")
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), patch(unpatch(copy.deepcopy(model)), **SPARSE)):
        assert same_with_drafts(each, inputs, prompt_lookup_num_tokens=4)
        assert each.prepare_inputs_for_generation._model() is each
    assert "prepare_inputs_for_generation" not in vars(unpatch(model))


@pytest.mark.parametrize("family", ["llama", "stablelm"])
@torch.no_grad()
def test_drafts_count_in_a_graph_as_outside(family):
    torch._dynamo.reset()
    model, ids = patch(build(family, num_hidden_layers=2), **SPARSE), repeated()

    def run(call, keep: int) -> Tensor:
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        return call(ids[:, 20:], past_key_values=cache, logits_to_keep=keep).logits

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for keep in (5, 1, 3, 5):
        torch.testing.assert_close(run(compiled, keep), run(model, keep))
    without = patch(build(family, num_hidden_layers=2), **SPARSE)
    assert (run(model, 5)[:, -1] - run(without.forward, 5)[:, -1]).abs().max() > 1e-2, "the case does not tell drafts from a prompt"


def drafts_seen(model: PreTrainedModel) -> list[int]:
    """Filled by each call of the first layer."""
    seen: list[int] = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"].call.drafts), with_kwargs=True)
    return seen


def call(model: PreTrainedModel, **more) -> None:
    with torch.no_grad():
        model(repeated(), past_key_values=DynamicCache(config=model.config), **more)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("alone", [False, True], ids=["model", "stack"])
def test_a_call_that_raises_leaves_no_drafts_behind(error, alone):
    model = patch(build(), **SPARSE)
    seen = drafts_seen(model)

    def fail(*_) -> None:
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        call(model, logits_to_keep=5)
    handle.remove()
    call(model.model if alone else model)
    assert seen == [4, 0]


def test_calls_in_other_threads_and_within_a_call_have_drafts_of_their_own():
    model, inner, other = (patch(build(), **SPARSE) for _ in range(3))
    seen, of_inner, of_other = map(drafts_seen, (model, inner, other))

    def meanwhile(*_) -> None:
        call(inner, logits_to_keep=3)
        thread = threading.Thread(target=call, args=(other,))
        thread.start()
        thread.join()

    model.model.register_forward_pre_hook(meanwhile)
    call(model, logits_to_keep=5)
    assert (seen, of_inner, of_other) == ([4], [2], [0])


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
