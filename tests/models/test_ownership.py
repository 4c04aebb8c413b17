"""What patching changes is the model's own: its configuration, its layers' states, its convolutions of keys."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support.families import ALL_BLOCKS, FAMILIES, HEADLESS_SIZES, SPARSE, attentions, build, logits, snapshot, tokens
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import moba_flex
from moba_flex import full_attention, patch, set_attention, trace, unpatch
from moba_flex.models.layers import attention_of
from moba_flex.models.patch import moba_layers
from moba_flex.models.state import state_of


def with_convolutions(**settings) -> PreTrainedModel:
    model = patch(build(), **SPARSE, key_conv=3, **settings)
    for layer in attentions(model):
        if hasattr(layer, "key_conv"):
            torch.nn.init.normal_(layer.key_conv.weight)
    return model


# Configurations


def test_a_model_of_the_same_configuration_stays_what_it_is():
    config, ids = FAMILIES["llama"](), tokens()
    teacher, student = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    state, before = snapshot(teacher), logits(teacher, ids)
    patch(student, **SPARSE)
    assert snapshot(teacher) == state and torch.equal(logits(teacher, ids), before) and not hasattr(config, "moba")
    assert student.config is student.model.config is attentions(student)[0].config is not teacher.config
    patch(teacher, block_size=16, top_k=2)
    assert student.config.moba.block_size == SPARSE["block_size"]
    unpatch(student)
    assert teacher.config.moba.block_size == 16 and teacher.config._attn_implementation == "moba"


@pytest.mark.parametrize("change", [unpatch, lambda model: set_attention(model, "moba_naive"), lambda model: set_attention(model, "full")])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_of_a_patched_one_s_configuration_is_changed_alone(change, first):
    """Built from a configuration that says "moba", it uses MoBA without having been patched."""
    model, ids = patch(build(), **SPARSE), tokens()
    other = LlamaForCausalLM(model.config).eval()
    state, before = snapshot(model), logits(model, ids)
    for _ in range(1 if first else 2):
        change(other)
    assert snapshot(model) == state and torch.equal(logits(model, ids), before)
    assert set(moba_layers(model).values()) == {"moba"}
    patch(other, block_size=16, top_k=2)
    unpatch(other)
    assert snapshot(model) == state and not hasattr(other.config, "moba")


def test_patching_again_keeps_the_configuration():
    model = patch(build(), **SPARSE)
    config = model.config
    assert patch(model, block_size=16, top_k=2).config is config and set_attention(model, "moba_naive").config is config


def test_parts_of_one_configuration_stay_together():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=FAMILIES["llama"](), image_token_index=1)
    one, other = LlavaForConditionalGeneration(config), LlavaForConditionalGeneration(config)
    patch(one, **SPARSE)
    assert one.config.text_config is one.model.language_model.config is not config.text_config
    assert one.config is one.model.config is not config and one.config.vision_config is config.vision_config
    assert one.config.to_dict()["text_config"]["moba"]["block_size"] == SPARSE["block_size"]
    assert other.config is config and not hasattr(config.text_config, "moba") and config.text_config._attn_implementation == "sdpa"


def test_new_models_of_one_configuration_have_each_their_attention():
    config = FAMILIES["llama"]()
    full, sparse = (moba_flex.AutoModelForCausalLM.from_config(config, attn=attn) for attn in ("full", "moba"))
    assert (full.config._attn_implementation, sparse.config._attn_implementation) == ("sdpa", "moba")


def test_a_trace_leaves_the_configuration_that_was_there():
    model = build()
    config = model.config
    trace(model, tokens(), block_size=4, top_k=2)
    assert model.config is config and attentions(model)[0].config is config and not hasattr(config, "moba")


# What is done within `full_attention`


def test_what_is_patched_within_full_attention_stays_patched():
    model = build(attention="eager")
    with full_attention(model):
        patch(model, **SPARSE)
    assert torch.equal(logits(model, tokens()), logits(patch(build(), **SPARSE), tokens()))
    assert unpatch(model).config._attn_implementation == "eager"


def test_what_is_patched_again_or_unpatched_within_full_attention_stays_so():
    model = patch(build(), **SPARSE, full_attention_layers=[0])
    with full_attention(model):
        patch(model, block_size=8, top_k=2)
    assert {attention_of(layer, model.config.moba) for layer in attentions(model)} == {"moba"}
    with full_attention(model):
        unpatch(model)
    assert not any(state_of(layer) for layer in attentions(model))


# Convolutions of keys


@pytest.mark.parametrize("changes", [{}, {"key_conv": 5}, {"key_conv": 3, "full_attention_layers": [0]}], ids=str)
def test_a_trace_leaves_the_convolutions_that_were_there(changes):
    model, ids = with_convolutions(), tokens()
    weights, before = {name: x.clone() for name, x in model.state_dict().items()}, logits(model, ids)
    trace(model, ids, block_size=4, top_k=2, **changes)
    assert list(model.state_dict()) == list(weights) and all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.equal(logits(model, ids), before)


def test_a_trace_with_convolutions_leaves_none():
    model, ids = build(), tokens()
    state, before = snapshot(model), logits(model, ids)
    trace(model, ids, block_size=4, top_k=2, key_conv=3)
    assert snapshot(model) == state and torch.equal(logits(model, ids), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_can_be_copied_after_an_error_within_a_layer():
    model = with_convolutions()
    first = attentions(model)[0]
    hook = first.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(), use_cache=True)
    hook.remove()
    assert torch.equal(logits(copy.deepcopy(model), tokens()), logits(model, tokens()))


# Loading


@pytest.mark.parametrize("attn", ["moba", "full"])
def test_a_model_of_several_parts_is_loaded_with_its_convolutions(attn, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=FAMILIES["gemma3"]().to_dict(),
        vision_config={**vision, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    torch.manual_seed(0)
    model = patch(transformers.Gemma3ForConditionalGeneration(config).eval(), **SPARSE, key_conv=3)
    for name, weight in model.named_parameters():
        if "key_conv" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    loaded = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path, attn=attn)
    ids = tokens() % 50 + 2
    assert loaded.state_dict().keys() == model.state_dict().keys() and any("key_conv" in name for name in loaded.state_dict())
    assert torch.equal(logits(loaded, ids), logits(set_attention(model, attn), ids))


@pytest.mark.parametrize("key_conv", [0, 3])
def test_what_loading_says_comes_with_the_model(key_conv, tmp_path):
    model = with_convolutions() if key_conv else build()
    model.save_pretrained(tmp_path)
    loaded, said = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and loaded.config._attn_implementation == "moba"
    assert hasattr(attentions(loaded)[0], "key_conv") == bool(key_conv)


def test_an_adapter_is_loaded_with_its_model(tmp_path):
    peft = pytest.importorskip("peft")
    build().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = patch(moba_flex.AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapter")), **SPARSE)
    torch.testing.assert_close(logits(loaded, tokens()), logits(patch(adapted, **SPARSE), tokens()))


def test_a_folder_that_is_not_there_is_refused_as_by_transformers(tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        moba_flex.AutoModelForCausalLM.from_pretrained(str(tmp_path / "nothing-here"))


def test_settings_that_are_no_dict_are_refused():
    with pytest.raises(ValueError, match=r"settings of MoBA must be a dict .* as in config\.json, but are 3"):
        patch(build(moba=3))


# Which layers there are


@pytest.mark.parametrize("last", [3, -1])
def test_an_encoder_decoder_model_counts_the_layers_of_its_decoder(last):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=4, max_position_embeddings=256, **heads)
    model = patch(BartForConditionalGeneration(config).eval(), **SPARSE, full_attention_layers=[last])
    layers = [attention_of(layer.self_attn, model.config.moba) for layer in model.model.decoder.layers]
    assert layers == ["moba", "moba", "moba", "full"]
    with pytest.raises(ValueError, match=r"full_attention_layers has 4, but .* has the layers 0 to 3"):
        patch(model, **SPARSE, full_attention_layers=[4])
    assert trace(model, tokens(), block_size=4, top_k=2, selections=[3]).selections.keys() == {3}


def test_layers_that_read_an_image_keep_their_attention():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**shape, "vocab_size": 64, "cross_attention_layers": [1, 3], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    image |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "max_num_tiles": 1, "intermediate_layers_indices": [0]}
    config = MllamaConfig(vision_config={**image, "supported_aspect_ratios": [[1, 1]]}, text_config=text, image_token_index=60)
    torch.manual_seed(0)
    model, ids = MllamaForConditionalGeneration(config).eval(), tokens() % 50 + 2
    for name, parameter in model.named_parameters():
        if "gate" in name:
            torch.nn.init.ones_(parameter)  # or the image changes nothing
    ones = torch.ones(2, 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 1, 1, 3, 28, 28)}
    inputs |= {
        "aspect_ratio_ids": ones,
        "aspect_ratio_mask": ones[..., None],
        "cross_attention_mask": ones.expand(*ids.shape)[..., None, None],
    }
    before = logits(model, inputs)
    patch(model, **ALL_BLOCKS)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(logits(patch(model, **SPARSE), inputs), before, atol=1e-2)


def test_a_bias_for_each_query_and_key_is_refused_by_the_name_of_the_model():
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="UMT5ForConditionalGeneration has no layer that MoBA can replace"):
        patch(UMT5ForConditionalGeneration(config), **SPARSE)


def test_layers_without_a_window_are_found_though_all_name_the_model_s():
    config = transformers.Exaone4Config(**HEADLESS_SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), tokens()
    expected = logits(model, ids)
    patch(model, **ALL_BLOCKS)
    assert moba_layers(model) == {1: "moba", 3: "moba"}
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(logits(patch(model, **SPARSE), ids), expected, atol=1e-2)


def test_a_window_that_is_in_the_way_is_named():
    with pytest.raises(ValueError, match="a sliding_window of 4096: if no text gets that long, load the model with sliding_window=None"):
        patch(build(sliding_window=4096), **SPARSE)
