"""Full attention of a patched model is the unpatched model bit for bit, and a pass that is computed again is the same pass."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from support.families import SPARSE, attentions, build, each_family, logits, padded, tokens
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moba_flex.models import full_attention, patch, set_attention, unpatch
from moba_flex.models.layers import attention_of, mask_use_of
from moba_flex.models.upstream import MaskUse


def moonshine() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Its decoder's layers are causal where their mask is None."""
    sizes = {f"{part}num_attention_heads": 4 for part in ("encoder_", "decoder_")}
    sizes |= {f"{part}num_key_value_heads": 4 for part in ("encoder_", "decoder_")}
    sizes |= {f"{part}num_hidden_layers": 2 for part in ("", "encoder_", "decoder_")}
    config = MoonshineConfig(vocab_size=64, hidden_size=32, intermediate_size=32, initializer_range=0.3, **sizes)
    model = MoonshineForConditionalGeneration._from_config(config).eval()
    return model, {"input_values": torch.randn(2, 4000), "decoder_input_ids": tokens(2, 30)}


FULL = {
    "set_attention": lambda model: set_attention(patch(model, **SPARSE), "full"),
    "one layer after another": lambda model: set_attention(set_attention(patch(model, **SPARSE), "full", [0]), "full", [1]),
    "full_attention_layers": lambda model: patch(model, **SPARSE, full_attention_layers=[0, 1]),
    "one block": lambda model: patch(model, block_size=64, top_k=2),
}


@pytest.mark.parametrize("how", FULL)
def test_a_layer_whose_code_looks_at_its_mask_sees_the_one_that_it_had(how):
    model, inputs = moonshine()
    before = logits(model, inputs)
    assert torch.equal(logits(FULL[how](model), inputs), before), how
    changed = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, -1] = 5
    assert torch.equal(logits(model, changed)[:, :-1], before[:, :-1]), f"{how}: future tokens are seen"


def test_a_layer_whose_code_looks_at_its_mask_uses_moba():
    model, inputs = moonshine()
    before = logits(model, inputs)
    sparse = logits(patch(model, **SPARSE), inputs)
    assert (sparse - before).abs().max() > 1e-3, "MoBA was not used"
    torch.testing.assert_close(logits(set_attention(model, "moba_naive"), inputs), sparse)
    assert torch.equal(logits(unpatch(model), inputs), before)


def test_such_a_layer_generates_what_it_generated():
    model, inputs = moonshine()
    call = {"input_values": inputs["input_values"], "max_new_tokens": 10, "do_sample": False}
    before = model.generate(**call)
    assert torch.equal(patch(model, block_size=64, top_k=2).generate(**call), before)


@each_family
@pytest.mark.parametrize("side", ["none", "left"])
def test_full_attention_is_the_unpatched_model_bit_for_bit(family, side):
    model, inputs = build(family), padded(side)
    before, name = logits(model, inputs), model.config._attn_implementation
    with full_attention(patch(model, **SPARSE)):
        assert torch.equal(logits(model, inputs), before), f"{family}, padding {side}"
        assert model.config._attn_implementation == name
    assert model.config._attn_implementation == "moba"
    assert torch.equal(logits(set_attention(model, "full"), inputs), before), f"{family}, padding {side}"


def test_the_name_that_was_there_comes_back_after_full_attention():
    model = set_attention(patch(build(), **SPARSE), "moba_naive")
    with full_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "moba_naive"


NAMES = ["eager", "sdpa", "flex_attention"]


def name_of(model: PreTrainedModel) -> str:
    return model.config._attn_implementation


def attention_in_layers(model: PreTrainedModel) -> list[str]:
    """What each layer uses, as its attention function would find it."""
    return [attention_of(layer, model.config.moba) for layer in attentions(model)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [lambda model: model, lambda model: set_attention(model, "full")], ids=["moba", "full"])
def test_full_attention_leaves_what_set_attn_implementation_has_chosen(name, before):
    model = before(patch(build(), **SPARSE))
    model.set_attn_implementation(name)
    with full_attention(model):
        assert name_of(model) == name
    assert name_of(model) == name


@pytest.mark.parametrize("name", ["eager", "flex_attention", "moba_naive"])
def test_set_attn_implementation_within_full_attention_stays(name):
    model = patch(build(), **SPARSE)
    with full_attention(model):
        model.set_attn_implementation(name)
    assert name_of(model) == name
    assert torch.equal(logits(set_attention(model, "moba"), tokens()), logits(patch(build(), **SPARSE), tokens()))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("before", ["moba", "moba_naive", "one layer full"])
