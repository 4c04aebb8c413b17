"""`moba_flex.trace`: its numbers against a count by hand of what `select_blocks` says, and the forms in which it gives them."""

from __future__ import annotations

import math
from functools import wraps
from itertools import pairwise

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from support.cases import assert_same
from support.traced_models import SIZES, SPARSE, TOKENS, batch, build
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, PreTrainedModel

from moba_flex import Selection, patch, select_blocks, set_attention, trace
from moba_flex.analysis import trace as trace_module
from moba_flex.models import attention_function

pytestmark = pytest.mark.usefixtures("no_progress_bar")
each_side = pytest.mark.parametrize("side", ["none", "left", "right"])


def selections_by_hand(model: PreTrainedModel, inputs: dict[str, Tensor], monkeypatch, **blocks) -> list[Selection]:
    """What `select_blocks` says of the queries and keys that reach the operation, one a layer."""
    seen = []

    def record(query: Tensor, key: Tensor, value: Tensor, *settings, **given) -> tuple[Tensor, ...]:
        seen.append(select_blocks(query, key, padding_mask=given["padding_mask"], **blocks))
        return attend(query, key, value, *settings, **given)

    attend = attention_function.attend
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(attention_function, "attend", record)
        model(**inputs)
    return seen


def counted(selection: Selection, block_size: int, top_k: int) -> dict[str, Tensor]:
    """The numbers of one layer, query by query from the dense selection."""
    dense, of_key = selection.to_dense(), selection.block_of_key
    rows, heads, n_query, n_blocks = dense.shape
    share, overlap = torch.zeros(heads).double(), torch.zeros(heads).double()
    chosen, candidates = torch.zeros(heads, n_blocks).long(), torch.zeros(n_blocks).long()
    for head in range(heads):
        read = visible = 0
        shared = []
        for row in range(rows):
            tokens = [token for token in range(n_query) if of_key[row, token] >= 0]
            picks = {}
            for token in tokens:
                own = int(of_key[row, token])
                before = [t for t in tokens if t <= token]
                read += sum(bool(dense[row, head, token, of_key[row, t]]) for t in before)
                visible += len(before)
                picks[token] = {block for block in range(n_blocks) if dense[row, head, token, block]} - {own}
                for block in range(own):
                    chosen[head, block] += block in picks[token]
                    candidates[block] += head == 0
            for one, other in pairwise(tokens):
                own = int(of_key[row, one])
                if own == of_key[row, other] and own > top_k - 1:
                    shared.append(len(picks[one] & picks[other]) / (top_k - 1))
        share[head] = read / visible
        overlap[head] = sum(shared) / len(shared) if shared else math.nan
    return {"share_of_keys": share, "overlap": overlap, "chosen": chosen, "candidates": candidates}


@each_side
@pytest.mark.parametrize("config", [LlamaConfig, Gemma2Config], ids=lambda c: c.__name__)
def test_the_numbers_are_those_of_select_blocks_counted_by_hand(config, side, monkeypatch):
    model = patch(build(config), **SPARSE)
    inputs = batch(side)
    found = trace(model, **inputs)
    by_hand = selections_by_hand(model, inputs, monkeypatch, **SPARSE)
    assert found.layers == ((0, 1, 2, 3) if config is LlamaConfig else (1, 3)), "Gemma 2 has sliding windows in layers 0 and 2"
    assert len(by_hand) == len(found.layers)
    for i, selection in enumerate(by_hand):
        expected = counted(selection, SPARSE["block_size"], SPARSE["top_k"])
        case = f"layer {found.layers[i]}, padding {side}"
        assert_same(found.share_of_keys[i], expected["share_of_keys"], f"{case}, share_of_keys")
        torch.testing.assert_close(found.overlap[i], expected["overlap"], equal_nan=True, msg=lambda m, case=case: f"{case}, overlap: {m}")
        assert torch.equal(found.chosen[i], expected["chosen"]), case
        assert torch.equal(found.candidates, expected["candidates"]), case
    assert found.overlap.isfinite().all()


def test_the_share_of_keys_follows_from_the_lengths_alone():
    found = trace(build(), **batch("right", (16, 6)), block_size=4, top_k=2)
    # By blocks of 4: own keys 1 to 4 and one whole past block if there is one, over all keys up to the query.
    read = 10 + 3 * (10 + 4 * 4) + 10 + (1 + 2 + 2 * 4)
    assert_same(found.share_of_keys, torch.full((4, 4), read / (16 * 17 / 2 + 6 * 7 / 2), dtype=torch.float64))


