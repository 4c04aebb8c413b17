"""key_conv: keys are convolved before MoBA sees them, within their own sequences; the weights belong to the model."""

from __future__ import annotations

import copy
import pickle

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from support.families import SIZES, VOCABULARY, hrm_works
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel, StaticCache

import moba_flex
from moba_flex import MobaConfig, patch, set_attention, unpatch
from moba_flex.distributed import context_parallel
from moba_flex.models.key_conv import KeyConv
from moba_flex.models.masks import moba_mask

SPARSE = {"block_size": 4, "top_k": 3, "full_attention_layers": (-1,)}
CONVOLVED = (0, 1, 2)  # of the four layers


def model_with(key_conv: int = 3, layers: int = 4, **settings) -> PreTrainedModel:
    """A random Llama whose convolutions are far from the identity."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers})
    model = patch(LlamaForCausalLM(config).eval(), **{**SPARSE, **settings}, key_conv=key_conv)
    for name, weight in model.named_parameters():
        if "key_conv" in name:
            torch.nn.init.normal_(weight)
    return model


def tokens(rows: int = 2, length: int = 29) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def by_hand(key: Tensor, weight: Tensor) -> Tensor:
    """The definition, token by token: `key [B, N, C]`, `weight [K, C]`."""
    out = key.clone()
    for t in range(key.shape[1]):
        out[:, t] += F.silu(sum(weight[lag] * key[:, t - lag] for lag in range(min(len(weight), t + 1))))
    return out


def keys_of(model: PreTrainedModel, layer: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into a layer's convolution and what its k_proj then returns."""
    inputs, outputs = [], []
    attention = model.model.layers[layer].self_attn
    attention.key_conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    attention.key_conv.register_forward_hook(lambda _, args, out: outputs.append(out.detach()))
    return inputs, outputs


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_keys_are_convolved_as_defined(kernel_size):
    model = model_with(kernel_size)
    inputs, outputs = keys_of(model)
    model(tokens(), use_cache=False)
    weight = model.model.layers[0].self_attn.key_conv.weight
    assert weight.shape == (kernel_size, 16)
    torch.testing.assert_close(outputs[0], by_hand(inputs[0], weight.detach()))


