"""The promises of `patch` on a real model: SmolLM2-135M-Instruct, 9 query heads on 3 key heads."""

from __future__ import annotations

import copy
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapt import loss_of
from llama import ADAPTER, parse, settings_of, with_adapter
from torch import Tensor

import moba_flex

pytestmark = pytest.mark.weights
SPARSE = {"block_size": 32, "top_k": 4, "sink_blocks": 1}
TOKENS = 263  # divides into nothing


@pytest.fixture
def model(smollm2):
    yield smollm2[0].eval()
    moba_flex.unpatch(smollm2[0])


@pytest.fixture(scope="module")
def prompt(smollm2) -> Tensor:
    """`[1, TOKENS]` of source code that every Python brings along."""
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    return smollm2[1](text, return_tensors="pt")["input_ids"][:, :TOKENS]


@torch.no_grad()
def logits(model, ids: Tensor, **more) -> Tensor:
    return model(ids, **more).logits


@pytest.fixture(scope="module")
def full(smollm2, prompt) -> Tensor:
    """What the unpatched model says of the prompt."""
    return logits(smollm2[0].eval(), prompt)


def test_every_block_taken_is_full_attention(model, prompt, full):
    moba_flex.patch(model, block_size=32, top_k=TOKENS)
    torch.testing.assert_close(logits(model, prompt), full, rtol=1e-3, atol=1e-3)


def test_sparse_equals_the_specification_and_is_not_full_attention(model, prompt, full):
    moba_flex.patch(model, **SPARSE)
    sparse = logits(model, prompt)
    moba_flex.set_attention(model, "moba_naive")
    torch.testing.assert_close(sparse, logits(model, prompt), rtol=1e-3, atol=1e-3)
    assert (sparse - full).abs().max() > 0.5


def test_unpatched_is_as_before_bit_for_bit(model, prompt, full):
    settings = model.config.to_dict()
    moba_flex.patch(model, **SPARSE)
    logits(model, prompt)
    moba_flex.unpatch(model)
    assert torch.equal(logits(model, prompt), full)
    assert model.config.to_dict() == settings


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_generation_in_a_padded_batch_is_generation_alone(model, prompt, decode):
    moba_flex.patch(model, **SPARSE, decode=decode)
    short, pad = prompt[:, -190:], TOKENS - 190
    batch = torch.cat([prompt, torch.nn.functional.pad(short, (pad, 0), value=model.config.eos_token_id)])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)[:, TOKENS:]
    for row, ids in zip(together, (prompt, short)):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        assert torch.equal(row, alone)


def test_saving_and_loading_keep_settings_and_answers(model, prompt, tmp_path):
    config = copy.deepcopy(model.config)
    del config.quantization_config  # transformers saves no model that it read from a GGUF file, so this is one like it
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    moba_flex.patch(plain, **SPARSE, full_attention_layers=(-1,))
    plain.save_pretrained(tmp_path)
    loaded = moba_flex.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.moba == plain.config.moba
    assert torch.equal(logits(loaded, prompt), logits(plain, prompt))


def test_the_adapter_of_the_repository_makes_a_model_with_moba_read_better(smollm2, prompt):
    """With the settings that it was trained with, but blocks so small that a short prompt has more than are read."""
    model, ids = copy.deepcopy(smollm2[0]), prompt[0]
    settings = replace(settings_of(parse(["--adapted"])), block_size=8)
    assert settings.block_size * settings.top_k < len(ids)  # so that something is left out
    before = loss_of(moba_flex.patch(model, settings), ids)
    moba_flex.unpatch(model)
    after = loss_of(moba_flex.patch(with_adapter(model, ADAPTER), settings), ids)
    assert after < before
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) < 10e6
