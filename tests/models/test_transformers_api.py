"""Canaries: private and undocumented API of transformers does what the package needs of it. Each failure names the entry."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from support.families import attentions, build, tokens
from support.serving import Serving, generation
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import QuantizedLayer
from transformers.models.llama import modeling_llama

from moba_flex.models import patch, upstream
from moba_flex.models.continuous_batching import MobaBatchingManager


def changed(entry: str, what: str) -> str:
    return f"transformers {transformers.__version__} changed what moba_flex/models/upstream.py uses as `{entry}`: {what}"


@pytest.fixture
def seen():
    """What a registered attention and its mask function are called with by a small Llama."""
    calls = {"mask": [], "attention": []}

    def mask(**request):
        calls["mask"].append(request)

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls["attention"].append((attention_mask, kwargs))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("canary", attention)
    AttentionMaskInterface.register("canary", mask)
    yield calls
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop("canary")


def test_attributes_that_differ_between_layers_are_read_from_the_configuration_of_all():
    config = LlamaConfig(num_hidden_layers=2, head_dim=8, per_layer_config={1: {"head_dim": 16}})
    with pytest.raises(RuntimeError):
        _ = config.head_dim
    found = [upstream.global_value(config, name) for name in ("head_dim", "hidden_size", "missing")]
    assert found == [8, config.hidden_size, None], changed(
        "global_value", "`_getattr_without_heterogeneous_validation` reads something else"
    )


def test_the_name_of_an_implementation_is_set_for_one_configuration_alone():
    config = LlamaConfig(num_hidden_layers=1)
    upstream.set_implementation(config, "sdpa")
    assert upstream.implementation_of(config) == "sdpa", changed("implementation_of", "`config._attn_implementation` is another name")
    multimodal = transformers.LlavaConfig()
    upstream.set_implementation(multimodal, "moba")
    parts = [upstream.implementation_of(part) for part in (multimodal.text_config, multimodal.vision_config)]
    assert "moba" not in parts, changed("set_implementation", "a name is set in parts of a configuration too")
    assert not [name for name in config.to_dict() if "attn_implementation" in name], changed("set_implementation", "the name is saved")


def test_models_and_layers_hold_their_configuration_and_what_peft_puts_around_them_does_not():
    peft = pytest.importorskip("peft")
    model = build()
    for module in (model, model.model, attentions(model)[0]):
        assert upstream.holds_config(module), changed("holds_config", f"a {type(module).__name__} does not hold its configuration itself")
    around = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model
    assert around.config is model.config and not upstream.holds_config(around), changed("holds_config", "PEFT's wrappers have another")


def test_attention_layers_are_known_by_the_registry_that_they_mention():
    source = upstream.looks_up_attention(modeling_llama.LlamaAttention)
    assert source is modeling_llama, changed("looks_up_attention", "forward of an attention layer does not mention ALL_ATTENTION_FUNCTIONS")
    assert upstream.looks_up_attention(modeling_llama.LlamaMLP) is None, changed("looks_up_attention", "other layers mention it too")


def test_the_function_behind_a_name_is_the_layers_own():
    eager = upstream.attention_by_name(modeling_llama, "eager")
    assert eager is modeling_llama.eager_attention_forward, changed("attention_by_name", "eager attention is found elsewhere")
    sdpa = upstream.attention_by_name(modeling_llama, "sdpa")
    assert callable(sdpa) and sdpa.__module__.startswith("transformers"), changed("attention_by_name", "the registry has no sdpa")


def test_a_name_has_a_function_that_builds_its_masks():
    for name in ("sdpa", "eager", "flex_attention"):
        assert callable(upstream.mask_builder(name)), changed("mask_builder", f"{name} has no mask function")
    assert upstream.mask_builder("no such name") is None, changed("mask_builder", "unknown names raise")


def test_models_say_whether_they_support_sdpa():
    assert upstream.supports_sdpa(modeling_llama), changed("supports_sdpa", "`_supports_sdpa` of Llama is gone or false")
    gpt_oss = sys.modules["transformers.models.gpt_oss.modeling_gpt_oss"] if build("gpt_oss") else None
    assert not upstream.supports_sdpa(gpt_oss), changed("supports_sdpa", "GPT-OSS, which has none, says that it has")


def test_mask_functions_are_told_what_masks_are_made_of(seen):
    model = build(attention=None)
    model.config._attn_implementation = "canary"
    model(tokens(), use_cache=False)
    (request,) = seen["mask"]
    missing = [name for name in upstream.MASK_REQUEST if name not in request]
    assert not missing, changed("MASK_REQUEST", f"mask functions are not told {missing}")
    function = request["mask_function"]
    assert function is upstream.causal_mask_function, changed("causal_mask_function", "a plain causal request names another function")
    first, second = torch.tensor(1), torch.tensor(2)
    assert not upstream.causal_mask_function(0, 0, first, second), changed("causal_mask_function", "queries see later keys")
    assert upstream.bidirectional_mask_function(0, 0, first, second), changed("bidirectional_mask_function", "queries miss later keys")


def test_a_block_mask_goes_through_a_model_untouched(seen):
    model = build(attention=None)
    model.config._attn_implementation = "canary"
    mask = BlockMask.from_kv_blocks(torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    model(tokens(), attention_mask=mask, use_cache=False)
    assert all(got is mask for got, _ in seen["attention"]), changed("mask_builder", "a BlockMask does not reach the layers as it is")


def test_further_keyword_arguments_reach_the_attention_function(seen):
    model = build(attention=None)
    model.config._attn_implementation = "canary"
    model(tokens(), use_cache=False, canary=3)
    assert all(kwargs.get("canary") == 3 for _, kwargs in seen["attention"]), changed("cache_in", "keyword arguments do not reach layers")


def test_a_cache_is_among_a_layers_keyword_arguments_and_its_keys_are_the_layers():
    model, got = build(), []
    layer = attentions(model)[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: got.append(upstream.cache_in(kwargs)), with_kwargs=True)
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache)
    assert got == [cache], changed("cache_in", "a layer gets its cache under another name")
    again = DynamicCache(config=model.config)
    model.model(tokens(), **{upstream.cache_argument(model.model): again})
    assert again.get_seq_length() == tokens().shape[1], changed("cache_argument", "a model takes its cache under another name")
    key = cache.layers[0].keys
    assert upstream.is_cached_tensor(cache, cache.layers[0], key), changed("is_cached_tensor", "`cache.layers[i].keys` are not the keys")
    assert not upstream.is_cached_tensor(cache, cache.layers[0], key.clone()), changed("is_cached_tensor", "`cache.offloading` is true")
    assert type(cache.layers[0]) in upstream.GROWING_LAYERS, changed("GROWING_LAYERS", "a DynamicCache has layers of another class")


def test_models_take_the_number_of_drafted_positions():
    names = inspect.signature(LlamaForCausalLM.forward).parameters
    assert upstream.DRAFTED_POSITIONS in names, changed("DRAFTED_POSITIONS", "the argument is gone")


def test_assisted_generation_says_the_number_of_drafts_to_a_model_whose_inputs_are_completed():
    seen = []

    class Headed(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            seen.append(kwargs.pop(upstream.DRAFTED_POSITIONS, None))
            return super().forward(input_ids, attention_mask, **kwargs)

    model, ids = Headed(build().config).eval(), tokens(1, 6).repeat(1, 4)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "prompt_lookup_num_tokens": 3}
    model.generate(ids, **call)
    assert set(seen) == {None}, changed("DRAFTED_POSITIONS", "it is passed to models that do not take it")
    upstream.complete_inputs(model)
    model.generate(ids, **call)
    assert max(filter(None, seen)) == 4, changed("complete_inputs", "assisted generation does not set what the inputs have")
    upstream.leave_inputs(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_decoder_layer_can_answer_at_once_and_what_it_gives_is_the_next_ones_input():
    model, outputs = build(), []
    layers = [module for module in model.modules() if isinstance(module, upstream.DECODER_LAYER)]
    assert layers == list(model.model.layers), changed("DECODER_LAYER", "a Llama's decoder layers are of another class")
    for layer in layers:
        layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    whole = model(tokens(), use_cache=False).logits
    layers[0].forward = own = layers[0].forward  # as accelerate leaves it
    with upstream.skip_forward(layers[:1], outputs[0]):
        rest = model(outputs[0].new_zeros(tokens().shape).long(), use_cache=False).logits
    assert torch.equal(rest, whole), changed("skip_forward", "a layer reads more of the one before it than its output")
    assert layers[0].__dict__["forward"] is own and "forward" not in layers[1].__dict__, "what was there before is not put back"


def test_layer_types_name_full_attention():
    config = build("gemma3").config
    assert set(config.layer_types) & set(upstream.FULL_LAYER_TYPES), changed("FULL_LAYER_TYPES", "full attention has another name")


def test_an_auto_class_tells_what_it_would_build():
    found = upstream.model_class_of(LlamaConfig(), transformers.AutoModelForCausalLM)
    assert found is LlamaForCausalLM, changed("model_class_of", "`_model_mapping` of auto classes is another")


def test_weights_are_initialized_where_no_file_holds_them(tmp_path):
    build().save_pretrained(tmp_path)
    called = []

    class Canary(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.missing = torch.nn.Parameter(torch.ones(2))

        def initialize_weights(self):
            super().initialize_weights()
            called.append(self)
            for weight in (self.missing, self.lm_head.weight):
                upstream.zero_unless_read(weight)

    model = Canary.from_pretrained(tmp_path)
    assert called == [model], changed("zero_unless_read", "`initialize_weights` is not what initializes what files do not hold")
    assert not model.missing.any(), changed("zero_unless_read", "a weight that no file holds is not zeroed")
    assert model.lm_head.weight.any(), changed("zero_unless_read", "a weight that was read is zeroed")


def test_an_adapter_is_found_by_its_file(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert upstream.adapter_file(str(tmp_path), {}), changed("adapter_file", "`find_adapter_config_file` finds no adapter_config.json")


def test_a_file_of_a_folder_is_found_or_missing_without_an_error(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    found = [upstream.file_of_repository(str(tmp_path), name, {}) for name in ("there.json", "missing.json")]
    what = "`cached_file` does not return a path, or None for what is missing"
    assert found[0] and found[0].endswith("there.json") and found[1] is None, changed("file_of_repository", what)


def test_peft_saves_an_adapter_by_its_configuration_after_the_state_dict(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base, calls = build(), []
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    configs = upstream.adapter_configs_of(base)
    assert configs == list(model.peft_config.values()), changed("adapter_configs_of", "PEFT leaves no `peft_config` on the model")
    assert configs[0] is model.peft_config["default"], changed("adapter_configs_of", "`peft_config` of the model is a copy")
    base.register_state_dict_pre_hook(lambda *_: calls.append("state dict"))
    setattr(configs[0], upstream.ADAPTER_SAVER, lambda *args, **kwargs: calls.append(upstream.saving_module()))
    model.save_pretrained(tmp_path)
    assert len(calls) == 2 and calls[0] == "state dict", changed("ADAPTER_SAVER", f"saving an adapter calls {calls}")
    assert calls[1] is model, changed("saving_module", "the function that saves an adapter's configuration is no method of its model")
    prompts = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert upstream.adapter_configs_of(prompts), changed("adapter_configs_of", "a model with prompts has no `_peft_config`")


def test_peft_says_that_a_model_is_its_own():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert upstream.is_peft_model(model), changed("is_peft_model", "PEFT's `active_peft_config` is gone")


def test_accelerate_marks_what_it_offloads():
    from accelerate import cpu_offload

    model = cpu_offload(patch(build(), block_size=8, top_k=2))
    assert upstream.is_offloaded(model.modules()), changed("is_offloaded", "accelerate's `_hf_hook` is another name")


batches = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")


@batches
def test_generate_batch_uses_the_manager_that_it_is_given():
    built = build().init_continuous_batching(generation(2), ContinuousBatchingConfig())
    assert type(built) is MobaBatchingManager, changed("use_manager", "managers are not of `continuous_api.ContinuousBatchingManager`")


@batches
def test_a_forward_pass_names_its_requests_and_each_layer_updates_the_cache(monkeypatch):
    calls, cache_class = [], upstream.PagedAttentionCache
    names = ("can_store_request_tokens", "extend_read_and_write_indices", "update")
    for name, method in [(name, getattr(cache_class, name)) for name in names]:

        def recorded(*args, name=name, method=method, **kwargs):
            calls.append((name, (*args[1:], *kwargs.values())))
            return method(*args, **kwargs)

        monkeypatch.setattr(cache_class, name, recorded)
    serving = Serving(build("gemma3"), new=2)
    for prompt in tokens(2, 20).tolist():
        serving.add(prompt)
    serving.step(1)
    names = [name for name, _ in calls]
    wanted = ["can_store_request_tokens"] * 2 + ["extend_read_and_write_indices"] * 2 + ["update"] * 4
    assert names == wanted, changed("PagedAttentionCache", f"a pass calls {names}")
    (state, length), (request, past, new, _, writes), (key, value, layer, kwargs) = (calls[i][1] for i in (0, 2, 5))
    assert (state.request_id, length) == (request, 20) and (past, new) == (0, 20), changed("PagedAttentionCache", "it is told other things")
    assert upstream.prompt_length(state) == 20, changed("prompt_length", "a new request has another prompt")
    assert upstream.prompt_length(state.create_equivalent_initial_request()) == 20, changed("prompt_length", "a request that begins again")
    assert upstream.PAGED_CALL in kwargs, changed("PAGED_CALL", f"a layer's arguments are {sorted(kwargs)}")
    full = upstream.pages_of_full_attention(serving.cache)
    assert upstream.window_of(serving.cache, 0) == 8 and upstream.window_of(serving.cache, layer) == 1, changed("window_of", "windows")
    slots = torch.tensor(calls[3][1][4][list(serving.cache.cache_allocators.values()).index(full)])
    for given, kept in zip((key, value), upstream.pages_of_layer(serving.cache, layer)):
        assert torch.equal(kept[slots], given[0].transpose(0, 1)), changed("pages_of_layer", "new keys are not where they should be")
    stride = full.block_table[request][0] * full.block_physical_stride
    assert slots[:16].tolist() == list(range(stride, stride + 16)), changed("pages_of_full_attention", "tokens of a page lie otherwise")
    assert writes, changed("PagedAttentionCache", "it is not told where to write")


@batches
def test_masks_of_continuous_batching_see_past_tokens_of_the_own_request():
    mask = torch.full((1, 1, 4, 6), -1.0)
    upstream.fill_paged_mask(mask, [0, 1, 4], [0, 3, 6], 1)
    seen = mask[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]], changed(
        "fill_paged_mask", "`build_attention_mask` writes another mask"
    )


@batches
def test_options_that_pad_batches_have_these_names():
    config = ContinuousBatchingConfig(use_cuda_graph=True, use_async_batching=True, varlen_compile_config=CompileConfig())
    wanted = ["use_cuda_graph", "use_async_batching", "varlen_compile_config"]
    assert upstream.unsuited_options(config) == wanted, changed("unsuited_options", "options have other names")
    assert not upstream.unsuited_options(ContinuousBatchingConfig()), changed("unsuited_options", "some are on by default")


def test_a_quantized_layer_makes_its_keys_of_the_same_until_it_quantizes_anew():
    class Whole(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor.clone()

        def _dequantize(self, q_tensor):
            return q_tensor

    layer, seen = Whole(residual_length=3), []
    for n_new in (5, 1, 1, 1, 1):
        layer.update(torch.ones(1, 1, n_new, 2), torch.ones(1, 1, n_new, 2))
        seen.append(upstream.quantized_keys(layer))
    none = [keys is None for keys in seen]
    assert none == [True, False, False, True, False], changed("quantized_keys", f"all is quantized anew after other calls: {none}")
    assert seen[1] is seen[2] is not seen[4], changed("quantized_keys", "`_quantized_keys` is replaced in other calls")
    if Version(transformers.__version__) < Version("5.20"):  # which reorders the new keys alone, so that no search works
        return
    layer.reorder_cache(torch.tensor([0]))
    assert upstream.quantized_keys(layer) is None, changed("quantized_keys", "`_pending_beam_idx` does not tell of rows that change places")