def test_gate_and_attention_both_see_the_convolved_keys():
    """The model is one whose k_proj returns them, with the specification and the fast implementation."""
    model, other = model_with(), model_with(0)
    for layer in CONVOLVED:
        weight = model.model.layers[layer].self_attn.key_conv.weight
        other.model.layers[layer].self_attn.k_proj.register_forward_hook(lambda _, args, key, weight=weight: by_hand(key, weight))
    expected = set_attention(other, "moba_naive")(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(set_attention(model, "moba_naive")(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_full_attention_for_a_while_reads_the_convolved_keys_too():
    model = model_with(top_k=99, implementation="eager")  # MoBA that reads every block
    expected = model(tokens()).logits
    with moba_flex.full_attention(model):
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_new_convolution_changes_nothing_and_learns():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    expected = patch(model, **SPARSE)(tokens()).logits
    assert torch.equal(patch(model, **SPARSE, key_conv=3)(tokens()).logits, expected)
    model(tokens(), labels=tokens()).loss.backward()
    for layer in CONVOLVED:
        assert (model.model.layers[layer].self_attn.key_conv.weight.grad != 0).all(), layer


def test_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    conv = KeyConv(3, torch.nn.Linear(4, 6)).double()
    torch.nn.init.normal_(conv.weight)
    key = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 6, dtype=torch.float64)
    got = torch.autograd.grad(conv(key), (key, conv.weight), grad)
    for x, y in zip(got, torch.autograd.grad(by_hand(key, conv.weight), (key, conv.weight), grad)):
        torch.testing.assert_close(x, y)


def test_layers_with_full_attention_have_no_convolution_and_0_has_none_at_all():
    model = model_with()
    assert [layer for layer in range(4) if hasattr(model.model.layers[layer].self_attn, "key_conv")] == list(CONVOLVED)
    assert not any("key_conv" in name for name in model_with(0).state_dict())


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_a_padded_row_gives_what_it_gives_alone(in_a_graph):
    """On either side, in the same graph."""
    model, text = model_with(layers=2), tokens()
    torch.compiler.reset()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    for side, real in (("left", slice(6, 29)), ("right", slice(0, 23))):
        mask = torch.zeros_like(text)
        mask[0], mask[1, real] = 1, 1
        got = graph(text, attention_mask=mask, use_cache=False) if in_a_graph else model(text, attention_mask=mask)
        expected = model(text[1:, real]).logits[0]
        torch.testing.assert_close(got.logits[1, real], expected, atol=1e-4, rtol=1e-4, msg=lambda text, side=side: f"{side}: {text}")
    torch.compiler.reset()


@pytest.mark.parametrize("named", ["position_ids", "cu_seqlens"])
def test_the_convolution_does_not_cross_the_borders_of_packed_sequences(named):
    model, text = model_with(), tokens(1)
    position_ids = torch.cat([torch.arange(n) for n in (11, 2, 16)])[None]
    packed = {"position_ids": position_ids, "use_cache": False}
    if named == "cu_seqlens":
        cu_seqlens = torch.tensor([0, 11, 13, 29], dtype=torch.int32)
        packed |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 16, "max_length_k": 16}
    got = model(text, **packed).logits
    expected = torch.cat([model(part).logits for part in text.split([11, 2, 16], 1)], 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_growing_cache_is_generation_without(decode, padded):
    """With so many blocks that decoding reads what prefill reads."""
    model, text = model_with(decode=decode, top_k=99, implementation="eager"), tokens()
    mask = torch.ones_like(text)
    if padded:
        text[1, :7], mask[1, :7] = 0, 0
    same = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(text, **same, use_cache=False)
    assert torch.equal(model.generate(text, **same), expected)


def test_a_prompt_may_come_in_pieces_of_any_length():
    model, text, cache = model_with(top_k=99, implementation="eager"), tokens(), DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in text.split([9, 1, 1, 2, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(text).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def after_prefill(change) -> None:
    model, text, cache = model_with(), tokens(), DynamicCache()
    model(text, past_key_values=cache)
    cache = change(cache) or cache
    model(text[:, :1], past_key_values=cache)


@pytest.mark.parametrize("change", [lambda c: c.crop(-9), lambda c: c.reorder_cache(torch.tensor([1, 0]))], ids=["crop", "reorder"])
def test_a_cache_that_somebody_changed_is_refused(change):
    with pytest.raises(ValueError, match=r"key_conv needs the keys before the new ones, .* use_cache=False"):
        after_prefill(change)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"])
def test_a_copied_cache_goes_on_alone(copied):
    model, text, cache = model_with(), tokens(), DynamicCache()
    model(text[:, :20], past_key_values=cache)
    other = copied(cache)
    expected = [model(part, past_key_values=cache).logits for part in text[:, 20:].split(3, 1)]
    for part, logits in zip(text[:, 20:].split(3, 1), expected):
        assert torch.equal(model(part, past_key_values=other).logits, logits)


def test_gradients_go_through_a_cache():
    model, text, cache = model_with().double().train(), tokens(), DynamicCache()
    parts = torch.cat([model(part, past_key_values=cache).logits for part in text.split([9, 20], 1)], 1)
    whole = model(text, use_cache=False).logits
    torch.testing.assert_close(parts, whole)
    weights = [x for name, x in model.named_parameters() if "k_proj" in name or "key_conv" in name]
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), weights) for x in (parts, whole)))


def test_a_compiled_model_with_a_cache_gives_the_tokens_of_the_eager_one():
    model, text = model_with(layers=2), tokens()
    expected = model.generate(text, max_new_tokens=3, do_sample=False)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(model.generate(text, max_new_tokens=3, do_sample=False), expected)
    torch.compiler.reset()


