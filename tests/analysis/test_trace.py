"""`moba_flex.trace`: its numbers against a count by hand of what `select_blocks` says, and the model left as it was."""

from __future__ import annotations

import math
import weakref
from functools import wraps
from itertools import pairwise

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from support.cases import assert_same
from torch import Tensor
from transformers import BertConfig, BertModel, Gemma2Config, LlamaConfig, PreTrainedModel

import moba_flex
from moba_flex import Selection, patch, select_blocks, set_attention, trace
from moba_flex.analysis import trace as trace_module
from moba_flex.models import attention_function
from moba_flex.models.state import LayerState, state_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # attention of weights as small as the default is all but uniform, whatever it reads
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SPARSE = {"block_size": 4, "top_k": 3, "sink_blocks": 1}
TOKENS = 37
each_side = pytest.mark.parametrize("side", ["none", "left", "right"])


@pytest.fixture(autouse=True)
def _no_progress_bar():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def build(config: type = LlamaConfig, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **changes}), attn_implementation="eager").eval()


def batch(side: str = "none", lengths: tuple[int, ...] = (TOKENS, 22, 1)) -> dict[str, Tensor]:
    """Rows of tokens with `lengths` real ones."""
    ids = torch.randint(2, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    if side == "none":
        return {"input_ids": ids}
    place = torch.arange(max(lengths))
    place = place.flip(0) if side == "left" else place
    mask = (place < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_it_prints_as_a_table_with_a_line_for_each_layer():
    model = build()
    lines = str(trace(model, **batch(), **SPARSE, full_attention_layers=[0], selections=[-1])).splitlines()
    assert lines[0] == "Trace of 3 MoBA layers, 4 heads, 10 blocks"
    assert lines[1].split("  ") == ["layer", "keys read", "overlap", "overlap of heads", "block chosen most"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert all(line.endswith("0 (100%)") for line in lines[2:5]), "the sink"
    assert lines[5:] == ["selections of 3"]
    assert "nan" not in str(trace(model, torch.ones(1, 3, dtype=torch.int64), block_size=4, top_k=1))


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


# The numbers


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
    share, overlap, chosen, candidates = trace_module.numbers(selection)
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


def test_the_selections_asked_for_are_kept(monkeypatch):
    model = patch(build(), **SPARSE)
    found = trace(model, **batch("left"), selections=[1, -1])
    by_hand = selections_by_hand(model, batch("left"), monkeypatch, **SPARSE)
    assert list(found.selections) == [1, 3]
    for layer, selection in found.selections.items():
        assert torch.equal(selection.indices, by_hand[layer].indices)
        assert torch.equal(selection.block_of_key, by_hand[layer].block_of_key)


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


# The model afterwards


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

        monkeypatch.setattr(trace_module, "numbers", fail)
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
        ({"attention_mask": torch.ones(3, 5)}, ValueError, ["attention_mask", "(3, 5)", "(3, 37)"]),
        ({"attention_mask": [[1]]}, TypeError, ["attention_mask", "list"]),
        ({"attention_mask": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, TypeError, ["attention_mask", "nested"]),
        ({"top_k": 0}, ValueError, ["top_k", "0"]),
        ({"topk": 2}, ValueError, ["topk"]),
        ({"config": {"top_k": 2}, "top_k": 2}, TypeError, ["top_k", "both"]),
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


@pytest.mark.parametrize("decode", ["full", "sparse"])
def test_hooks_that_only_a_trace_needed_are_taken_away(decode):
    model = patch(build(), **SPARSE, decode=decode)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    trace(model, **batch(), decode="sparse" if decode == "full" else "full", block_size=8)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before


def test_a_model_without_moba_layers_says_so():
    bert = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="BertModel"):
        trace(bert, **batch())
    model = set_attention(patch(build(), **SPARSE), "full")
    with pytest.raises(ValueError, match="full attention now"):
        trace(model, **batch())
    with pytest.raises(TypeError, match="model must be"):
        trace("llama", **batch())


def test_the_package_exports_it():
    assert moba_flex.trace is trace and moba_flex.Trace is trace_module.Trace


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
