"""`describe` says what each layer uses, and why, for any model, and changes nothing."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.families import SIZES, SPARSE, build, logits, snapshot, tokens
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from moba_flex import MobaSchedule, describe, trace
from moba_flex.analysis.tables import runs
from moba_flex.models import full_attention, patch, set_attention, unpatch


def used(model: torch.nn.Module) -> list[str]:
    return [layer.attention for layer in describe(model).layers]


def reasons(model: torch.nn.Module) -> list[str]:
    return [layer.reason for layer in describe(model).layers]


def test_a_model_that_is_not_patched_has_full_attention():
    model = build()
    before = snapshot(model)
    assert used(model) == ["full"] * 4 and set(reasons(model)) == {"not patched"}
    assert snapshot(model) == before
    assert set(reasons(unpatch(patch(model, **SPARSE)))) == {"not patched"}


def test_a_patched_model_has_its_settings_but_for_full_layers():
    model = patch(build(), **SPARSE, full_attention_layers=[-1], decode="sparse")
    before = snapshot(model)
    found = describe(model, length=100)
    assert [layer.attention for layer in found.layers] == ["moba"] * 3 + ["full"]
    assert [layer.reason for layer in found.layers] == ["configured"] * 3 + ["full_attention_layers"]
    assert [layer.index for layer in found.layers] == [0, 1, 2, 3]
    first, last = found.layers[0], found.layers[3]
    assert (first.block_size, first.top_k, first.decode, first.sparse) == (8, 2, "sparse", True)
    assert (last.block_size, last.top_k, last.decode, last.sparse, last.share_of_keys) == (None, None, None, False, 1.0)
    assert snapshot(model) == before


def test_switched_layers_say_so():
    model = patch(build(), **SPARSE, full_attention_layers=[0])
    set_attention(model, "full", layers=[1])
    set_attention(model, "moba_naive", layers=[2])
    assert used(model) == ["full", "full", "moba_naive", "moba"]
    assert reasons(model) == ["full_attention_layers", *["set_attention or MobaSchedule"] * 2, "configured"]
    with full_attention(model):
        assert used(model) == ["full"] * 4
    assert used(set_attention(model, "moba_naive")) == ["full"] + ["moba_naive"] * 3


def test_after_a_schedule_each_layer_is_full_though_the_settings_stay():
    model = patch(build(), **SPARSE)
    MobaSchedule(switch_at=0.5).apply(model, 9, 10)
    assert model.config.moba.block_size == 8
    assert used(model) == ["full"] * 4 and set(reasons(model)) == {"set_attention or MobaSchedule"}
    assert "none with MoBA" in str(describe(model))


@pytest.mark.parametrize("family", ["gemma3", "cohere2", "gpt_oss"])
def test_sliding_windows_are_named(family):
    model = build(family)
    assert used(patch(model, **SPARSE)) == ["sliding window", "moba"] * 2
    assert "0, 2    sliding window" in str(describe(model))


def test_an_encoder_and_a_decoder_have_lines_of_their_own():
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes))
    found = describe(patch(model, **SPARSE), length=100)
    assert [layer.attention for layer in found.layers] == ["bidirectional"] * 2 + ["moba", "cross"] * 3
    assert [layer.share_of_keys is None for layer in found.layers] == [True] * 2 + [False, True] * 3
    lines = str(found).splitlines()
    assert len(lines) == 5
    for line, stack in zip(lines[2:], ("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn")):
        assert stack in line


def test_models_that_cannot_use_moba_are_described_with_the_reason():
    found = describe(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)))
    assert found.layers == () and "MambaForCausalLM has no layer that MoBA can replace" in str(found)


def test_wrapped_models_are_described(tmp_path):
    model = get_peft_model(patch(build(), **SPARSE), LoraConfig(target_modules=["q_proj"]))
    assert used(model) == ["moba"] * 4
    assert describe(model).layers[0].name.startswith("base_model.model.model.layers.0")
    parallel = torch.nn.ModuleList([model])
    assert used(parallel) == ["moba"] * 4


def test_a_model_loaded_by_name_is_told_what_it_will_take(tmp_path):
    build().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = describe(model).layers[0]
        assert (layer.attention, layer.block_size) == ("moba", 4096)
        assert layer.reason == 'loaded with attn_implementation="moba", no saved settings'
        policy = patch(build(), **SPARSE)
        assert describe(model).layers[0].block_size == 8, "those of the process's patched model"
        other = patch(build(), block_size=16, top_k=2)
        assert "raises an error when it is called" in describe(model).layers[0].reason
    assert not hasattr(model.config, "moba")
    del policy, other
    patch(build(), **SPARSE).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert describe(model).layers[0].reason == 'loaded with attn_implementation="moba", saved settings'
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(reasons(model)) == {"not patched; settings of MoBA are in its configuration"}
    assert logits(model, tokens()).isfinite().all()


@pytest.mark.parametrize("block_size, top_k", [(8, 2), (8, 1), (16, 3), (7, 3), (64, 2)])
def test_the_share_of_keys_is_that_of_a_run(block_size, top_k):
    model = patch(build(), block_size=block_size, top_k=top_k)
    ids = tokens(1)
    for layer, traced in zip(describe(model, length=ids.shape[1]).layers, trace(model, ids).share_of_keys):
        torch.testing.assert_close(torch.full_like(traced, layer.share_of_keys), traced)
        assert layer.sparse == bool((traced < 1).any())


def test_a_length_at_which_settings_do_nothing_has_a_remedy():
    model = patch(build())
    assert describe(model, length=49_153).layers[0].sparse and describe(model, length=49_153).notes == ()
    found = describe(model, length=49_152)
    assert not any(layer.sparse for layer in found.layers) and found.layers[0].share_of_keys == 1.0
    assert "49,152 tokens has 12 blocks of block_size=4096, and top_k=12 reads them all" in str(found)
    assert "patch(model, block_size=128, top_k=8)" in str(found)
    assert "MoBA is for longer prompts" in str(describe(model, length=100))
    assert 0 < describe(model, length=10**9).layers[0].share_of_keys < 1e-3, "arithmetic, whatever the length"


def test_equal_layers_share_a_line():
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 32}))
    lines = str(describe(patch(model, **SPARSE, sink_blocks=1, full_attention_layers=[-3, -2, -1]), length=1000)).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["0-28", "29-31"]
    assert lines[4:] == ["other settings: sink_blocks=1"]
    assert repr(describe(model)) == str(describe(model))


def test_it_is_data_too():
    found = describe(patch(build(), **SPARSE), length=64)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["model"] == "LlamaForCausalLM" and read["length"] == 64
    assert read["layers"][2]["top_k"] == 2 and read["layers"][2]["index"] == 2
    with pytest.raises(AttributeError):
        found.layers[0].attention = "full"


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "8192", 10**5000], ids=lambda x: str(x)[:5] if x != 10**5000 else "digits")
def test_a_bad_length_is_refused(length):
    with pytest.raises(ValueError, match=r"length must be (an int of at least 1|below 2\*\*63), but is"):
        describe(build(), length=length)
    with pytest.raises(TypeError, match="model must be a transformers model, but is a str"):
        describe("model")


@pytest.mark.parametrize(
    "numbers, words",
    [
        ([], ""),
        ([3], "3"),
        ([2, 1], "1, 2"),
        (range(29), "0-28"),
        ([0, 1, 2, 5, 7, 8], "0-2, 5, 7, 8"),
        (range(0, 40, 2), "0, 2, ..., 38"),
    ],
)
def test_numbers_of_layers_are_short(numbers, words):
    assert runs(numbers) == words