def test_overlapping_blocks_restore_the_attention_when_the_last_one_is_left(before, first):
    model = patch(build(), **SPARSE)
    set_attention(model, "full", [1]) if before == "one layer full" else set_attention(model, before)
    used, name = attention_in_layers(model), name_of(model)
    blocks = [full_attention(model), full_attention(model)]
    for block in blocks:
        block.__enter__()
    blocks.pop(first).__exit__(None, None, None)
    assert attention_in_layers(model) == ["full"] * 4 and name_of(model) == "sdpa"
    assert not blocks[0].__exit__(KeyError, KeyError("raised in the block"), None)
    assert attention_in_layers(model) == used and name_of(model) == name


def test_threads_that_enter_and_leave_blocks_restore_the_attention():
    model, interval = patch(build(), **SPARSE), sys.getswitchinterval()

    def enter_and_leave(_) -> None:
        for _ in range(40):
            with full_attention(model):
                assert attention_in_layers(model) == ["full"] * 4

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(enter_and_leave, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert attention_in_layers(model) == ["moba"] * 4 and name_of(model) == "moba"


def test_layers_switched_within_overlapping_blocks_keep_that():
    model = set_attention(patch(build(), **SPARSE), "moba_naive")
    outer, inner = full_attention(model), full_attention(model)
    outer.__enter__()
    set_attention(model, "moba", [0])
    inner.__enter__()
    outer.__exit__(None, None, None)
    set_attention(model, "full", [3])
    assert attention_in_layers(model) == ["full"] * 4
    inner.__exit__(None, None, None)
    assert attention_in_layers(model) == ["moba", "moba_naive", "moba_naive", "full"]
    assert name_of(model) == "moba_naive"


@pytest.mark.parametrize("switch", [unpatch, lambda model: patch(model, block_size=4, top_k=3)], ids=["unpatch", "patch"])
def test_patch_and_unpatch_within_overlapping_blocks_stay(switch):
    model = patch(build(), **SPARSE)
    with full_attention(model), full_attention(model):
        switch(model)
        expected = logits(model, tokens())
    assert torch.equal(logits(model, tokens()), expected)


@pytest.fixture
def strict():
    """A user's attention function that takes the arguments which Llama passes, and no others."""

    def attention(module, query, key, value, attention_mask, scaling, dropout, position_ids=None, use_cache=None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)

    AttentionInterface.register("strict", attention)
    AttentionMaskInterface.register("strict", sdpa_mask)
    yield "strict"
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop("strict")


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_full_attention_passes_the_original_function_no_arguments_of_its_own(decode, strict):
    model = build()
    model.set_attn_implementation(strict)
    expected = gradients_under_checkpoints(model, None, lambda _: None)
    set_attention(patch(model, **SPARSE, decode=decode), "full")
    assert torch.equal(gradients_under_checkpoints(model, None, lambda _: None), expected)
    with torch.no_grad():
        model(tokens(), use_cache=True)
    with pytest.raises(ValueError, match=r"LlamaAttention again, .* after its forward pass"):
        gradients_under_checkpoints(model, False, lambda model: set_attention(model, "moba"))


def test_a_layer_whose_code_depends_on_the_name_of_its_attention_is_refused():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layer that MoBA can replace"):
        patch(GPT2LMHeadModel(GPT2Config(**sizes, reorder_and_upcast_attn=True)), **SPARSE)
    patch(GPT2LMHeadModel(GPT2Config(**sizes)), **SPARSE)


@pytest.mark.parametrize("name", ["deepseek_v32.DeepseekV32Attention", "doge.DogeAttention", "deepseek_v4.DeepseekV4Attention"])
def test_layers_that_make_masks_of_their_own_are_known(name):
    module, _, layer = name.partition(".")
    try:
        source = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[layer])
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {module}")
    assert mask_use_of(object.__new__(getattr(source, layer))) in (MaskUse.CHANGES, MaskUse.NAMES)


# A pass that is computed again


def gradients_under_checkpoints(model: PreTrainedModel, reentrant: bool | None, switch) -> Tensor:
    """`switch` is called between forward and backward, where checkpointed layers are computed again."""
    model, ids = copy.deepcopy(model).train(), tokens(1)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    loss = model(ids, labels=ids, use_cache=False).loss
    switch(model)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["full", "one layer full"])
