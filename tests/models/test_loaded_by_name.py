"""A model that is loaded with `attn_implementation="moba"` and has no saved settings never computes something else in silence."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import transformers
from support.families import FAMILIES, SIZES, SPARSE, assert_close, build, logits, tokens
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedModel

from moba_flex import describe
from moba_flex.models import full_attention, patch, set_attention, unpatch


@pytest.fixture
def folder(tmp_path) -> str:
    build().save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder: str, name: str = "moba") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)


def test_it_takes_the_settings_of_the_patched_model_and_says_so(folder):
    policy = patch(build(), **SPARSE, full_attention_layers=[-1])
    reference, ids = load(folder, policy.config._attn_implementation), tokens()
    with pytest.warns(UserWarning, match=r"patched model of that kind, MobaConfig\(block_size=8, top_k=2"):
        found = logits(reference, ids)
    assert torch.equal(found, logits(policy, ids))
    assert reference.config.moba == policy.config.moba


def test_it_keeps_them(folder, recwarn):
    policy = patch(build(), **SPARSE)
    reference, ids = load(folder), tokens()
    before = logits(reference, ids)
    patch(policy, block_size=4, top_k=3)
    recwarn.clear()
    assert torch.equal(logits(reference, ids), before)
    assert not [w for w in recwarn if "no settings of MoBA" in str(w.message)], "it warns once"


def test_patched_models_that_differ_are_an_error(folder):
    models = patch(build(), **SPARSE), patch(build(), block_size=16, top_k=2)
    with pytest.raises(ValueError, match=r"different settings: MobaConfig.*Call moba_flex.patch\(model, ...\) on the loaded model"):
        load(folder)(tokens())
    del models


def test_patched_models_of_other_sizes_do_not_count(folder):
    smaller, policy = patch(build(num_hidden_layers=2), block_size=16, top_k=3), patch(build(), **SPARSE)
    reference, ids = load(folder), tokens()
    assert torch.equal(logits(reference, ids), logits(policy, ids))
    del policy
    gc.collect()
    with pytest.warns(UserWarning, match="it takes the defaults"):
        logits(load(folder), ids)
    del smaller


def test_they_stay_what_they_are_when_layers_are_switched(folder):
    policy, ids = patch(build(), **SPARSE), tokens()
    for switched in (lambda model: set_attention(model, "moba"), lambda model: set_attention(set_attention(model, "full"), "moba")):
        assert torch.equal(logits(switched(load(folder)), ids), logits(policy, ids))
    reference = load(folder)
    with full_attention(reference):
        logits(reference, ids)
    assert torch.equal(logits(reference, ids), logits(policy, ids))


def test_a_convolution_of_keys_cannot_be_taken_over(folder):
    policy = patch(build(), **SPARSE, key_conv=3)
    with pytest.raises(ValueError, match="has key_conv=3, whose weights the loaded one lacks"):
        load(folder)(tokens())
    del policy


def test_without_a_patched_model_it_warns_of_the_defaults(folder):
    model, ids = load(folder), tokens()
    with pytest.warns(UserWarning, match=r"it takes the defaults, MobaConfig\(block_size=4096, top_k=12"):
        found = logits(model, ids)
    assert torch.equal(found, logits(build(), ids)), "prompts of a block read every key"


def test_full_attention_of_the_policy_is_that_of_the_reference(folder):
    policy = set_attention(patch(build(), **SPARSE), "full")
    reference, ids = load(folder, policy.config._attn_implementation), tokens()
    assert torch.equal(logits(reference, ids), logits(policy, ids))


def test_a_compiled_model_takes_them_too(folder):
    policy = patch(build(), **SPARSE)
    model, ids = load(folder).eval(), tokens()
    call = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    expected = logits(policy, ids, **call)
    assert not torch.equal(expected, logits(build(), ids, **call))
    for _ in range(2):  # the second time its configuration has the settings
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, ids, **call), expected)
        logits(model, ids)


def test_a_refused_model_loaded_by_name_says_that_it_cannot_use_moba():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    message = r"^the code of a model with a BloomConfig computes with its attention mask, .*: the model cannot use MoBA, so load it with"
    with pytest.raises(ValueError, match=message):
        BloomForCausalLM._from_config(config, attn_implementation="moba")(tokens())


ENCODERS = {"T5Model": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}}
ENCODERS["BertModel"] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize("name, layer", [("T5Model", "T5Attention"), ("BertModel", "BertSelfAttention")])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_is_refused_but_works_warns_that_it_does_not_use_moba(name, layer, compiled, recwarn):
    config, call = getattr(transformers, name.replace("Model", "Config"))(**ENCODERS[name]), {"input_ids": tokens()}
    call |= {"decoder_input_ids": tokens()} if name == "T5Model" else {}
    model = getattr(transformers, name)._from_config(config, attn_implementation="moba").eval()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        found = run(**call).last_hidden_state
    told = [str(w.message) for w in recwarn if "MoBA" in str(w.message)]
    assert told and all(f"but {layer} keeps its original attention" in message for message in told)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(found, model(**call).last_hidden_state)


SEQUENCE_TO_SEQUENCE = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.3, "pad_token_id": 0}
SEQUENCE_TO_SEQUENCE |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}


@pytest.mark.parametrize("kind", ["Marian", "MBart", "M2M100", "Pegasus", "Blenderbot", "BlenderbotSmall"])
def test_encoder_decoders_compute_what_the_patched_model_computes(kind, recwarn):
    model_class = getattr(transformers, "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration")
    policy = model_class(getattr(transformers, f"{kind}Config")(**SEQUENCE_TO_SEQUENCE, eos_token_id=2, decoder_start_token_id=1)).eval()
    reference = model_class._from_config(copy.deepcopy(policy.config), attn_implementation="moba").eval()
    reference.load_state_dict(policy.state_dict())
    call = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    expected = logits(patch(policy, **SPARSE), call)
    assert torch.equal(logits(reference, call), expected)
    assert not [w for w in recwarn if "keeps its original attention" in str(w.message)], "its decoder uses MoBA"


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="this version of transformers has no Gemma 4")
def test_configurations_in_which_layers_differ_are_compared_too(folder):
    more = {"vocab_size_per_layer_input": SIZES["vocab_size"], "hidden_size_per_layer_input": 8, "global_head_dim": 16}
    config = transformers.Gemma4TextConfig(**SIZES, **more, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.raises(RuntimeError):
        _ = config.head_dim
    policy = patch(transformers.Gemma4ForCausalLM(config).eval(), **SPARSE)
    reference, ids = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="moba").eval(), tokens()
    reference.load_state_dict(policy.state_dict())
    with pytest.warns(UserWarning, match="patched model of that kind"):
        found = logits(reference, ids)
    assert_close(found, logits(policy, ids), "its sliding layers may use other attention than the original")
    llama = load(folder)
    assert "2 with MoBA" not in str(describe(llama)) and "4 with MoBA" in str(describe(llama))
    with pytest.warns(UserWarning, match="it takes the defaults"):
        logits(llama, ids)


def one_step(trainer: str, texts: list[dict], tiny, tmp_path, settings: dict, **arguments) -> dict:
    """What TRL's trainer logs of its first step with a patched policy, whose reference model it loads itself."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = patch(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), **SPARSE)
    settings |= {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    settings |= {"report_to": "none", "save_strategy": "no", "output_dir": str(tmp_path), "disable_tqdm": True}
    run = getattr(trl, f"{trainer}Trainer")(
        model,
        args=getattr(trl, f"{trainer}Config")(**settings),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
        **arguments,
    )
    run.train()
    assert run.ref_model.config.moba == model.config.moba
    return run.state.log_history[0]


PROMPTS = [" ".join(f"w{(7 * i + j) % 50}" for j in range(30)) for i in range(8)]
POLICY_IS_REFERENCE = "policy and reference are one model before the first step"


@pytest.mark.parametrize("trainer", ["DPO", "KTO"])
def test_trl_trains_against_a_reference_of_the_same_settings(tiny, tmp_path, trainer):
    if trainer == "KTO":
        texts = [{"prompt": x, "completion": f" w{i} w1 w2 w3", "label": i % 2 == 0} for i, x in enumerate(PROMPTS)]
    else:
        texts = [{"prompt": x, "chosen": f" w{i} w1 w2 w3", "rejected": f" w{i + 1} w4 w5"} for i, x in enumerate(PROMPTS)]
    logged = one_step(trainer, texts, tiny, tmp_path, {})
    assert logged["loss"] == pytest.approx(0.6931 if trainer == "DPO" else 0.5, abs=1e-3), POLICY_IS_REFERENCE


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_trl_samples_with_a_reference_of_the_same_settings(tiny, tmp_path, trainer):
    settings = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}  # a beta of 0 needs no reference
    texts = [{"prompt": x} for x in PROMPTS]
    reward = lambda completions, **_: [float(len(set(text))) for text in completions]  # noqa: E731
    logged = one_step(trainer, texts, tiny, tmp_path, settings, reward_funcs=reward)
    assert logged["kl"] == pytest.approx(0, abs=1e-6), POLICY_IS_REFERENCE


