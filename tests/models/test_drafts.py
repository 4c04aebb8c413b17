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

from moba_flex.models import current_call, full_attention, patch, set_attention, unpatch

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


# What a call says is for the parts of its model alone


def while_drafts_are_verified(model: PreTrainedModel, hook) -> None:
    """Generate with drafts; `hook` is called in each pass, within the stack of layers and before its masks are made."""
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: hook())
    model.generate(repeated(30), prompt_lookup_num_tokens=5, max_new_tokens=8, do_sample=False)
    handle.remove()


def logits_of(model: PreTrainedModel, **more) -> Tensor:
    with torch.no_grad():
        return model(repeated(), use_cache=False, **more).logits


def test_a_model_that_is_called_within_another_one_s_call_says_for_itself():
    model, other, seen = patch(build(), **SPARSE), patch(build(num_hidden_layers=2), **SPARSE), []
    alone = logits_of(other)
    while_drafts_are_verified(model, lambda: seen.append(logits_of(other)))
    cu_seqlens = torch.tensor([0, 20, 53], dtype=torch.int32)
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(logits_of(other)))
    logits_of(model, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    handle.remove()
    assert len(seen) > 2 and all(torch.equal(x, alone) for x in seen)


def test_a_model_may_be_called_within_its_own_call():
    model, nested = patch(build(), **SPARSE), []
    how = {"prompt_lookup_num_tokens": 5, "max_new_tokens": 8, "do_sample": False}
    expected, seen = model.generate(repeated(30), **how), drafts_seen(model)
    model.generate(repeated(30), **how)
    without, seen[:] = seen[:], []

    def probe(*_) -> None:
        if not nested:
            nested.append(True)
            logits_of(model)
            nested.clear()

    handle = model.model.embed_tokens.register_forward_pre_hook(probe)
    assert torch.equal(model.generate(repeated(30), **how), expected)
    handle.remove()
    assert seen[0::2] == [0] * len(without) and seen[1::2] == without and any(without)


@pytest.mark.parametrize("how", ["interrupted", "unpatched"])
def test_a_call_that_ends_without_its_hook_leaves_nothing_to_other_models(how):
    model, other, by_name = patch(build(), **SPARSE), patch(build(), **SPARSE), build(attention="moba", moba=SPARSE)
    alone, alone_by_name = logits_of(other), logits_of(by_name)

    def leave() -> None:
        if how == "interrupted":
            raise KeyboardInterrupt
        unpatch(model)

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: leave())
    with pytest.raises((KeyboardInterrupt, ValueError)):
        call(model, logits_to_keep=5)
    handle.remove()
    assert current_call._HERE.running, "the case leaves nothing behind"
    assert torch.equal(logits_of(by_name), alone_by_name), "a model without hooks"
    assert torch.equal(logits_of(other), alone)
    assert not current_call._HERE.running


@pytest.mark.parametrize("seed", [0, 3])  # whose first calls verify drafts
def test_prompts_that_read_all_keys_keep_the_bits_of_full_attention_beside_drafts(seed):
    model, ids = build(), tokens(1, 24, seed)
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    drafts = {"prompt_lookup_num_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **how, **drafts).scores
    patch(model, block_size=24, top_k=1)
    seen = drafts_seen(model)
    assert all(map(torch.equal, model.generate(ids, **how, **drafts).scores, expected))
    assert seen[0] == 3, "the first call verifies no drafts"


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
