"""What `patch` and its companions promise beyond what each family of models must show (test_families.py)."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from families import (
    ALL_BLOCKS,
    FAMILIES,
    SIZES,
    SPARSE,
    TOKENS,
    assert_close,
    attentions,
    build,
    each_decode,
    each_side,
    logits,
    padded,
    snapshot,
    tokens,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex.config import MobaConfig
from moba_flex.models import AutoModelForCausalLM, full_attention, patch, set_attention, unpatch
from moba_flex.models import mask as mask_module

FEW = ("llama", "qwen3", "gemma2", "gpt_oss")
each_family = pytest.mark.parametrize("family", FEW)


# Parts, directions and precisions


def test_of_a_model_of_several_parts_only_the_language_model_is_patched(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=FAMILIES["llama"](), image_token_index=1)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 28, 28)}
    inputs["input_ids"][:, 3:7] = 1
    before = logits(model, inputs)  # leaves transformers' own hooks on the vision part
    state = snapshot(model)
    assert_close(logits(patch(model, **ALL_BLOCKS), inputs), before, "every block taken")
    sparse = logits(patch(model, **SPARSE), inputs)
    assert (sparse - before).abs().max() > 1e-2, "MoBA was not used"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert snapshot(unpatch(copy.deepcopy(model))) == state
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="moba")
    assert torch.equal(logits(loaded, inputs), sparse), "loaded with the name in all parts"
    for part in (unpatch(loaded).config, loaded.config.text_config, loaded.config.vision_config):
        assert part._attn_implementation == "sdpa", type(part).__name__
    assert torch.equal(logits(loaded, inputs), before)


def test_a_model_run_without_causality_reads_the_best_of_all_blocks():
    model, inputs = build(), padded("left")
    before = logits(model, inputs, is_causal=False)
    patch(model, **ALL_BLOCKS)
    assert_close(logits(model, inputs, is_causal=False), before, "every block taken")
    patch(model, **SPARSE)
    sparse = logits(model, inputs, is_causal=False)
    assert_close(logits(set_attention(model, "moba_naive"), inputs, is_causal=False), sparse, "moba_naive")
    patch(model, block_size=8, top_k=2, sink_blocks=1)
    with pytest.raises(ValueError, match="sink_blocks and recent_blocks must be 0"):
        logits(model, inputs, is_causal=False)


def test_half_precision_weights():
    model = patch(build().bfloat16(), **ALL_BLOCKS)
    sparse = logits(model, tokens())
    full = logits(set_attention(model, "full"), tokens())
    assert sparse.dtype == torch.bfloat16
    assert (sparse - full).float().norm() < 0.05 * full.float().norm()


# No more work than is asked for


@pytest.mark.parametrize("full_layers, masks", [((), 0), ((1,), 1), ((-1, 0), 1)])
def test_a_dense_mask_is_built_once_and_only_for_layers_with_full_attention(full_layers, masks, monkeypatch):
    model = patch(build(), **SPARSE, full_attention_layers=full_layers)
    built, read = [], []
    dense, numbers = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], mask_module._read
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda **kwargs: built.append(1) or dense(**kwargs))
    monkeypatch.setattr(mask_module, "_read", lambda *given: read.append(1) or numbers(*given))
    logits(model, padded("left"))
    assert (len(built), len(read)) == (masks, 1), f"full_attention_layers={full_layers}"


def test_an_implementation_that_looks_its_name_up_finds_it(monkeypatch):
    names = []

    def recorded(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recorded", recorded)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "recorded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = build()
    before = logits(model, padded("left"))
    model.set_attn_implementation("recorded")
    patch(model, **SPARSE)
    with full_attention(model):
        assert torch.equal(logits(model, padded("left")), before)
    assert names == ["recorded"] * 4 and model.config._attn_implementation == "moba"
    assert unpatch(model).config._attn_implementation == "recorded"


# Generation


@each_family
@each_decode
def test_generation_from_a_padded_batch_is_generation_alone(family, decode):
    model = patch(build(family), **SPARSE, decode=decode)
    batch = padded("left", (TOKENS, 30))
    call = {"max_new_tokens": 12, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = model.generate(ids, attention_mask=mask, **call)
    for row, length in enumerate((TOKENS, 30)):
        alone = model.generate(ids[row : row + 1, -length:], **call)
        case = f"{family}, decode {decode}, row {row}"
        assert_close(torch.stack(together.scores, 1)[row], torch.stack(alone.scores, 1)[0], case)
        assert torch.equal(together.sequences[row, -12:], alone.sequences[0, -12:]), case


@each_family
@each_decode
def test_generation_with_a_static_cache_is_generation_with_a_growing_one(family, decode):
    model, batch = patch(build(family), **SPARSE, decode=decode), padded("left", (TOKENS, 30))
    call = {"attention_mask": batch["attention_mask"], "max_new_tokens": 10, "do_sample": False}
    growing = model.generate(batch["input_ids"], **call)
    static = model.generate(batch["input_ids"], cache_implementation="static", **call)
    assert torch.equal(static, growing), f"{family}, decode {decode}"


@each_family
@pytest.mark.parametrize("static", [False, True])
@each_side
def test_chunked_prefill_is_one_prefill(family, static, side):
    model, inputs = patch(build(family), **SPARSE, decode="sparse"), padded(side)
    whole = model(**inputs).logits
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 11) if static else None
    parts, start = [], 0
    for size in (20, 1, 1, 17, 14):
        part = {name: x[:, start : start + size] for name, x in inputs.items()}
        if side != "none":
            part["attention_mask"] = inputs["attention_mask"][:, : start + size]
        with torch.no_grad():
            out = model(**part, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        parts.append(out.logits)
    kept = inputs.get("attention_mask", torch.ones(2, TOKENS)).bool()
    assert_close(torch.cat(parts, 1)[kept], whole[kept], f"{family}, static {static}, padding {side}")


@each_family
def test_decoding_reads_all_keys_or_the_chosen_blocks(family):
    ids = tokens(1)
    model = patch(build(family), **SPARSE)

    def last_token(decode: str, attention: str) -> Tensor:
        patch(model, **SPARSE, decode=decode)
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            set_attention(model, attention)
            return model(ids[:, -1:], past_key_values=cache).logits

    full = last_token("full", "full")
    assert torch.equal(last_token("full", "moba"), full), family
    sparse = last_token("sparse", "moba")
    assert (sparse - full).abs().max() > 1e-3, f"{family}: decode sparse read all keys"
    assert_close(sparse, last_token("sparse", "moba_naive"), family)


def test_a_sequence_that_fits_into_its_top_k_blocks_is_decoded_alike():
    model, ids = build(), tokens(1, 12)
    call = {"max_new_tokens": 3, "do_sample": False}
    before = model.generate(ids, **call)
    for decode in ("full", "sparse"):
        assert torch.equal(patch(model, **SPARSE, decode=decode).generate(ids, **call), before), decode


# Training


def test_attention_dropout_is_refused_in_training_but_not_by_the_specification():
    model, ids = build(), tokens()
    for attention in attentions(model):
        attention.attention_dropout = 0.5
    patch(model, **SPARSE)
    quiet = logits(model, ids)
    model.train()
    with pytest.raises(ValueError, match=r'dropout of 0\.5.*attention_dropout=0\.0.*"moba_naive"'):
        logits(model, ids)
    set_attention(model, "moba_naive")
    assert (logits(model, ids) - quiet).abs().max() > 1e-2, "no dropout"
    set_attention(model, "full")
    logits(model, ids)


@each_side
def test_attention_weights_are_refused_but_not_by_the_specification(side):
    model, inputs = patch(build("gpt_oss"), **SPARSE), padded(side)
    with pytest.raises(ValueError, match=r'output_attentions=True.*"moba_naive"'):
        model(**inputs, output_attentions=True)
    patch(model, **ALL_BLOCKS)
    set_attention(model, "moba_naive")
    naive = model(**inputs, output_attentions=True)
    plain = unpatch(model)(**inputs, output_attentions=True)
    real = inputs.get("attention_mask", torch.ones(2, TOKENS)).bool()[:, None].expand(-1, 4, -1)
    assert len(naive.attentions) == 4
    for layer, (weights, expected) in enumerate(zip(naive.attentions, plain.attentions)):
        assert_close(weights[real], expected[real], f"padding {side}, layer {layer}")


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_all_layers_and_decoded_tokens_have_attention_weights(decode):
    model, ids = patch(build(), **SPARSE, decode=decode, full_attention_layers=(0,)), tokens()
    set_attention(model, "moba_naive")
    out = model.generate(ids, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    assert [len(of_step) for of_step in out.attentions] == [4, 4, 4]
    drafts = model(ids, output_attentions=True, logits_to_keep=4, past_key_values=transformers.DynamicCache(config=model.config)).attentions
    for layer, weights in enumerate([*out.attentions[0], *drafts]):
        assert weights.shape == (2, 4, TOKENS, TOKENS)
        assert_close(weights.sum(-1), torch.ones(2, 4, TOKENS), f"sum of weights, {layer}")
        read = weights[..., : TOKENS - 3].ne(0).all(-1)  # of the queries from there on, all keys
        assert read[:, :, -4].all() == (layer % 4 == 0)
        assert read[:, :, -3:].all() == (layer % 4 == 0 or (layer >= 4 and decode == "full"))


def test_attention_weights_of_packed_sequences():
    model, ids = patch(build(), block_size=4, top_k=2), tokens(2, 30)
    position_ids = torch.tensor([[*range(12), *range(18)], [*range(29), 0]])
    call = {"position_ids": position_ids, "use_cache": False}
    with torch.no_grad():
        sparse = model(ids, **call).logits
        set_attention(model, "moba_naive")
        naive = model(ids, **call, output_attentions=True)
    assert_close(naive.logits, sparse, "logits")
    for weights in naive.attentions:
        assert weights.shape == (2, 4, 30, 30)
        assert_close(weights.sum(-1), torch.ones(2, 4, 30), "sum of weights")
        assert weights[0, :, 12:, :12].eq(0).all(), "a sequence sees the one before it"


# Switching


def test_layers_are_switched_at_any_time():
    model, ids = build(), tokens()
    full = logits(model, ids)
    patch(model, **SPARSE)
    sparse = logits(model, ids)
    set_attention(model, "full", layers=[0, 1, 2, 3])
    assert torch.equal(logits(model, ids), full)
    set_attention(model, "moba", layers=(-1, 1))
    some = logits(model, ids)
    set_attention(model, "moba")
    assert torch.equal(logits(model, ids), sparse)
    set_attention(model, "full", layers=[0, 2])
    assert torch.equal(logits(model, ids), some)
    assert torch.equal(logits(patch(model, **SPARSE, full_attention_layers=[0, -2]), ids), some)
    set_attention(model, "full")
    set_attention(model, "moba")
    assert torch.equal(logits(model, ids), some), "full_attention_layers hold when all layers are set"
    set_attention(model, "moba", layers=range(4))
    assert torch.equal(logits(model, ids), sparse), "layers that are named are set"


def test_patching_again_replaces_the_settings():
    model, ids = build(), tokens()
    state = snapshot(model)
    expected = logits(patch(copy.deepcopy(model), block_size=4, top_k=3), ids)
    patch(model, **SPARSE, full_attention_layers=[0])
    set_attention(model, "full", layers=[2])
    patch(model, MobaConfig(block_size=4, top_k=3))
    assert torch.equal(logits(model, ids), expected)
    assert snapshot(unpatch(model)) == state


def test_full_attention_lasts_as_long_as_its_block():
    model, ids = build(), tokens()
    full = logits(model, ids)
    state = snapshot(model)
    with full_attention(model) as same:
        assert same is model and torch.equal(logits(model, ids), full)
    assert snapshot(model) == state, "a model that is not patched"
    patch(model, **SPARSE)
    set_attention(model, "full", layers=[1])
    before = logits(model, ids)
    with pytest.raises(KeyError), full_attention(model), full_attention(model):
        assert torch.equal(logits(model, ids), full)
        raise KeyError
    assert torch.equal(logits(model, ids), before)


def test_set_attention_patches_a_model_that_is_not_patched():
    model, ids = build(), tokens()
    state, full = snapshot(model), logits(model, ids)
    set_attention(model, "full")
    assert snapshot(model) == state
    set_attention(model, "moba", layers=[3])
    assert model.config.moba == MobaConfig()
    assert_close(logits(model, ids), full, "all tokens fit into a block of the default size")


def test_copies_and_pickles_keep_the_settings():
    model, ids = patch(build(), **SPARSE), tokens()
    set_attention(model, "full", layers=[1])
    expected = logits(model, ids)
    for name, same in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert isinstance(same.config.moba, MobaConfig), name
        assert torch.equal(logits(same, ids), expected), name
        assert torch.equal(logits(unpatch(same), ids), logits(unpatch(copy.deepcopy(model)), ids)), name
    assert torch.equal(logits(model, ids), expected), "the original is still patched"


# Saving and loading


@each_family
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


@each_family
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


# What bad input gets


BAD_PATCHES = [
    ({"block_size": 0}, ValueError, "block_size must be an int of at least 1, but is 0"),
    ({"top_k": 2.0}, ValueError, "top_k must be an int"),
    ({"top_k": 2, "sink_blocks": 2}, ValueError, "top_k=2 has no room"),
    ({"share_selection": 1}, ValueError, "share_selection must be True or False, but is 1"),
    ({"decode": "dense"}, ValueError, "decode must be one of full, sparse, but is 'dense'"),
    ({"implementation": "cuda"}, ValueError, "implementation must be one of"),
    ({"topk": 2}, ValueError, "'topk' is no setting of MoBA: there are block_size, top_k"),
    ({"full_attention_layers": 3}, ValueError, "full_attention_layers must be a list or tuple of ints, but is 3"),
    ({"full_attention_layers": "1"}, ValueError, "full_attention_layers must be"),
    ({"full_attention_layers": [True]}, ValueError, "full_attention_layers must be"),
    ({"full_attention_layers": [4]}, ValueError, "full_attention_layers has 4, but LlamaForCausalLM .* 0 to 3"),
    ({"full_attention_layers": [0, -5]}, ValueError, "full_attention_layers has -5, but LlamaForCausalLM"),
    ({"config": MobaConfig(), "top_k": 2}, TypeError, "a MobaConfig or keywords, but got both"),
]


@pytest.mark.parametrize("settings, error, message", BAD_PATCHES, ids=[str(case[0]) for case in BAD_PATCHES])
@pytest.mark.parametrize("patched", [False, True])
def test_patch_refuses_bad_settings_and_leaves_the_model_as_it_was(settings, error, message, patched):
    model = build()
    if patched:
        set_attention(patch(model, **SPARSE), "full", layers=[1])
    state = snapshot(model)
    with pytest.raises(error, match=message):
        patch(model, **settings)
    assert snapshot(model) == state


@pytest.mark.parametrize("patched", [False, True])
def test_set_attention_refuses_what_it_cannot_set(patched):
    model = build("gemma2")
    if patched:
        patch(model, **SPARSE)
    state = snapshot(model)
    for arguments, message in (
        (("dense",), "attention must be one of moba, moba_naive, full, but is 'dense'"),
        (("moba", [0]), "layers has 0, but Gemma2ForCausalLM has the layers 1, 3"),
        (("full", [1, 7]), "layers has 7"),
        (("full", [-5]), "layers has -5"),
        (("full", 1), "layers must be a list or tuple of ints, but is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            set_attention(model, *arguments)
    assert snapshot(model) == state


def test_a_layer_index_of_loaded_settings_that_is_not_there_is_named():
    config = LlamaConfig(**SIZES, moba={"full_attention_layers": [9]}, attn_implementation="moba")
    with pytest.raises(ValueError, match="full_attention_layers has 9, but LlamaAttention has the layers 0 to 3"):
        transformers.LlamaForCausalLM(config)(tokens())


def test_masks_that_moba_cannot_follow_are_refused():
    model, ids = patch(build(), **SPARSE), tokens()
    hole = torch.ones_like(ids)
    hole[1, 20] = 0
    dense = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for name, call, message in (
        ("hole", lambda: model(ids, attention_mask=hole), "padding between real tokens"),
        ("4D", lambda: model(ids, attention_mask=dense), r"shape \(2, 1, 53, 53\).*pass a 2D attention_mask"),
        ("longer", lambda: model(ids, attention_mask=torch.ones(2, 60), use_cache=False), "53 queries and 53 keys"),
        (
            "only the new tokens",
            lambda: model(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache),
            "covers 2 tokens, but must cover all 55",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
            pytest.fail(f"{name} was taken")
    set_attention(model, "full")
    assert torch.equal(logits(model, ids, attention_mask=dense), logits(unpatch(model), ids, attention_mask=dense))


def test_custom_mask_functions_are_refused():
    model = patch(build(), **SPARSE)
    embeds = torch.zeros(2, TOKENS, 1)
    prefix = transformers.masking_utils.create_causal_mask(
        config=model.config,
        inputs_embeds=embeds,
        attention_mask=None,
        past_key_values=None,
        or_mask_function=lambda b, h, q, k: k < 5,
    )
    images = transformers.masking_utils.create_causal_mask(
        config=model.config,
        inputs_embeds=embeds,
        attention_mask=None,
        past_key_values=None,
        block_sequence_ids=torch.tensor([[-1] * 20 + [0] * 10 + [-1] * 23] * 2),
    )
    for mask, message in ((prefix, "custom mask function"), (images, "tokens see later ones")):
        with pytest.raises(ValueError, match=message):
            model(tokens(), attention_mask=mask)
    with full_attention(model):
        logits(model, tokens(), attention_mask=prefix)


def test_a_layer_called_alone_must_know_where_its_queries_lie():
    layer = attentions(patch(build(), **SPARSE))[0]
    attention = ALL_ATTENTION_FUNCTIONS["moba"]
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ValueError, match="3 queries, 9 keys and no mask"):
        attention(layer, query, key, key, None, scaling=1.0)
    with pytest.raises(ValueError, match="passes position_bias"):
        attention(layer, query, key, key, None, scaling=1.0, position_bias=query)
    out, weights = attention(layer, query, key[:, :, :3], key[:, :, :3], None, scaling=1.0)
    assert out.shape == (1, 3, 4, 8) and weights is None


def test_a_config_cannot_be_changed_in_place():
    settings = MobaConfig(**SPARSE)
    for change in (lambda: settings.update(top_k=3), lambda: settings.__setitem__("top_k", 3)):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert MobaConfig.from_dict(settings.to_dict()) == settings
    assert MobaConfig.from_dict({"top_k": 3, "full_attention_layers": [1]}).full_attention_layers == (1,)


# What it takes


class Operators(TorchDispatchMode):
    """The names of PyTorch's operators that are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def operators(model: nn.Module, **inputs) -> list[str]:
    with Operators() as called:
        logits(model, inputs)
    return called.names


@pytest.mark.parametrize("resolved", ["flex", "eager"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_prompt_that_reads_all_blocks_calls_the_operators_that_the_model_calls_without_moba(use_cache, resolved, monkeypatch):
    """On a GPU, and elsewhere unless "eager" is asked for."""
    monkeypatch.setattr("moba_flex.arguments.resolve_implementation", lambda *_: resolved)
    inputs = {"input_ids": tokens(), "use_cache": use_cache}
    model = build()
    expected = operators(model, **inputs)
    assert operators(patch(model, **{**ALL_BLOCKS, "implementation": "auto"}), **inputs) == expected
    assert operators(set_attention(model, "full"), **inputs) == expected
    if resolved == "eager":
        assert operators(patch(model, **ALL_BLOCKS), **inputs).count("moba_flex.attention.default") == model.config.num_hidden_layers
