"""`moba_flex.trace` leaves the model as it was, compiled or not, whatever happens, and names what is wrong with its input."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from support.traced_models import SIZES, SPARSE, batch, build
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, PreTrainedModel

import moba_flex
from moba_flex import Selection, patch, select_blocks, set_attention, trace
from moba_flex.analysis import trace as trace_module
from moba_flex.models.state import LayerState, state_of

pytestmark = pytest.mark.usefixtures("no_progress_bar")


def snapshot(model: PreTrainedModel) -> tuple:
    """Everything that a trace may touch."""
    return (
        model.config.to_dict(),
        dict(model.config.__dict__),
        [
            (name, module.training, sorted(module.__dict__), vars(state_of(module) or LayerState()).copy())
            for name, module in model.named_modules()
        ],
        {name: (x.clone(), x.requires_grad, x.grad) for name, x in model.named_parameters()},
    )


STATES = {
    "unpatched": lambda model: model,
    "patched": lambda model: patch(model, **SPARSE, decode="sparse"),
    "one layer full": lambda model: set_attention(patch(model, **SPARSE), "full", layers=[1]),
    "moba_naive": lambda model: set_attention(patch(model, **SPARSE), "moba_naive"),
    "in training": lambda model: patch(model, **SPARSE).train(),
    "partly in training": lambda model: model.model.layers[2].train() and model,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt], ids=str)
@pytest.mark.parametrize("settings", [{}, {"block_size": 5, "top_k": 2}], ids=["own settings", "other settings"])
def test_the_model_is_left_exactly_as_it_was(state, failure, settings, monkeypatch):
    model = build()
    STATES[state](model)
    before = snapshot(model)
    if failure:

        def fail(selection: Selection):
            raise failure("stop")

        monkeypatch.setattr(trace_module, "layer_statistics", fail)
        with pytest.raises(failure):
            trace(model, **batch("left"), **settings)
    else:
        trace(model, **batch("left"), **settings)
    after = snapshot(model)
    assert after[:3] == before[:3]
    for name, (weight, *rest) in before[3].items():
        assert torch.equal(after[3][name][0], weight) and after[3][name][1:] == tuple(rest), name


def test_a_model_loaded_with_moba_stays_that():
    config = LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="moba").eval()
    before = snapshot(model)
    assert trace(model, **batch()).chosen.shape[2] == 1, "the default block is longer than the tokens"
    assert snapshot(model)[:3] == before[:3]


def test_dropout_in_training_is_no_matter():
    model = build(attention_dropout=0.5)
    expected = trace(model, **batch(), **SPARSE)
    assert torch.equal(trace(model.train(), **batch(), **SPARSE).chosen, expected.chosen)


def test_no_layers_queries_outlive_the_layer(monkeypatch):
    earlier: list[weakref.ref] = []

    def select(query: Tensor, key: Tensor, **given) -> Selection:
        assert not any(tensor() is not None for tensor in earlier), "queries or keys of an earlier layer are still there"
        earlier.extend(weakref.ref(x) for x in (query, key))
        return select_blocks(query, key, **given)

    select.__signature__ = trace_module.inspect.signature(select_blocks)
    monkeypatch.setattr(trace_module, "select_blocks", select)
    trace(build(), **batch(), **SPARSE, selections=[0, 1])
    assert len(earlier) == 8


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_hooks_that_only_a_trace_needed_are_taken_away(decode):
    model = patch(build(), **SPARSE, decode=decode)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    trace(model, **batch(), decode="sparse" if decode == "full" else "full", block_size=8)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before


def test_a_compiled_model_is_traced_without_compiling():
    model = patch(build(), **SPARSE)
    expected = trace(model, **batch())

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    compiled = torch.compile(model, backend=refuse)
    assert torch.equal(trace(compiled, **batch()).chosen, expected.chosen)


def test_layers_compiled_in_place_are_traced():
    model = patch(build(), **SPARSE)
    expected = trace(model, **batch())
    for layer in model.model.layers:
        layer.compile(backend="eager")
    model(**batch())
    found = trace(model, **batch())
    assert found.layers == expected.layers and torch.equal(found.chosen, expected.chosen)


# The progress bar


def test_a_progress_bar_counts_the_layers(capsys):
    transformers.utils.logging.enable_progress_bar()
    trace(build(), **batch(), **SPARSE, full_attention_layers=[0])
    assert "3/3" in capsys.readouterr().err
    transformers.utils.logging.disable_progress_bar()
    trace(build(), **batch(), **SPARSE)
    assert capsys.readouterr().err == ""


# What bad input gets


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, ["input_ids", "list"]),
        ({"input_ids": torch.zeros(1, 4)}, TypeError, ["input_ids", "torch.float32"]),
        ({"input_ids": torch.zeros(4).long()}, ValueError, ["input_ids", "(4,)"]),
        ({"input_ids": torch.zeros(2, 0).long()}, ValueError, ["input_ids", "(2, 0)"]),
        ({"input_ids": torch.full((1, 4), -1)}, ValueError, ["input_ids must be token ids from 0 to", "but has -1"]),
        ({"input_ids": torch.full((1, 4), 10**9)}, ValueError, ["input_ids must be token ids from 0 to", "but has 1,000,000,000"]),
        ({"input_ids": torch.zeros(1, 4, device="meta").long()}, ValueError, ["input_ids must have values, which trace reads"]),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, ["attention_mask", "(3, 5)", "(3, 37)"]),
        ({"attention_mask": [[1]]}, TypeError, ["attention_mask", "list"]),
        ({"attention_mask": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, TypeError, ["attention_mask", "nested"]),
        ({"top_k": 0}, ValueError, ["top_k", "0"]),
        ({"topk": 2}, ValueError, ["topk"]),
        ({"config": {"top_k": 2}, "top_k": 2}, TypeError, ["config and settings", "both", "top_k"]),
        ({"config": 3}, ValueError, ["config must be a MobaConfig or a dict of its settings, but is 3"]),
        ({"selections": [4]}, ValueError, ["selections", "4", "0 to 3"]),
        ({"selections": 1}, ValueError, ["selections", "1"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(given, error, words):
    model = build()
    before = snapshot(model)
    with pytest.raises(error) as raised:
        trace(model, **{**batch(), **given})
    for word in words:
        assert word in str(raised.value)
    assert snapshot(model)[:3] == before[:3]


def test_a_model_without_moba_layers_says_so():
    bert = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="BertModel"):
        trace(bert, **batch())
    model = set_attention(patch(build(), **SPARSE), "full")
    with pytest.raises(ValueError, match="full attention now"):
        trace(model, **batch())
    with pytest.raises(TypeError, match="model must be"):
        trace("llama", **batch())


def test_an_encoder_decoder_that_cannot_be_traced_is_told_without_python_errors():
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(vocab_size=64, d_model=16, pad_token_id=0, **sizes))
    message = "^WhisperModel is an encoder-decoder model and does not read input_ids alone: trace takes decoder-only models, and those that"
    with pytest.raises(ValueError, match=message):
        trace(model, batch()["input_ids"], **SPARSE)


def test_the_package_exports_it():
    assert moba_flex.trace is trace and moba_flex.Trace is trace_module.Trace
