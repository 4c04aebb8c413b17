"""torch.compile and torch.export of patched models, with a head and without."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, SPARSE, build, each_decode, tokens
from support.small_models import loaded, names, small_model
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    StaticCache,
)

from moba_flex.models import patch, set_attention

CLASSES = (LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification, LlamaForTokenClassification)


def headless(cls: type[PreTrainedModel]) -> PreTrainedModel:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.use_cache, config.num_hidden_layers = False, 2
    return patch(cls(config).eval(), **SPARSE)


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_a_model_is_one_graph_whatever_its_head(cls):
    model, ids = headless(cls), tokens()
    expected = model(ids)[0]
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(ids)[0], expected)
    program = torch.export.export(model, (ids,), strict=False)
    torch.testing.assert_close(program.module()(ids)[0], expected)


@torch.no_grad()
def test_padding_of_a_decoder_counts_in_a_graph_without_a_mask_of_the_encoder():
    torch._dynamo.reset()
    name = "T5GemmaForConditionalGeneration"
    model, ids = patch(small_model(*loaded(name, *names()[name])[1:]), **SPARSE), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask, "use_cache": False}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits[:, 9:], model(**inputs).logits[:, 9:])


@each_decode
@torch.no_grad()
def test_a_dynamic_length_is_exported(decode):
    model, ids = build(num_hidden_layers=2), tokens()
    patch(model, **SPARSE, decode=decode).config.use_cache = False
    length = torch.export.Dim("n", min=20, max=200)
    mask = torch.ones_like(ids)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    program = torch.export.export(model, (ids,), {"attention_mask": mask}, dynamic_shapes=shapes, strict=False).module()
    for n in (20, 33, 100):
        ids = tokens(2, n)
        mask = torch.ones_like(ids)
        torch.testing.assert_close(program(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@each_decode
@pytest.mark.parametrize("gradients", [False, True])
def test_the_module_that_transformers_exports_decodes(decode, gradients):
    executorch = pytest.importorskip("transformers.integrations.executorch")
    model = patch(build(num_hidden_layers=1), **SPARSE, decode=decode)
    cache = {"batch_size": 1, "max_cache_len": 64, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", max_length=64, cache_config=cache)
    with torch.set_grad_enabled(gradients):
        module = executorch.TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=64, device=torch.device("cpu"))
        module.export(input_ids=tokens(1, 1), cache_position=torch.tensor([0]))


@each_decode
@pytest.mark.parametrize("lengths", [(20,), (40,), (34, 40, 60)], ids=str)
@torch.no_grad()
def test_a_prompt_into_a_static_cache_is_exported(decode, lengths):
    executorch = pytest.importorskip("transformers.integrations.executorch")
    model, ids = patch(build(num_hidden_layers=2), **SPARSE, decode=decode), tokens(1, 60)
    cache = {"batch_size": 1, "max_cache_len": 64, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", max_length=64, cache_config=cache)
    module = executorch.TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=64, device=torch.device("cpu"))
    n = lengths[len(lengths) // 2]
    shapes = None
    if len(lengths) > 1:
        length = torch.export.Dim("n", min=lengths[0], max=lengths[-1])
        shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
    program = module.export(input_ids=ids[:, :n], cache_position=torch.arange(n), dynamic_shapes=shapes, strict=False).module()
    for n in lengths:
        static = StaticCache(config=model.config, max_cache_len=64)
        expected = model(ids[:, :n], past_key_values=static, use_cache=True).logits
        torch.testing.assert_close(program(input_ids=ids[:, :n], cache_position=torch.arange(n)), expected)
    if decode == "full" or n > 32:
        with pytest.raises(RuntimeError, match="an exported prompt must begin at the first position of its static cache"):
            program(input_ids=ids[:, :n], cache_position=torch.arange(n) + 1)


@torch.no_grad()
def test_the_specification_exports_as_plain_pytorch():
    """Which is what a format without custom operators needs."""
    model = set_attention(patch(build(num_hidden_layers=1), **SPARSE), "moba_naive")
    model.config.use_cache = False
    program = torch.export.export(model, (tokens(),), strict=False)
    own = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("moba_flex")}
    assert not own


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("attention", ["moba", "moba_naive"])
def test_onnx_is_refused_in_a_sentence_and_full_attention_is_not(monkeypatch, attention, strict):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as it is within torch.onnx.export, which needs packages of its own
    model = set_attention(patch(build(num_hidden_layers=1), **SPARSE), attention)
    model.config.use_cache = False
    with pytest.raises(Exception, match=r'cannot be exported to ONNX.*set_attention\(model, "full"\)'):
        torch.export.export(model, (tokens(),), strict=strict)
    torch.export.export(set_attention(model, "full"), (tokens(),), strict=strict)
