"""Rows of a batch, padded or packed, are the sequences alone: a patched model never lets one see another."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, HYBRID, TOKENS, assert_close, build, gradients, logits, padded, tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DataCollatorWithFlattening, StaticCache
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

from moba_flex.models import attention_function, patch, set_attention
from moba_flex.models.masks import MobaMask, moba_mask

LENGTHS = (13, 1, 26)
TELLS_PACKED = [family for family in FAMILIES if family != "gpt_oss"]  # transformers' GPT-OSS makes its mask without position_ids
HAS_FULL_LAYERS_ONLY = [family for family in FAMILIES if family not in HYBRID]


@pytest.mark.parametrize("masked", [False, True])
def test_models_without_values_give_shapes(masked):
    """On the meta device and in FakeTensorMode, whose tensors have nothing to read."""
    ids = tokens()
    given = {"attention_mask": torch.ones_like(ids)} if masked else {}
    wanted = logits(patched(), ids, **given).shape
    meta = {name: x.to("meta") for name, x in given.items()}
    assert logits(patched().to("meta"), ids.to("meta"), **meta).shape == wanted
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = {name: torch.ones(x.shape, dtype=x.dtype) for name, x in given.items()}
        assert logits(patched(), torch.zeros(ids.shape, dtype=ids.dtype), **fake).shape == wanted


def patched(family: str = "llama", **settings) -> nn.Module:
    return patch(build(family), **{"block_size": 4, "top_k": 2, **settings})


def flattened(sequences: list[Tensor], **options) -> dict[str, Tensor]:
    """What transformers' collator makes of sequences for training without padding."""
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": sequence} for sequence in sequences])
    del batch["labels"]
    return batch


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return list(tokens(1, sum(lengths))[0].split(lengths))


