"""What patching promises for each family of models, on a small random model of the real class."""

from __future__ import annotations

import pytest
import torch
from support.families import (
    ALL_BLOCKS,
    HYBRID,
    SIZES,
    SPARSE,
    assert_close,
    attentions,
    build,
    each_family,
    each_side,
    gradients,
    logits,
    padded,
    snapshot,
    tokens,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moba_flex.models import full_attention, patch, set_attention, unpatch


@each_family
@each_side
def test_with_every_block_taken_a_patched_model_is_the_unpatched_one(family, side):
    model, inputs = build(family), padded(side)
    before = logits(model, inputs)
    assert_close(logits(patch(model, **ALL_BLOCKS), inputs), before, f"{family}, padding {side}")


@each_family
@each_side
def test_a_patched_model_is_the_same_with_the_specification(family, side):
    model, inputs = build(family), padded(side)
    before = logits(model, inputs)
    settings = {"block_size": 8, "top_k": 3, "sink_blocks": 1}
    sparse = logits(patch(model, **settings), inputs)
    assert (sparse - before).abs().max() > 1e-2, f"{family}, padding {side}: MoBA was not used"
    assert_close(logits(set_attention(model, "moba_naive"), inputs), sparse, f"{family}, padding {side}, moba_naive")
    patch(model, **settings, implementation="naive")
    assert_close(logits(model, inputs), sparse, f"{family}, padding {side}, implementation naive")


@each_family
def test_unpatch_gives_the_model_back_bit_for_bit(family):
    model, inputs = build(family), padded("left")
    state, before = snapshot(model), logits(model, inputs)
    patch(model, **SPARSE)
    logits(model, inputs)
    set_attention(model, "full", layers=[1])
    set_attention(model, "moba_naive")
    assert unpatch(model) is model
    assert snapshot(model) == state, family
    assert torch.equal(logits(model, inputs), before), family
    unpatch(model)
    assert snapshot(model) == state, f"{family}: unpatching twice"


@each_family
@each_side
def test_full_attention_of_a_patched_model_is_the_models_own_bit_for_bit(family, side):
    model, inputs = build(family), padded(side)
    before = logits(model, inputs)
    patch(model, **SPARSE)
    set_attention(model, "full")
    assert torch.equal(logits(model, inputs), before), f"{family}, padding {side}"


@pytest.mark.parametrize("family", HYBRID)
@each_side
def test_sliding_layers_get_what_they_always_got(family, side, monkeypatch):
    model, inputs = build(family, "eager"), padded(side)
    source = __import__(type(attentions(model)[0]).__module__, fromlist=["eager_attention_forward"])
    seen, eager = {}, source.eager_attention_forward

    def record(module, query, key, value, attention_mask, **kwargs):
        seen[module.layer_idx] = attention_mask, sorted(kwargs)
        return eager(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(source, "eager_attention_forward", record)
    logits(model, inputs)
    before = dict(seen)
    seen.clear()
    logits(patch(model, **SPARSE), inputs)
    assert sorted(seen) == [0, 2], f"{family}: only sliding layers keep ordinary attention"
    for layer, (mask, names) in seen.items():
        assert torch.equal(mask, before[layer][0]) and names == before[layer][1], f"{family}, layer {layer}"


@each_family
def test_autocast_costs_no_more_exactness_than_with_full_attention(family):
    """With every block taken, where no choice of blocks can turn on a rounding. Rotary embeddings leave query and key wider than value."""
    model, ids = patch(build(family), **ALL_BLOCKS), tokens()
    exact, errors = logits(model, ids), {}
    for attention in ("full", "moba"):
        set_attention(model, attention)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logits(model, ids, use_cache=False)
        assert rounded.dtype == torch.bfloat16
        errors[attention] = (rounded - exact).norm()
    assert errors["moba"] < 1.5 * errors["full"], f"{family}: {errors}"


# Generation


@torch.no_grad()
def greedy_by_hand(model: PreTrainedModel, ids: Tensor, n_new: int) -> Tensor:
    """A prefill as the model is, then one token at a time with full attention."""
    out = model(ids, use_cache=True)
    for _ in range(n_new):
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        with full_attention(model):
            out = model(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
    return ids


@each_family
def test_greedy_generation_is_a_sparse_prefill_and_full_decoding(family):
    model, ids = patch(build(family), **SPARSE), tokens()
    expected = greedy_by_hand(model, ids, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected), family


@each_family
def test_sparse_decoding_is_recomputation_without_a_cache(family):
    model, ids = patch(build(family), **SPARSE, decode="sparse"), tokens()
    call = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached, recomputed = model.generate(ids, **call), model.generate(ids, use_cache=False, **call)
    assert recomputed.past_key_values is None and cached.past_key_values is not None
    assert_close(torch.stack(cached.scores), torch.stack(recomputed.scores), family)
    assert torch.equal(cached.sequences, recomputed.sequences), family


# Training


@each_family
def test_a_training_step_has_the_gradients_of_the_specification(family):
    model, inputs = build(family).train(), padded("right")
    for parameters in model.parameters():
        parameters.data *= 0.3  # loss and gradients of a size at which absolute errors mean something
    full = gradients(model, inputs)
    sparse = gradients(patch(model, **SPARSE), inputs)
    assert sparse.keys() == full.keys() == dict(model.named_parameters()).keys(), family
    for name, expected in gradients(set_attention(model, "moba_naive"), inputs).items():
        assert torch.isfinite(sparse[name]).all(), f"{family}, {name}"
        assert_close(sparse[name], expected, f"{family}, {name}")


# What cannot be patched

NO_REGISTRY = "none of its modules asks transformers' registry for its attention"
TINY = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 8}
T5 = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
UNPATCHABLE = {
    "no attention": (lambda: MambaForCausalLM(MambaConfig(**TINY, state_size=2)), NO_REGISTRY),
    "an encoder": (lambda: BertModel(BertConfig(**TINY, **HEADS)), r"attention layers: 0, 1 \(BertSelfAttention\)"),
    "a position bias": (
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        r"without a position bias: its attention layers: 0, 1 \(T5Attention\)",
    ),
    "attention code of its own": (lambda: BloomForCausalLM(BloomConfig(**TINY, n_head=2)), NO_REGISTRY),
    "windows in all layers": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
        r"attention layers: 0 to 3 \(MistralAttention\)",
    ),
    "no model of transformers": (lambda: nn.Linear(2, 2), NO_REGISTRY),
}


@pytest.mark.parametrize("kind", UNPATCHABLE)
def test_a_model_without_a_layer_that_moba_can_replace_is_refused_by_name(kind):
    make, message = UNPATCHABLE[kind]
    model = make()
    state = [sorted(module.__dict__) for module in model.modules()]
    for call in (patch, lambda m: set_attention(m, "moba"), lambda m: full_attention(m).__enter__()):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} has no layer that MoBA can replace.*{message}"):
            call(model)
    assert [sorted(module.__dict__) for module in model.modules()] == state
    assert unpatch(model) is model


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a transformers model, but is a str: moba_flex\.AutoModelForCausalLM"):
        patch("model")
