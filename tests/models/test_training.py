"""A patched model trains as any model does: with Trainer, checkpointed activations, LoRA, autocast, torch.compile and accelerate."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from support.families import ALL_BLOCKS, SPARSE, TOKENS, assert_close, attentions, build, gradients, logits, padded, tokens
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from moba_flex.models import patch, set_attention, unpatch

LENGTHS = (TOKENS, 30, 41, 9)


def calm(**settings) -> nn.Module:
    """A model with gradients of a size at which absolute errors mean something."""
    model = build(**settings).train()
    for parameter in model.parameters():
        parameter.data *= 0.3
    return model


def patched(**settings) -> nn.Module:
    return patch(calm(), **{**SPARSE, "full_attention_layers": (1,), **settings})


def examples(n: int = 8) -> list[dict[str, Tensor]]:
    """Sequences of several lengths, each a row of its own; the first token is nobody's label."""
    rows = []
    for row in range(n):
        ids = tokens(1, LENGTHS[row % len(LENGTHS)], seed=row)[0]
        rows.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])})
    return rows


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def stack(columns: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    labels = stack([row["labels"] for row in rows], -100)
    return {"input_ids": stack(ids, 0), "attention_mask": stack([torch.ones_like(x) for x in ids], 0), "labels": labels}


def train(model: nn.Module, folder: Path, collator: Callable = pad, rows: int = 4, n_steps: int = 2, **settings) -> dict[str, Tensor]:
    """The weights after a few steps of plain gradient descent with Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=rows,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    Trainer(model, arguments, train_dataset=examples(), data_collator=collator).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], before: nn.Module, case: str) -> None:
    """Closer to each other than to where they began: `case` names what must not matter."""
    start = dict(before.named_parameters())
    assert actual.keys() == expected.keys() == start.keys()
    for name, weights in expected.items():
        moved = (weights - start[name]).norm()
        assert moved > 0, f"{case}: {name} was not trained"
        assert (actual[name] - weights).norm() < 1e-3 * moved, f"{case}: {name}"


# Trainer


def by_hand(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_trainer_does_what_a_loop_by_hand_does(tmp_path):
    expected = by_hand(patched(implementation="naive"), (pad(examples()[i : i + 4]) for i in (0, 4)))
    assert_same_weights(train(patched(), tmp_path), expected, calm(), "Trainer")


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}], ids=["position_ids", "cu_seq_lens"])
def test_packed_sequences_train_as_padded_ones(options, tmp_path):
    model = patched(full_attention_layers=())
    packed = train(copy.deepcopy(model), tmp_path, DataCollatorWithFlattening(return_tensors="pt", **options))
    assert_same_weights(packed, train(model, tmp_path), calm(), "packing")


def test_accumulated_gradients_of_trainer_are_those_of_one_batch(tmp_path):
    whole = train(patched(), tmp_path)
    parts = train(patched(), tmp_path, rows=1, gradient_accumulation_steps=4)
    assert_same_weights(parts, whole, calm(), "accumulation, rows of different lengths")


def test_checkpointed_activations_change_no_step_of_trainer(tmp_path):
    plain = train(patched(), tmp_path)
    assert_same_weights(train(patched(), tmp_path, gradient_checkpointing=True), plain, calm(), "gradient checkpointing")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, inputs = patched(), padded("right")
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model, inputs)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in checkpointed.items():
        assert_close(gradient, plain[name], f"reentrant {reentrant}, {name}")


# Layers changed while training runs


def test_layers_may_change_between_two_steps():
    """Every step has the gradients of a model that had those settings from the start, and the optimizer keeps its parameters."""
    model, inputs = patched(full_attention_layers=(-1,)), padded("right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    changes = (
        ((), lambda m: patch(m, **SPARSE)),
        ((0, 3), lambda m: patch(m, **SPARSE, full_attention_layers=(0, -1))),
        ((0, 2, 3), lambda m: set_attention(m, "full", layers=[2])),
        ((2,), lambda m: set_attention(m, "moba", layers=[0, 3])),
        (range(4), lambda m: set_attention(m, "full")),
    )
    seen = []
    for full, change in changes:
        change(model)
        fresh = patch(unpatch(copy.deepcopy(model)), **SPARSE, full_attention_layers=full)
        expected = gradients(fresh, inputs)
        for name, gradient in gradients(model, inputs).items():
            assert torch.equal(gradient, expected[name]), f"full attention in {list(full)}: {name}"
        seen.append(expected["model.embed_tokens.weight"])
        optimizer.step()
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(seen)), "the settings did not matter"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == len(list(model.parameters()))


# PEFT


LORA = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)


def with_lora(model: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, LORA)


def test_lora_trains_and_changes_its_own_parameters_alone(tmp_path):
    before = with_lora(patched())
    start = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    after = train(with_lora(patched()), tmp_path)
    expected = train(with_lora(patched(implementation="naive")), tmp_path)
    for name, weights in after.items():
        if "lora_" in name:
            moved = (expected[name] - start[name]).norm()
            assert moved > 0, f"{name} was not trained"
            assert (weights - expected[name]).norm() < 1e-3 * moved, f"{name} differs from the specification"
        else:
            assert torch.equal(weights, start[name]), f"{name} was changed"


def test_a_model_can_be_patched_through_its_peft_wrapper():
    ids, inside = tokens(), with_lora(patched())
    outside = patch(with_lora(calm()), **SPARSE, full_attention_layers=(1,))
    assert isinstance(outside, PeftModel)
    assert torch.equal(logits(outside, ids), logits(inside, ids))
    full = logits(with_lora(calm()), ids)
    assert (logits(outside, ids) - full).abs().max() > 1e-3, "MoBA was not used"
    assert torch.equal(logits(set_attention(outside, "full"), ids), full)
    assert torch.equal(logits(unpatch(inside), ids), full)
    assert not hasattr(inside.config, "moba")


def test_merged_lora_weights_leave_a_patched_model(tmp_path):
    model, ids = with_lora(patched()), tokens()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(patched(), tmp_path)
    assert torch.equal(logits(loaded, ids), expected), "adapters of a patched model, saved and loaded"
    merged = model.merge_and_unload()
    assert merged.config.moba.block_size == SPARSE["block_size"]
    assert_close(logits(merged, ids), expected, "merged")


# Lower precision


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    both = [torch.cat([x[name].float().flatten() for name in expected]) for x in (actual, expected)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def test_gradients_under_autocast_are_as_exact_as_those_of_full_attention():
    """With every block taken, where no choice of blocks can turn on a rounding."""
    model, inputs = patch(calm(), **ALL_BLOCKS), {**padded("right"), "use_cache": False}
    errors = {}
    for attention in ("full", "moba"):
        set_attention(model, attention)
        exact = gradients(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = gradients(model, inputs)
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in rounded.values()), attention
        errors[attention] = relative_error(rounded, exact)
    assert 1e-4 < errors["full"] < 0.05, "autocast was not used, or the model is too rough to tell"
    assert errors["moba"] < 1.5 * errors["full"], errors


# torch.compile


def small() -> nn.Module:
    return patch(calm(num_hidden_layers=2), **SPARSE, full_attention_layers=(-1,))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(batch):
    model = small()
    inputs = padded("right") if batch == "padded" else {"input_ids": tokens()}
    if batch == "packed":
        inputs |= {"position_ids": torch.cat([torch.arange(20), torch.arange(TOKENS - 20)]).expand(2, -1), "use_cache": False}
    eager = gradients(model, inputs)
    compiled = gradients(torch.compile(model, backend="aot_eager"), inputs)
    for name, gradient in eager.items():
        assert_close(compiled[f"_orig_mod.{name}"], gradient, f"{batch}, {name}")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("error:.*lru_cache.*")
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_model_with_checkpointing_is_one_graph(masked):
    model = build(num_hidden_layers=2).train()
    patch(model, **SPARSE, full_attention_layers=(1,))
    ids = tokens()
    inputs = {"input_ids": ids, "use_cache": False, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    torch.compiler.reset()
    for name, gradient in found.items():
        assert_close(gradient, expected[name.removeprefix("_orig_mod.")], name)


def test_a_compiled_model_is_one_graph_and_follows_a_switch_of_layers():
    model, ids = small(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for switch in (lambda: None, lambda: set_attention(model, "full"), lambda: set_attention(model, "moba", layers=[0, 1])):
        switch()
        assert_close(logits(compiled, ids), logits(model, ids), "after a switch")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("padding", [(), ("left", "right")], ids=["no mask", "a mask"])
def test_a_compiled_training_step_without_a_cache_is_one_graph(padding: tuple[str, ...]):
    """As Trainer calls a model, with and without a mask from its collator; one graph serves padding on both sides."""
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for inputs in [padded(side) for side in padding] or [{"input_ids": tokens()}]:
        expected = gradients(model, {**inputs, "use_cache": False})
        found = gradients(compiled, {**inputs, "use_cache": False})
        for name, gradient in expected.items():
            assert_close(found[f"_orig_mod.{name}"], gradient, f"{padding}: {name}")


@pytest.mark.usefixtures("_fresh_compiler")
def test_what_packs_sequences_or_has_a_cache_is_not_taken_for_whole_in_a_graph():
    model, ids = small(), tokens()
    positions = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)]).expand(2, -1)
    for more in ({"position_ids": positions, "use_cache": False}, {"use_cache": True}):
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            assert_close(compiled(input_ids=ids, **more).logits, model(input_ids=ids, **more).logits, str(sorted(more)))


# accelerate


def test_accumulated_gradients_of_accelerate_are_those_of_one_batch():
    model, ids = patched(), tokens(4)
    expected = by_hand(copy.deepcopy(model), [{"input_ids": ids, "labels": ids}])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for row in ids:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(input_ids=row[None], labels=row[None]).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(dict(model.named_parameters()), expected, calm(), "accelerate")
    assert len(attentions(accelerator.unwrap_model(wrapped))) == 4