def test_a_static_cache_is_refused():
    model, text = model_with(), tokens()
    cache = StaticCache(model.config, max_cache_len=64)
    model(text, past_key_values=cache)
    with pytest.raises(ValueError, match=r"StaticLayer.*DynamicCache\(\)"):
        model(text[:, :1], past_key_values=cache)


@pytest.mark.parametrize("attn", ["moba", "full"])
def test_weights_are_saved_and_loaded(attn, tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    loaded = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path, attn=attn)
    assert type(loaded) is LlamaForCausalLM and loaded.config.moba.key_conv == 3
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(tokens()).logits, set_attention(model, attn)(tokens()).logits)


def test_loading_by_transformers_alone_is_refused_before_keys_go_wrong(tmp_path):
    model_with().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    with pytest.raises(ValueError, match=r"saved with key_conv=3, .*moba_flex\.AutoModelForCausalLM"):
        loaded(tokens())
    with pytest.raises(ValueError, match="saved with key_conv=3"):
        patch(loaded)


def test_a_new_model_of_a_configuration_with_key_conv_has_it():
    config = LlamaConfig(**SIZES, moba=MobaConfig(**SPARSE, key_conv=5))
    assert moba_flex.AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.key_conv.weight.shape == (5, 16)


def test_unpatching_removes_it():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    expected, names = model(tokens()).logits, model.state_dict().keys()
    patch(model, **SPARSE, key_conv=3)
    torch.nn.init.normal_(model.model.layers[0].self_attn.key_conv.weight)
    unpatch(model)
    assert model.state_dict().keys() == names and torch.equal(model(tokens()).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_patching_again_keeps_weights_of_the_same_size_alone():
    model = model_with()
    weights = [model.model.layers[layer].self_attn.key_conv.weight for layer in CONVOLVED]
    patch(model, block_size=8, top_k=2, key_conv=3, full_attention_layers=(0,))
    assert not hasattr(model.model.layers[0].self_attn, "key_conv")
    assert model.model.layers[1].self_attn.key_conv.weight is weights[1]
    patch(model, block_size=8, top_k=2, key_conv=5)
    assert all((layer.self_attn.key_conv.weight == 0).all() for layer in model.model.layers)
    patch(model, block_size=8, top_k=2)
    assert not any("key_conv" in name for name in model.state_dict())


def test_a_copy_of_a_model_has_convolutions_of_its_own():
    model = model_with()
    other = copy.deepcopy(model)
    expected = model(tokens()).logits
    torch.nn.init.zeros_(other.model.layers[0].self_attn.key_conv.weight)
    assert torch.equal(model(tokens()).logits, expected) and not torch.equal(other(tokens()).logits, expected)
    assert not any("key_conv" in name for name in unpatch(other).state_dict())


def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one():
    model = model_with(layers=2).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False, "attention_mask": moba_mask(2, 29, 29)}
    expected = model(**inputs).loss
    wanted = torch.autograd.grad(expected, [model.model.layers[0].self_attn.key_conv.weight])
    torch.compiler.reset()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [model.model.layers[0].self_attn.key_conv.weight]), wanted)
    torch.compiler.reset()


@pytest.mark.parametrize("key_conv", [1, 4, -3, True, "3", 3.0, np.int64(3)])
def test_other_kernel_sizes_are_refused(key_conv):
    with pytest.raises(ValueError, match="key_conv must be one of 0, 3, 5"):
        MobaConfig(key_conv=key_conv)


def test_a_model_without_k_proj_is_refused_and_left_as_it_was():
    model = Phi3ForCausalLM(Phi3Config(**SIZES))
    with pytest.raises(ValueError, match=r"linear k_proj .* Phi3Attention"):
        patch(model, **SPARSE, key_conv=3)
    assert not hasattr(model.config, "moba") and model.config._attn_implementation == "sdpa"


