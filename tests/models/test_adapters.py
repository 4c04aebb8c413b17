"""Adapters of PEFT are saved with the settings of the model that they were trained with, and load with them, or what is missing is said."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from support.families import SPARSE, build, logits, snapshot, tokens
from transformers import Trainer, TrainingArguments

from moba_flex import AutoModelForCausalLM, MobaConfig, trace
from moba_flex.models import patch, set_attention, unpatch

SETTINGS = MobaConfig(**SPARSE, full_attention_layers=(-1,))


def lora(**more) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more)


@pytest.fixture
def base(tmp_path) -> transformers.PreTrainedModel:
    """A model that was loaded from a folder, as an adapter's is found by that."""
    build().save_pretrained(tmp_path / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def beside(folder) -> dict | None:
    file = folder / "moba.json"
    return json.loads(file.read_text()) if file.is_file() else None


@pytest.mark.parametrize("order", ["patched first", "wrapped first", "copied", "pickled"])
def test_an_adapter_loads_with_its_settings(base, tmp_path, order):
    if order == "wrapped first":
        model = patch(peft.get_peft_model(base, lora()), SETTINGS)
    else:
        model = peft.get_peft_model(patch(base, SETTINGS), lora())
    if order in ("copied", "pickled"):
        model.state_dict()  # so that the adapter's configuration has been prepared
        model = copy.deepcopy(model) if order == "copied" else pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path / "adapter")
    assert beside(tmp_path / "adapter") == SETTINGS.to_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*settings of MoBA")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.moba == SETTINGS
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()))


def test_settings_that_are_given_replace_those_of_the_adapter(base, tmp_path):
    peft.get_peft_model(patch(base, SETTINGS), lora()).save_pretrained(tmp_path / "adapter")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", block_size=16, top_k=3).config.moba == MobaConfig(16, 3)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn="full")
    assert not hasattr(full.config, "moba") and full.config._attn_implementation == "sdpa"


def test_the_settings_are_those_at_the_time_of_saving(base, tmp_path):
    model = peft.get_peft_model(patch(base, **SPARSE), lora())
    model.save_pretrained(tmp_path / "first")
    patch(model, SETTINGS)
    set_attention(model, "full")
    model.save_pretrained(tmp_path / "second")
    assert beside(tmp_path / "first")["full_attention_layers"] == []
    assert beside(tmp_path / "second") == SETTINGS.to_dict()
    unpatch(model).save_pretrained(tmp_path / "third")
    assert beside(tmp_path / "third") is None


def test_each_of_several_adapters_has_them(base, tmp_path):
    model = peft.get_peft_model(patch(base, SETTINGS), lora())
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    assert beside(tmp_path) == beside(tmp_path / "other") == SETTINGS.to_dict()


def test_trainer_saves_them(base, tmp_path):
    model = peft.get_peft_model(patch(base, SETTINGS), lora())
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert beside(tmp_path / "run" / "checkpoint-1") == beside(tmp_path / "adapter") == SETTINGS.to_dict()


def test_peft_loads_such_a_folder_without_a_word(base, tmp_path):
    peft.get_peft_model(patch(base, SETTINGS), lora()).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Uu]nexpected")
        config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert not [name for name in config.to_dict() if "moba" in name]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="this version loads no copies that PEFT makes of modules")
def test_convolutions_that_an_adapter_has_copied_are_loaded(base, tmp_path):
    model = peft.get_peft_model(patch(base, **SPARSE, key_conv=3), lora(modules_to_save=["key_conv"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "key_conv" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.moba.key_conv == 3
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()))
    wrapped = [module for module in loaded.modules() if hasattr(module, "modules_to_save")]
    assert wrapped and not any(module.original_module.weight.any() for module in wrapped), "those of the model itself begin with zeros"


def test_an_adapter_without_settings_says_what_is_missing(base, tmp_path):
    peft.get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    with pytest.warns(
        UserWarning, match=r"adapter .* has no moba.json with the settings .* give them, from_pretrained\(\.\.\., block_size"
    ):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").config.moba == MobaConfig()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*settings of MoBA")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **SPARSE).config.moba == MobaConfig(**SPARSE)
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn="full")
        patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SETTINGS).save_pretrained(tmp_path / "base")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").config.moba == SETTINGS, "the model's own"


def test_settings_that_cannot_be_used_name_their_file(base, tmp_path):
    peft.get_peft_model(patch(base, SETTINGS), lora()).save_pretrained(tmp_path / "adapter")
    for text, what in (('{"top_k": 0}', "top_k must be an int of at least 1, but is 0"), ("[]", "must be a dict"), ("{", "Expecting")):
        (tmp_path / "adapter" / "moba.json").write_text(text)
        with pytest.raises(ValueError, match=f"moba.json.* cannot be used: .*{what}"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_prompt_is_saved_with_them_if_its_wrapper_is_patched(base, tmp_path):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    patch(peft.get_peft_model(base, prompt), SETTINGS).save_pretrained(tmp_path)
    assert beside(tmp_path) == SETTINGS.to_dict()


def test_a_configuration_that_another_model_has_too_saves_the_settings_of_the_model_that_is_saved(base, tmp_path):
    config, other = lora(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    first, second = peft.get_peft_model(patch(base, SETTINGS), config), peft.get_peft_model(other, config)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "never patched")
    patch(second, **SPARSE)
    for name, model in {"first again": first, "second": second}.items():
        model.save_pretrained(tmp_path / name)
    unpatch(first)
    first.save_pretrained(tmp_path / "unpatched")
    peft.get_peft_model(unpatch(second).merge_and_unload(), config).save_pretrained(tmp_path / "merged")
    found = {name: beside(tmp_path / name) for name in ("first", "never patched", "first again", "second", "unpatched", "merged")}
    assert found["first"] == found["first again"] == SETTINGS.to_dict()
    assert found["second"] == MobaConfig(**SPARSE).to_dict()
    assert found["never patched"] is found["unpatched"] is found["merged"] is None


def test_weights_that_were_taken_before_are_saved_with_the_settings(base, tmp_path):
    model = peft.get_peft_model(patch(base, SETTINGS), lora())
    weights = model.state_dict()
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name, state_dict=weights)
        assert beside(tmp_path / name) == SETTINGS.to_dict()


def save_by_hand(config: peft.LoraConfig, folder) -> None:
    config.save_pretrained(folder)


def test_a_configuration_that_a_program_saves_is_that_of_the_model_whose_weights_it_took_last(base, tmp_path):
    config = lora()
    model = peft.get_peft_model(patch(base, SETTINGS), config)
    model.state_dict()
    save_by_hand(config, tmp_path / "patched")
    unpatch(model)
    save_by_hand(config, tmp_path / "unpatched")
    assert beside(tmp_path / "patched") == SETTINGS.to_dict() and beside(tmp_path / "unpatched") is None


def test_nothing_is_left_behind(base):
    model = peft.get_peft_model(base, lora())
    before = snapshot(model)
    patch(model, SETTINGS).state_dict()
    unpatch(model)
    trace(model, tokens(), **SPARSE)
    assert snapshot(model) == before
    assert "save_pretrained" not in vars(model.peft_config["default"])
    assert not [module for module in model.modules() if module._state_dict_pre_hooks]