@each_side
def test_a_padded_batch_counts_what_its_rows_count_alone(side):
    model, lengths = patch(build(), **SPARSE), (TOKENS, 22, 9)
    inputs = batch(side, lengths)
    found = trace(model, **inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    alone = [trace(model, ids[real][None]) for ids, real in zip(inputs["input_ids"], mask)]
    for of_row in alone:
        n = of_row.chosen.shape[2]
        found.chosen[:, :, :n] -= of_row.chosen
        found.candidates[:n] -= of_row.candidates
    assert not found.chosen.any() and not found.candidates.any()


def test_without_a_causal_mask_all_blocks_are_options():
    query, key = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
    selection = select_blocks(query, key, block_size=4, top_k=3, causal=False, padding_mask=mask)
    share, overlap, chosen, candidates = trace_module.layer_statistics(selection)
    dense = selection.to_dense()
    assert torch.equal(chosen, dense.sum((0, 2)))
    assert torch.equal(candidates, torch.tensor([47] * 5 + [30] * 3)), "the second row has 17 queries and 5 blocks"
    for head in range(4):
        read = sum(int(dense[row, head, :, t // 4].sum()) for row, length in enumerate((30, 17)) for t in range(length))
        assert share[head].item() == pytest.approx(read / (30**2 + 17**2))
        pairs = [(row, i) for row, length in enumerate((30, 17)) for i in range(length - 1)]
        shared = [int((dense[row, head, i] & dense[row, head, i + 1]).sum()) / 3 for row, i in pairs]
        assert overlap[head].item() == pytest.approx(sum(shared) / len(shared))


def test_top_k_1_and_short_inputs_have_no_choice():
    for settings in ({"block_size": 4, "top_k": 1}, {"block_size": 64, "top_k": 8}):
        found = trace(build(), **batch(), **settings)
        assert found.overlap.isnan().all() and not found.chosen.any(), settings
    assert (found.share_of_keys == 1).all()


def test_a_forced_block_is_taken_by_every_query_that_can():
    found = trace(build(), **batch(), block_size=4, top_k=3, sink_blocks=1)
    assert (found.chosen[:, :, 0] == found.candidates[0]).all()
    assert (found.chosen[:, :, 5] < found.candidates[5]).any()


def test_layers_with_full_attention_are_left_out():
    model = patch(build(), **SPARSE, full_attention_layers=[-1])
    assert trace(model, **batch()).layers == (0, 1, 2)
    set_attention(model, "full", layers=[1])
    assert trace(model, **batch()).layers == (0, 2)


def test_settings_replace_the_models_own_for_one_pass():
    model = patch(build(), block_size=8, top_k=2)
    before = trace(model, **batch())
    other = trace(model, **batch(), **SPARSE)
    fresh = trace(build(), **batch(), config=SPARSE)
    assert other.chosen.shape != before.chosen.shape
    assert torch.equal(other.chosen, fresh.chosen)
    assert torch.equal(trace(model, **batch()).chosen, before.chosen)


def test_virtual_tokens_are_read_too():
    torch.manual_seed(0)
    model = patch(transformers.LlamaForCausalLM(LlamaConfig(**SIZES)), **SPARSE)
    ids = torch.randint(2, 64, (1, TOKENS))
    alone = trace(model, ids)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    assert trace(tuned, ids).chosen.shape[2] == -(-(TOKENS + 9) // 4)
    with tuned.disable_adapter():
        assert torch.equal(trace(model, ids).chosen, alone.chosen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_as_on_a_cpu():
    model, inputs = patch(build(), block_size=16, top_k=3), batch("left", (200, 90))
    expected = trace(model, **inputs)
    found = trace(model.cuda(), **{name: x.cuda() for name, x in inputs.items()})
    assert_same(found.share_of_keys, expected.share_of_keys)
    assert torch.equal(found.candidates, expected.candidates)
    differ = (found.chosen - expected.chosen).abs().sum() / expected.chosen.sum()
    assert differ < 0.01, "but for choices between scores that differ in the last bits"


# What a trace holds


def test_the_selections_asked_for_are_kept(monkeypatch):
    model = patch(build(), **SPARSE)
    found = trace(model, **batch("left"), selections=[1, -1])
    by_hand = selections_by_hand(model, batch("left"), monkeypatch, **SPARSE)
    assert list(found.selections) == [1, 3]
    for layer, selection in found.selections.items():
        assert torch.equal(selection.indices, by_hand[layer].indices)
        assert torch.equal(selection.block_of_key, by_hand[layer].block_of_key)


def test_far_more_blocks_than_there_are_take_no_more_memory(monkeypatch):
    model, inputs, asked = patch(build(), block_size=16, top_k=10**9), batch("left", (200, 90)), []
    select = trace_module.select_blocks
    monkeypatch.setattr(
        trace_module, "select_blocks", wraps(select)(lambda *args, **blocks: asked.append(blocks["top_k"]) or select(*args, **blocks))
    )
    found = trace(model, **inputs, selections=[0])
    assert set(asked) == {13}  # blocks of 200 tokens
    assert_same(found.share_of_keys, trace(patch(model, block_size=16, top_k=13), **inputs).share_of_keys)
    assert found.selections[0].indices.device.type == "cpu"


def test_it_prints_as_a_table_with_a_line_for_each_layer():
    model = build()
    lines = str(trace(model, **batch(), **SPARSE, full_attention_layers=[0], selections=[-1])).splitlines()
    assert lines[0] == "Trace of 3 MoBA layers, 4 heads, 10 blocks"
    assert lines[1].split("  ") == ["layer", "keys read", "overlap", "overlap of heads", "block chosen most"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert all(line.endswith("0 (100%)") for line in lines[2:5]), "the sink"
    assert lines[5:] == ["selections of 3"]
    assert "nan" not in str(trace(model, torch.ones(1, 3, dtype=torch.int64), block_size=4, top_k=1))


def test_to_dict_is_ready_for_a_data_frame():
    found = trace(build(), **batch(), **SPARSE)
    columns = found.to_dict()
    assert list(columns) == ["layer", "head", "share_of_keys", "overlap", "block", "chosen", "candidates"]
    assert {len(column) for column in columns.values()} == {found.chosen.numel()}
    for layer, head, share, overlap, block, chosen, candidates in zip(*columns.values()):
        i = found.layers.index(layer)
        assert (share, overlap) == (found.share_of_keys[i, head], found.overlap[i, head])
        assert (chosen, candidates) == (found.chosen[i, head, block], found.candidates[block])
    assert {type(x) for column in columns.values() for x in column} == {int, float}
    rows = zip(columns["layer"], columns["head"], columns["block"])
    assert len(set(rows)) == found.chosen.numel()
