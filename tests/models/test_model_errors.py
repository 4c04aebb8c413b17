"""Bad input to `patch`, `set_attention` and patched models: one sentence, and the model as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import SIZES, SPARSE, TOKENS, attentions, build, logits, snapshot, tokens
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex.config import MobaConfig
from moba_flex.models import full_attention, patch, set_attention, unpatch
from moba_flex.models.masks import moba_mask

BAD_PATCHES = [
    ({"block_size": 0}, ValueError, "block_size must be an int of at least 1, but is 0"),
    ({"top_k": 2.0}, ValueError, "top_k must be an int"),
    ({"top_k": 2, "sink_blocks": 2}, ValueError, "top_k=2 has no room"),
    ({"share_selection": 1}, ValueError, "share_selection must be True or False, but is 1"),
    ({"decode": "dense"}, ValueError, "decode must be one of full, sparse, but is 'dense'"),
    ({"implementation": "cuda"}, ValueError, "implementation must be one of"),
    ({"topk": 2}, ValueError, "'topk' is no setting of MoBA: there are block_size, top_k"),
    ({"full_attention_layers": 3}, ValueError, "full_attention_layers must be a list or tuple of ints, but is 3: write \\(3,\\)"),
    ({"full_attention_layers": "1"}, ValueError, "full_attention_layers must be"),
    ({"full_attention_layers": [True]}, ValueError, "full_attention_layers must be"),
    ({"full_attention_layers": [4]}, ValueError, "full_attention_layers has 4, but LlamaForCausalLM .* 0 to 3"),
    ({"full_attention_layers": [0, -5]}, ValueError, "full_attention_layers has -5, but LlamaForCausalLM"),
    ({"config": 3}, ValueError, "config must be a MobaConfig or a dict of its settings, but is 3"),
    ({"config": MobaConfig(), "top_k": 2}, TypeError, "config and settings exclude each other, but got both: config="),
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
        ("hole", lambda: model(ids, attention_mask=hole), "padding between real tokens in row 1: .* attention_mask=torch.ones_like"),
        ("4D", lambda: model(ids, attention_mask=dense), r"shape \(2, 1, 53, 53\).*pass a 2D attention_mask"),
        ("1D", lambda: model(ids, attention_mask=torch.ones(TOKENS)), r"with a batch of 2, but has the shape \(53,\)"),
        ("3D", lambda: model(ids, attention_mask=torch.ones(2, TOKENS, TOKENS)), r"must have the shape \(batch, tokens\).*\(2, 53, 53\)"),
        ("a row too many", lambda: model(ids, attention_mask=torch.ones(3, TOKENS)), r"attention_mask .*a batch of 2, .* \(3, 53\)"),
        ("a row for all", lambda: model(ids[:, -1:], attention_mask=torch.ones(1, TOKENS)), r"attention_mask .*a batch of 2, .* \(1, 53\)"),
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


def test_code_that_computes_with_the_mask_is_named():
    mask = moba_mask(2, 6, 6, config=LlamaConfig(attn_implementation="moba"))
    message = r"^the code of a model with a LlamaConfig computes with its attention mask, which MoBA does not build: the model cannot use"
    for compute in (lambda: torch.zeros(6) + mask, lambda: torch.cat([torch.zeros(6), mask]), lambda: torch.where(mask, 0.0, 1.0)):
        with pytest.raises(ValueError, match=message):
            compute()


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


OVERLAYS = {
    "an image": (lambda q, k: (k <= q) | ((q >= 6) & (k >= 6) & (q < 9) & (k < 9)), "tokens see later ones"),
    "two sequences": (lambda q, k: (k <= q) & ((q >= 7) == (k >= 7)), "custom mask function"),
    "new tokens apart": (lambda q, k: (k <= q) & ((q >= 4) == (k >= 4)), "custom mask function"),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_masks_behind_a_cache_that_are_not_plainly_causal_are_refused(overlay):
    sees, message = OVERLAYS[overlay]
    mask = moba_mask(2, 6, 10, 4, mask_function=lambda b, h, q, k: sees(q, k))
    with pytest.raises(ValueError, match=message):
        mask.visible(torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 10, 8))


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


def test_layers_that_do_not_say_which_they_are_cannot_be_named():
    model = build()
    for layer in attentions(model):
        layer.layer_idx = -1  # as in Zamba2, whose layers are told with each call
    state = snapshot(model)
    with pytest.raises(ValueError, match=r"full_attention_layers=\[1\], but no LlamaAttention says which layer it is: leave it out"):
        patch(model, **SPARSE, full_attention_layers=(1,))
    assert snapshot(model) == state


def test_a_version_whose_continuous_batching_hands_too_little_is_told(monkeypatch):
    monkeypatch.setattr("moba_flex.models.continuous_batching.BATCHES_CONTINUOUSLY", False)
    model = patch(build(), block_size=8)
    with pytest.raises(ValueError, match=r"needs transformers 5\.24 or newer, but this is .*: upgrade, call model\.generate"):
        model.generate_batch([[1, 2, 3]])
    assert model.config._attn_implementation == "moba"
