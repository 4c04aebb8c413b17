"""Copies, pickles and files of patched models keep their settings."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from support.families import FAMILIES, SPARSE, assert_close, build, each_of_four, logits, tokens

from moba_flex.config import MobaConfig
from moba_flex.models import AutoModelForCausalLM, patch, set_attention, unpatch


def test_copies_and_pickles_keep_the_settings():
    model, ids = patch(build(), **SPARSE), tokens()
    set_attention(model, "full", layers=[1])
    expected = logits(model, ids)
    for name, same in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert isinstance(same.config.moba, MobaConfig), name
        assert torch.equal(logits(same, ids), expected), name
        assert torch.equal(logits(unpatch(same), ids), logits(unpatch(copy.deepcopy(model)), ids)), name
    assert torch.equal(logits(model, ids), expected), "the original is still patched"


@each_of_four
def test_saving_and_loading_keep_the_settings(family, tmp_path):
    settings = MobaConfig(**SPARSE, full_attention_layers=(-1,), decode="sparse")
    model, ids = build(family, attention=None), tokens()
    full, sparse = logits(model, ids), logits(patch(model, settings), ids)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["moba"] == settings.to_dict()

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert torch.equal(logits(loaded, ids), sparse)
    assert loaded.config.moba == settings and isinstance(loaded.config.moba, MobaConfig)
    assert torch.equal(logits(set_attention(loaded, "full"), ids), full), "full attention, never patched"
    assert torch.equal(logits(unpatch(loaded), ids), full)
    assert not hasattr(loaded.config, "moba")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.moba == settings and isinstance(loaded.config.moba, MobaConfig)
    assert torch.equal(logits(loaded, ids), sparse)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn="full")
    assert torch.equal(logits(loaded, ids), full)
    assert torch.equal(logits(set_attention(loaded, "moba"), ids), sparse)
    assert torch.equal(logits(patch(unpatch(loaded), settings), ids), sparse)


@each_of_four
def test_attn_implementation_moba_has_the_default_settings(family, tmp_path):
    model, ids = build(family, attention=None), tokens()
    default = model.config._attn_implementation
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert torch.equal(logits(loaded, ids), logits(patch(model), ids)), family
    assert not hasattr(loaded.config, "moba")
    patch(loaded, **SPARSE)
    sparse = logits(loaded, ids)
    assert torch.equal(sparse, logits(patch(model, **SPARSE), ids))
    loaded.set_attn_implementation("moba_naive")
    assert_close(logits(loaded, ids), sparse, f"{family}, moba_naive")
    assert unpatch(loaded).config._attn_implementation == unpatch(model).config._attn_implementation == default


@pytest.mark.parametrize("attn", ["moba", "moba_naive", "full"])
def test_the_short_form_takes_what_transformers_takes(attn, tmp_path):
    build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn=attn, attn_implementation="eager", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == ("eager" if attn == "full" else attn)
    assert unpatch(model).config._attn_implementation == "eager"
    assert AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn=attn).config.model_type == "llama"
    with pytest.raises(ValueError, match="attn must be one of moba, moba_naive, full, but is 'sparse'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn="sparse")


def test_loading_takes_the_settings_of_patch(tmp_path):
    model = patch(build(), block_size=16, top_k=3)
    model.save_pretrained(tmp_path)
    given = {**SPARSE, "sink_blocks": 1, "full_attention_layers": [-1], "decode": "sparse"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn="moba", **given)
    assert loaded.config.moba == MobaConfig(**given)
    assert torch.equal(logits(loaded, tokens()), logits(patch(model, **given), tokens()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, top_k=2).config.moba == MobaConfig(top_k=2), "those not given are the defaults"
    assert AutoModelForCausalLM.from_pretrained(tmp_path, attn="moba_naive", **SPARSE).config._attn_implementation == "moba_naive"
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **MobaConfig(**SPARSE)).config.moba == MobaConfig(**SPARSE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config, **SPARSE).config.moba == MobaConfig(**SPARSE)
    assert AutoModelForCausalLM.from_config(FAMILIES["llama"](), **SPARSE).config.moba == MobaConfig(**SPARSE)


def test_convolutions_that_are_asked_for_at_loading_are_new_and_change_nothing(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **SPARSE, key_conv=3)
    assert loaded.config.moba.key_conv == 3 and type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens()), logits(patch(model, **SPARSE), tokens()))
    assert AutoModelForCausalLM.from_config(FAMILIES["llama"](), **SPARSE, key_conv=3).config.moba.key_conv == 3


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"block_size": 0}, ValueError, "block_size must be an int of at least 1, but is 0"),
        ({"decode": "dense"}, ValueError, "decode must be one of full, sparse, but is 'dense'"),
        ({"full_attention_layers": [4]}, ValueError, "full_attention_layers has 4, but LlamaForCausalLM has the layers 0 to 3"),
        ({"attn": "full", "top_k": 2, "block_size": 8}, ValueError, r'attn="full" loads without MoBA, .* \(block_size, top_k\): use attn='),
        ({"config": MobaConfig(**SPARSE)}, TypeError, r"config must be the model's configuration, .* by name, \*\*config"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_is_loaded(given, error, message, tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **given)


def test_a_mistyped_setting_is_named_with_those_that_there_are(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    message = "^'topk' is neither an argument that transformers takes for this model nor a setting of MoBA: those are block_size, top_k, "
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, topk=3),
        lambda: AutoModelForCausalLM.from_config(model.config, topk=3),
    ):
        with pytest.raises(TypeError, match=message):
            load()


def test_a_configuration_may_be_given_as_a_place(tmp_path):
    model = patch(build(), **SPARSE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=str(tmp_path))
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_settings_are_read_where_nothing_may_be_called(tmp_path):
    config = patch(build(), **SPARSE).config
    torch.save({"config": config.to_dict()}, tmp_path / "checkpoint.pt")
    settings = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["config"]["moba"]
    assert isinstance(settings, MobaConfig) and settings == config.moba
