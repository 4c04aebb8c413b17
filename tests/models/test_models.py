"""What `patch` and its companions promise beyond what each family of models must show (test_families.py)."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support.families import (
    ALL_BLOCKS,
    FAMILIES,
    SPARSE,
    TOKENS,
    assert_close,
    attentions,
    build,
    each_decode,
    each_of_four,
    each_side,
    logits,
    padded,
    snapshot,
    tokens,
)
from support.small_models import loaded, names, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex.config import MobaConfig
from moba_flex.models import full_attention, patch, set_attention, unpatch
from moba_flex.models import masks as mask_module

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
    dense, numbers = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], mask_module.read_visible
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda **kwargs: built.append(1) or dense(**kwargs))
    monkeypatch.setattr(mask_module, "read_visible", lambda *given: read.append(1) or numbers(*given))
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


@each_of_four
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


@each_of_four
@each_decode
def test_generation_with_a_static_cache_is_generation_with_a_growing_one(family, decode):
    model, batch = patch(build(family), **SPARSE, decode=decode), padded("left", (TOKENS, 30))
    call = {"attention_mask": batch["attention_mask"], "max_new_tokens": 10, "do_sample": False}
    growing = model.generate(batch["input_ids"], **call)
    static = model.generate(batch["input_ids"], cache_implementation="static", **call)
    assert torch.equal(static, growing), f"{family}, decode {decode}"


@each_of_four
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


@each_of_four
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


@pytest.mark.parametrize(
    "name", ["StableLmForCausalLM", "OPTForCausalLM", "PersimmonForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM"]
)
@torch.no_grad()
def test_a_model_that_does_not_tell_its_layers_of_attention_weights_refuses_or_returns_them(name):
    model, ids = small_model(*loaded(name, *names()[name])[1:], "eager"), tokens()
    plain = model(ids, output_attentions=True).attentions
    patch(model, **SPARSE)
    with pytest.raises(ValueError, match=r'output_attentions=True.*"moba_naive"'):
        model(ids, output_attentions=True)
    patch(model, **ALL_BLOCKS, full_attention_layers=[0])
    set_attention(model, "moba_naive")
    naive = model(ids, output_attentions=True).attentions
    assert len(naive) == len(plain)
    for layer, (weights, expected) in enumerate(zip(naive, plain)):
        assert_close(weights, expected, f"layer {layer}")
    assert not model(ids, output_attentions=False).attentions


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
    monkeypatch.setattr("moba_flex.core.validation.resolve_implementation", lambda *_: resolved)
    inputs = {"input_ids": tokens(), "use_cache": use_cache}
    model = build()
    expected = operators(model, **inputs)
    assert operators(patch(model, **{**ALL_BLOCKS, "implementation": "auto"}), **inputs) == expected
    assert operators(set_attention(model, "full"), **inputs) == expected
    if resolved == "eager":
        assert operators(patch(model, **ALL_BLOCKS), **inputs).count("moba_flex.attention.default") == model.config.num_hidden_layers