def test_layers_that_were_switched_to_full_attention_are_so_in_the_reference(folder):
    policy = set_attention(patch(build(), **SPARSE), "full", layers=[-1])
    reference, ids = load(folder, policy.config._attn_implementation), tokens()
    with pytest.warns(UserWarning, match=r"full_attention_layers=\(3,\)"):
        found = logits(reference, ids)
    assert torch.equal(found, logits(policy, ids))
    assert reference.config.moba.full_attention_layers == (policy.config.num_hidden_layers - 1,)


def test_layers_that_were_switched_from_full_attention_too(folder):
    policy = set_attention(patch(build(), **SPARSE, full_attention_layers=[0, -1]), "moba", layers=[0])
    ids = tokens()
    assert torch.equal(logits(load(folder), ids), logits(policy, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_counts_where_the_model_that_was_patched_is_gone(folder, copied):
    policy, ids = copied(patch(build(), **SPARSE)), tokens()
    gc.collect()
    assert torch.equal(logits(load(folder), ids), logits(policy, ids))


def test_a_policy_that_uses_full_attention_for_a_while_gives_its_settings(folder):
    policy = patch(build(), **SPARSE)
    reference, ids = load(folder), tokens()
    with full_attention(policy):
        logits(reference, ids)
    assert torch.equal(logits(reference, ids), logits(policy, ids))


def test_an_unpatched_model_does_not_count(folder):
    policy, ids = unpatch(patch(build(), **SPARSE)), tokens()
    with pytest.warns(UserWarning, match="it takes the defaults"):
        assert torch.equal(logits(load(folder), ids), logits(policy, ids))


def test_saved_settings_that_are_not_the_policys_are_told_once(tmp_path, recwarn):
    patch(build(), block_size=4, top_k=3).save_pretrained(tmp_path)
    policy = patch(build(), **SPARSE)
    reference, ids = load(str(tmp_path)), tokens()
    message = r"saved with it, MobaConfig\(block_size=4.*patched model of its kind has MobaConfig\(block_size=8"
    with pytest.warns(UserWarning, match=message):
        logits(reference, ids)
    recwarn.clear()
    logits(reference, ids)
    assert not [w for w in recwarn if "saved with it" in str(w.message)]
    del policy
