"""What patching promises for every class of transformers that can be built small, and that `patch` does not refuse.

A part of the classes runs with the other tests. All of them: `MOBA_SWEEP=all pytest -m sweep tests/models/test_sweep.py`; with `-rs` it
lists the classes that are refused or cannot be built.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from support.tiny_models import VOCABULARY, every_model, inputs_of
from torch import Tensor
from transformers import PreTrainedModel

from moba_flex.models import full_attention, patch, set_attention

SPARSE = {"block_size": 8, "top_k": 2}
ALL = os.environ.get("MOBA_SWEEP") == "all"
MODELS = every_model() if ALL else every_model()[::12]
pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(params=MODELS, ids=str, scope="module")
def built(request) -> PreTrainedModel:
    """The unpatched model; skipped if it cannot be built, called with tokens alone, or patched."""
    try:
        model = request.param.build()
        out = logits(model, tokens())
        assert out.shape[:2] == (2, 40) and out.isfinite().all()
    except Exception as error:
        pytest.skip(f"{request.param} cannot be built small or called with tokens alone: {type(error).__name__}")
    try:
        patch(copy.deepcopy(model), **SPARSE)
    except ValueError as error:
        pytest.skip(f"{type(model).__name__} is refused: {str(error)[:100]}")
    return model


@pytest.fixture
def model(built) -> PreTrainedModel:
    return copy.deepcopy(built)


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **call) -> Tensor:
    torch.manual_seed(0)
    return model(**{**inputs_of(model, ids), "use_cache": False, **call}).logits


def test_full_attention_is_the_unpatched_model_bit_for_bit(model):
    ids = tokens()
    before, name = logits(model, ids), type(model).__name__
    with full_attention(patch(model, **SPARSE)):
        assert torch.equal(logits(model, ids), before), f"{name} within full_attention"
    assert torch.equal(logits(set_attention(model, "full"), ids), before), f'{name} after set_attention(model, "full")'
    assert torch.equal(logits(patch(model, block_size=64, top_k=2), ids), before), f"{name} with one block"


def test_tokens_are_decoded_as_by_the_unpatched_model(model):
    ids = tokens()
    given = inputs_of(model, ids[:, :-1])
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"

    @torch.no_grad()
    def decoded() -> Tensor:
        torch.manual_seed(0)
        out = model(**given, use_cache=True)
        cache = {"past_key_values": out.past_key_values}
        return model(**{**given, key: ids[:, -1:]}, **cache, use_cache=True).logits

    try:
        before = decoded()
    except Exception as error:
        pytest.skip(f"{type(model).__name__} cannot go on from a cache so simply: {type(error).__name__}")
    patch(model, block_size=64, top_k=2)
    assert torch.equal(decoded(), before), type(model).__name__


def test_with_every_block_taken_a_model_is_the_unpatched_one(model):
    ids = tokens()
    before = logits(model, ids)
    found = logits(patch(model, block_size=8, top_k=100, implementation="eager"), ids)
    torch.testing.assert_close(found, before, rtol=2e-3, atol=2e-3 * float(before.abs().max()))


def test_moba_is_its_specification(model):
    ids = tokens()
    before = logits(model, ids)
    sparse = logits(patch(model, **SPARSE), ids)
    assert not torch.equal(sparse, before), f"{type(model).__name__} does not use MoBA"
    naive = logits(set_attention(model, "moba_naive"), ids)
    torch.testing.assert_close(naive, sparse, rtol=2e-3, atol=2e-3 * float(sparse.abs().max()))


def test_a_token_is_not_seen_by_those_before_it(model):
    ids, name = tokens(), type(model).__name__
    other = ids.clone()
    other[:, -1] = 3 + (other[:, -1] + 1) % (VOCABULARY - 3)

    def moves() -> float:
        return float((logits(model, ids) - logits(model, other))[:, :-1].abs().max())

    if moves() > 0:
        pytest.skip(f"{name} is not causal bit for bit without MoBA either")
    patch(model, **SPARSE)
    assert moves() < 1e-4 * float(logits(model, ids).abs().max()), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(model, side):
    if model.config.is_encoder_decoder:
        pytest.skip("padding of the decoder has other arguments")
    ids, short = tokens(), 29
    alone, mask = ids[1:, :short].clone(), torch.ones_like(ids)
    real = slice(0, short) if side == "right" else slice(40 - short, 40)
    ids[1], mask[1] = 0, 0
    ids[1, real], mask[1, real] = alone[0], 1
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def gap() -> float:
        together = logits(model, ids, attention_mask=mask, position_ids=position)[1:, real]
        expected = logits(model, alone)
        return float((together - expected).abs().max() / expected.abs().max())

    try:
        before = gap()
    except Exception as error:
        pytest.skip(f"{type(model).__name__} takes no padding so simply: {type(error).__name__}")
    if before > 1e-3:
        pytest.skip(f"{type(model).__name__} does not ignore padding without MoBA either")
    patch(model, **SPARSE)
    assert gap() < 2e-3, f"{type(model).__name__}, padding on the {side}"


def test_one_step_of_training_has_the_gradients_of_the_specification(model):
    ids = tokens()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradient() -> Tensor:
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs_of(model, ids), use_cache=False).logits.float().logsumexp(-1).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    patch(model, **SPARSE)
    sparse = gradient()
    assert sparse.isfinite().all() and sparse.norm() > 0
    naive = (set_attention(model, "moba_naive"), gradient())[1]
    assert float((naive - sparse).norm() / sparse.norm()) < 5e-3, type(model).__name__