def alone(model: nn.Module, parts: list[Tensor]) -> Tensor:
    return torch.cat([logits(model, part[None])[0] for part in parts])


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_rows_alone(side):
    model = patched(block_size=8)
    inputs = padded(side, (TOKENS, 30, 17))
    out, kept = model(**inputs).logits, inputs["attention_mask"].bool()
    for row in range(3):
        assert_close(out[row, kept[row]], logits(model, inputs["input_ids"][row, kept[row]][None])[0], f"padding {side}, row {row}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_padding_alone_changes_nothing_and_has_finite_gradients(side):
    model = patched(block_size=8).train()
    inputs = padded(side, (30, 0, TOKENS))
    assert not inputs["attention_mask"][1].any()
    out = model(**inputs).logits
    assert out.isfinite().all(), f"padding {side}"
    rest = {name: x[[0, 2]] for name, x in inputs.items()}
    kept = rest["attention_mask"].bool()
    assert_close(out[[0, 2]][kept], model(**rest).logits[kept], f"padding {side}")
    assert all(gradient.isfinite().all() for gradient in gradients(model, inputs).values()), f"padding {side}"


def test_a_batch_of_padding_alone_has_finite_logits():
    ids, mask = tokens(), torch.zeros(2, TOKENS)
    for attention in ("moba", "moba_naive"):
        assert set_attention(patched(), attention)(ids, attention_mask=mask).logits.isfinite().all(), attention


# Packed sequences


@pytest.mark.parametrize("family", TELLS_PACKED)
def test_sequences_packed_by_position_ids_are_the_sequences_alone(family):
    model, parts = patched(family), sequences()
    batch = flattened(parts)
    assert batch.keys() == {"input_ids", "position_ids"}
    expected = alone(model, parts)
    assert_close(logits(model, batch, use_cache=False)[0], expected, family)
    set_attention(model, "moba_naive")
    assert_close(logits(model, batch, use_cache=False)[0], expected, f"{family}, moba_naive")


@pytest.mark.parametrize("family", TELLS_PACKED)
def test_sequences_packed_by_cu_seq_lens_are_the_sequences_alone(family):
    model, parts = patched(family), sequences()
    batch = flattened(parts, return_flash_attn_kwargs=True)
    assert batch["cu_seq_lens_q"].tolist() == [0, 13, 14, 40]
    assert_close(logits(model, batch, use_cache=False)[0], alone(model, parts), family)


@pytest.mark.parametrize("family", HAS_FULL_LAYERS_ONLY)
@pytest.mark.parametrize("cached", [False, True])
def test_cu_seq_lens_need_no_position_ids_that_restart(family, cached):
    """Rotary positions are relative, so sequences are the same wherever their positions begin."""
    model, parts = patched(family), sequences()
    batch = flattened(parts, return_flash_attn_kwargs=True, return_position_ids=False)
    assert_close(logits(model, batch, use_cache=cached)[0], alone(model, parts), f"{family}, use_cache {cached}")


def test_several_rows_may_hold_several_sequences_each():
    model, ids = patched(), tokens(2, 40)
    lengths = ((13, 1, 26), (40,))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    bounds = torch.tensor([0, 13, 14, 40, 80], dtype=torch.int32)
    expected = torch.stack([alone(model, row.split(sizes)) for row, sizes in zip(ids, lengths)])
    for name, packing in (("position_ids", {"position_ids": position_ids}), ("cu_seq_lens", {"cu_seq_lens_q": bounds})):
        assert_close(logits(model, ids, use_cache=False, **packing), expected, name)


@pytest.mark.parametrize("bounds", [[0, 0, 13, 13, 14, 40, 40], [0, 13, 14, 40, 40, 40]])
def test_empty_sequences_among_packed_ones_change_nothing(bounds):
    model, parts = patched(), sequences()
    ids, bounds = torch.cat(parts)[None], torch.tensor(bounds, dtype=torch.int32)
    for attention in ("moba", "moba_naive"):
        set_attention(model, attention)
        assert_close(logits(model, ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)[0], alone(model, parts), attention)


def test_cu_seq_lens_go_before_position_ids():
    """As in transformers' FlashAttention: a trainer may count a padded end as one sequence, whatever its positions are."""
    model, parts = patched(), sequences()
    position_ids = torch.cat([torch.arange(13), torch.zeros(1).long(), torch.arange(20), torch.zeros(6).long()])[None]
    packing = {"position_ids": position_ids, "cu_seq_lens_q": torch.tensor([0, 13, 14, 40])}
    out = logits(model, torch.cat(parts)[None], use_cache=False, **packing)[0]
    expected = alone(model, parts[:2])
    assert_close(out[:14], expected, "the first two")
    last = logits(model, parts[2][None], position_ids=position_ids[:, 14:], cu_seq_lens_q=torch.tensor([0, 26]), use_cache=False)[0]
    assert_close(out[14:], last, "the last")


@pytest.mark.parametrize("packed_by", ["position_ids", "cu_seq_lens"])
def test_gradients_of_packed_sequences_are_the_sum_of_their_own(packed_by):
    model, parts = patched().train(), sequences()
    for parameters in model.parameters():
        parameters.data *= 0.3
    batch = flattened(parts, return_flash_attn_kwargs=packed_by == "cu_seq_lens")
    weights = torch.randn(1, 40, 64)

    def step(weights: Tensor, **inputs) -> dict[str, Tensor]:
        model.zero_grad()
        (model(**inputs, use_cache=False).logits * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed = step(weights, **batch)
    singly = [step(weight, input_ids=part[None]) for weight, part in zip(weights.split(LENGTHS, 1), parts)]
    for name, gradient in packed.items():
        assert_close(gradient, sum(part[name] for part in singly), f"{packed_by}, {name}")


BAD_BOUNDS = [
    ([0, 13, 39], {}, ValueError, r"cu_seq_lens_q must start at 0, never fall and end at 40 .* \[0, 13, 39\]"),
    ([1, 13, 40], {}, ValueError, r"cu_seq_lens_q must start at 0"),
    ([0, 14, 13, 40], {}, ValueError, r"cu_seq_lens_q must start at 0, never fall"),
    ([[0, 40]], {}, ValueError, r"cu_seq_lens_q must have one dimension"),
    ([0.0, 40.0], {}, TypeError, r"cu_seq_lens_q must be int32, but is torch.float32"),
    ([0, 13, 40], {"cu_seq_lens_k": torch.tensor([0, 14, 40])}, ValueError, r"cu_seq_lens_k must equal cu_seq_lens_q"),
    ([0, 13, 40], {"attention_mask": torch.arange(40)[None] > 3}, ValueError, r"attention_mask has padding, but cu_seq_lens_q"),
]


@pytest.mark.parametrize("bounds, others, error, message", BAD_BOUNDS, ids=[case[3][:40] for case in BAD_BOUNDS])
def test_cu_seq_lens_that_do_not_fit_are_refused(bounds, others, error, message):
    model = patched()
    with pytest.raises(error, match=message):
        model(tokens(1, 40), cu_seq_lens_q=torch.tensor(bounds), **others)


def test_cu_seq_lens_are_refused_beside_cached_tokens():
    model = patched()
    cache = StaticCache(config=model.config, max_cache_len=64)
    bounds = torch.tensor([0, 5, 20])
    packed = logits(model, tokens(1, 20), past_key_values=cache, cu_seq_lens_q=bounds)
    assert_close(packed, logits(model, tokens(1, 20), cu_seq_lens_q=bounds, use_cache=False), "an empty static cache")
    with pytest.raises(ValueError, match="without cached keys, but there are 20 queries and 40 keys"):
        model(tokens(1, 20), past_key_values=cache, cu_seq_lens_q=bounds)


def test_packed_sequences_that_read_every_block_keep_out_of_attention_that_does_not_know_them(monkeypatch):
    """A prompt that reads every block gets the attention that the layer had before, which knows nothing of `cu_seq_lens_q`."""
    calls = []
    monkeypatch.setattr(attention_function, "_attend", lambda query, *rest: calls.append("MoBA") or torch.zeros_like(query))
    monkeypatch.setattr(attention_function, "_original", lambda call: (calls.append("original") or call.query.transpose(1, 2), None))
    model, ids = patched(block_size=64), tokens(1, 40)
    logits(model, ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 13, 40], dtype=torch.int32))
    n_layers = model.config.num_hidden_layers
    assert calls == ["MoBA"] * n_layers
    logits(model, ids, use_cache=False)
    assert calls == ["MoBA"] * n_layers + ["original"], "later layers repeat the first one's call"


def test_a_model_that_could_join_the_tokens_of_an_image_takes_padded_text():
    """Its mask function is a custom one all the same, which joins nothing here."""
    ids = torch.zeros(2, 12, dtype=torch.int64)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    empty = torch.empty(2, 1, 12, 0)

    def mask(groups: torch.Tensor) -> MobaMask:
        joined = or_masks(causal_mask_function, blockwise_overlay(groups))
        return moba_mask(2, 12, 12, mask_function=joined, attention_mask=padding.bool())

    visible = mask(torch.full_like(ids, -1)).visible(empty, empty)
    assert visible.causal and visible.starts == (5, 0) and torch.equal(visible.padding_mask, padding.bool())
    image = torch.full_like(ids, -1)
    image[:, 6:9] = 0
    with pytest.raises(ValueError, match="tokens see later ones"):
        mask(image).visible(empty, empty)