def test_the_keys_of_a_k_proj_that_came_later_are_convolved():
    """Quantizers replace it, and LoRA puts itself around it."""
    model = model_with()
    expected = model(tokens()).logits
    layer = model.model.layers[0].self_attn
    layer.k_proj, before = torch.nn.Linear(32, 16, bias=False), layer.k_proj
    layer.k_proj.load_state_dict(before.state_dict())
    assert torch.equal(model(tokens()).logits, expected) and not before._forward_hooks
    lora = get_peft_model(model, LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    inputs, outputs = keys_of(model)
    wanted = []
    layer.k_proj.base_layer.register_forward_hook(lambda _, args, out: wanted.append(out.detach()))
    lora(tokens())
    assert not torch.equal(inputs[0], wanted[0]), "LoRA's part is convolved too"
    torch.testing.assert_close(outputs[0], by_hand(inputs[0], layer.key_conv.weight.detach()))
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, lora(tokens()).logits)


def test_a_k_proj_with_lora_is_named():
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"which LlamaAttention has as a Linear \(patch before adding LoRA\)"):
        patch(model.model.model, **SPARSE, key_conv=3)
    with pytest.raises(ValueError, match=r'before PeftModel: patch first, and name them in modules_to_save=\["key_conv"\]'):
        patch(get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"])), **SPARSE, key_conv=3)


def test_peft_trains_convolutions_that_it_has_copied():
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["key_conv"], task_type="CAUSAL_LM")
    base = model_with()
    expected = base(tokens()).logits
    model = get_peft_model(base, lora)
    assert torch.equal(model(tokens()).logits, expected)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [x for name, x in model.named_parameters() if "key_conv" in name and x.requires_grad]
    assert len(trained) == len(CONVOLVED) and all((x.grad != 0).all() for x in trained)
    for x in trained:
        torch.nn.init.zeros_(x)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected)
    assert not torch.equal(model(tokens()).logits, expected)


def test_an_adapter_is_loaded_with_the_convolutions_of_its_model(tmp_path):
    model_with().save_pretrained(tmp_path / "model")
    base = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = model(tokens()).logits
    loaded = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is LlamaForCausalLM and torch.equal(loaded(tokens()).logits, expected)


def test_attention_that_does_not_say_where_sequences_begin_is_refused():
    model = model_with()
    expected = model(tokens()).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'"sdpa" attention does not say: use moba_flex\.set_attention\(model, "full"\)'):
        model(tokens())
    model.set_attn_implementation("moba")
    assert torch.equal(model(tokens()).logits, expected)


def test_a_hybrid_model_continues_its_keys():
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    torch.manual_seed(0)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**{**SIZES, **sizes})).eval()
    patch(model, **SPARSE, key_conv=3)
    for layer in model.model.layers[:-1]:
        torch.nn.init.normal_(layer.self_attn.key_conv.weight)
    ids = tokens()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        logits = model(ids[:, 20:], past_key_values=cache).logits
        set_attention(model, "full")  # tokens behind a cache read all keys
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        assert torch.allclose(model(ids[:, 20:], past_key_values=cache).logits, whole[:, 20:], atol=1e-4)
        assert logits.isfinite().all()


@hrm_works
def test_a_model_that_runs_its_layers_several_times_wants_no_cache():
    torch.manual_seed(0)
    model = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**SIZES)).eval()
    patch(model, **SPARSE, key_conv=3)
    model(tokens(), use_cache=False)
    with pytest.raises(ValueError, match="not in that layer of the cache: call the model with use_cache=False"):
        model(tokens(), use_cache=True)


def test_offloaded_layers_get_no_new_weights():
    model = accelerate.cpu_offload(LlamaForCausalLM(LlamaConfig(**SIZES)), execution_device="cpu")
    with pytest.raises(ValueError, match="must be there before weights are offloaded"):
        patch(model, **SPARSE, key_conv=3)


def test_slices_of_a_sequence_are_refused():
    with pytest.raises(ValueError, match=r"has key_conv, .* key_conv=0"):
        context_parallel(model_with(), mesh=None)