def test_what_a_layer_used_in_forward_is_what_recomputation_uses(reentrant, first):
    model = set_attention(patch(build(), **SPARSE), "full", [0] if first == "one layer full" else None)
    expected = gradients_under_checkpoints(model, None, lambda _: None)
    for switch in (lambda model: set_attention(model, "moba"), lambda model: patch(model, block_size=4, top_k=3)):
        found = gradients_under_checkpoints(model, reentrant, switch)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_encoder_beside_a_decoder_that_was_switched_is_recomputed_as_it_was(reentrant):
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0, "init_std": 0.3}
    sizes |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
    torch.manual_seed(0)
    model = patch(MarianMTModel(MarianConfig(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)), **SPARSE).train()

    def gradients(checkpointed: bool) -> Tensor:
        each, ids = copy.deepcopy(model), tokens(1)
        if checkpointed:
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
            each.enable_input_require_grads()
        with full_attention(each):
            loss = each(ids, decoder_input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "stablelm"])  # decoder layers of the second pass no extra keyword arguments on
def test_recomputation_of_moba_with_other_settings_is_that_of_forward(family, reentrant):
    model = patch(build(family), **SPARSE)
    expected = gradients_under_checkpoints(model, None, lambda _: None)
    found = gradients_under_checkpoints(model, reentrant, lambda model: patch(model, block_size=4, top_k=3))
    torch.testing.assert_close(found, expected)
    found = gradients_under_checkpoints(model, reentrant, lambda model: set_attention(model, "full", [0, 2]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("switch", [lambda model: set_attention(model, "full"), unpatch], ids=["full", "unpatch"])
def test_recomputation_of_moba_by_other_attention_says_what_to_do(reentrant, switch):
    with pytest.raises(ValueError, match=r"^a checkpoint computes .* again, .*: backward must come before set_attention"):
        gradients_under_checkpoints(patch(build(), **SPARSE), reentrant, switch)


@pytest.mark.parametrize("first", ["moba", "one layer full", "full"])
@pytest.mark.parametrize("reentrant", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_recomputation_in_eval_mode_is_that_of_forward(reentrant, first):
    def gradients(switch) -> Tensor:
        model, ids = patch(build(), **SPARSE), tokens(1)
        if first != "moba":
            set_attention(model, "full", None if first == "full" else [0])
        model.enable_input_require_grads()
        wrap = partial(checkpoint_wrapper, checkpoint_impl=reentrant)
        apply_activation_checkpointing(model, wrap, lambda layer: isinstance(layer, LlamaDecoderLayer))
        loss = model(ids, labels=ids, use_cache=False).loss
        switch(model)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(lambda _: None)
    for switch in (lambda model: patch(model, block_size=4, top_k=3), lambda model: set_attention(model, "moba_naive")):
        torch.testing.assert_close(gradients(switch), expected)


def gradients_of_a_model_in_a_checkpoint(model: PreTrainedModel, reentrant: bool, *switches) -> Tensor:
    model, ids = copy.deepcopy(model).train(), tokens(1)
    model.enable_input_require_grads()
    embedded = model.get_input_embeddings()(ids)
    for switch in switches:
        logits = checkpoint(lambda x: model(inputs_embeds=x, use_cache=False).logits, embedded, use_reentrant=reentrant)
        switch(model)
    logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_whole_model_whose_attention_was_switched_is_an_error(reentrant):
    model, nothing = patch(build(), **SPARSE), lambda _: None
    gradients_of_a_model_in_a_checkpoint(model, reentrant, nothing)
    gradients_of_a_model_in_a_checkpoint(model, reentrant, lambda model: set_attention(model, "full"), nothing)  # before the forward pass
    for switch in (lambda model: set_attention(model, "full"), lambda model: patch(model, block_size=4, top_k=3)):
        with pytest.raises(ValueError, match=r"Llama.* again, whose attention was switched after its forward pass"):
            gradients_of_a_model_in_a_checkpoint(model, reentrant, switch)


def test_a_call_without_gradients_within_a_backward_pass_is_no_recomputation():
    model, ids = patch(build(), **SPARSE).train(), tokens(1)
    expected, found = logits(set_attention(copy.deepcopy(model), "full"), ids), []

    def evaluate(_: Tensor) -> None:
        with full_attention(model):
            found.append(logits(model, ids))

    model.lm_head.weight.register_hook(evaluate)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert torch.equal(found[0], expected)


def test_a_switch_within_a_pass_is_told_as_that():
    model = patch(build(), **SPARSE)
    model.model.layers[0].register_forward_hook(lambda *_: set_attention(model, "full") and None)
    with pytest.raises(ValueError, match="was switched within a pass, after its mask was built for MoBA"):
        logits(model, tokens())


@pytest.mark.parametrize("reentrant", [False, True])
def test_patching_between_forward_and_backward_under_checkpoints_is_an_error(reentrant):
    with pytest.raises(ValueError, match="LlamaAttention again, which was patched or switched to MoBA after its forward pass"):
        gradients_under_checkpoints(build(), reentrant, lambda model: patch(model, **SPARSE))
