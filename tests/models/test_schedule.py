"""What `MobaSchedule` promises: which layers use what in which step, through wrappers, checkpoints and to the end."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from support.families import SPARSE, VOCABULARY, attentions, build, logits, tokens
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from moba_flex import MobaSchedule, patch, set_attention
from moba_flex.models.patch import moba_layers
from moba_flex.models.state import choice_of

MOBA_ALL, FULL_ALL = ["moba"] * 4, ["full"] * 4


class Rows(Dataset):
    """Rows of tokens, each one drawn from one of a few topics. Consecutive rows have consecutive topics, so that all batches of whole
    rounds of topics are alike, and which topic it is can be seen in any part of a row."""

    def __init__(self, n_rows: int, length: int = 64, topics: int = 8) -> None:
        generator = torch.Generator().manual_seed(7)
        shares = (torch.randn(topics, VOCABULARY, generator=generator) * 2).softmax(-1)
        self.rows = torch.multinomial(shares.repeat(-(-n_rows // topics), 1)[:n_rows], length, replacement=True, generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Record(TrainerCallback):
    """What the layers use while a step is under way."""

    def __init__(self) -> None:
        self.steps: dict[int, list[str]] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps[state.global_step] = list(moba_layers(model).values())


def trainer(model: nn.Module, folder: Path, schedule: MobaSchedule, n_steps: int = 10, rows: int = 2, **settings) -> tuple[Trainer, Record]:
    record = Record()
    settings = {"learning_rate": 1e-2, "save_strategy": "no", **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=rows,
        logging_steps=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    data = Rows(n_steps * rows * arguments.gradient_accumulation_steps)
    return Trainer(model, arguments, train_dataset=data, callbacks=[schedule, record]), record


def patched(**settings) -> nn.Module:
    return patch(build(), **{**SPARSE, **settings})


# Which layers use what in which step


@pytest.mark.parametrize("first, last", [("moba", "full"), ("full", "moba")])
@pytest.mark.parametrize("share, n_steps, start", [(0.9, 100, 90), (0.07, 100, 7), (0.5, 7, 4), (0.0, 10, 0), (1.0, 10, 10)])
def test_all_layers_switch_after_a_share_of_the_steps(first, last, share, n_steps, start):
    schedule = MobaSchedule(first, switch_at=share)
    for step in range(n_steps):
        expected = dict.fromkeys((0, 2, 5), first if step < start else last)
        assert schedule.attention_at(step, n_steps, [0, 2, 5]) == expected, f"step {step} of {n_steps}"


@pytest.mark.parametrize("order, switched", [("last_to_first", (5, 2, 0)), ("first_to_last", (0, 2, 5))])
def test_layers_switch_one_after_another(order, switched):
    schedule = MobaSchedule(switch_at=0.5, switch_over=0.3, order=order)
    changes, before = {}, schedule.attention_at(0, 20, [0, 2, 5])
    for step in range(1, 20):
        now = schedule.attention_at(step, 20, [0, 2, 5])
        changes.update({layer: step for layer in now if now[layer] != before[layer]})
        before = now
    assert changes == dict(zip(switched, (10, 12, 14)))
    assert before == dict.fromkeys((0, 2, 5), "full")


def test_a_short_run_switches_several_layers_in_a_step():
    schedule = MobaSchedule(switch_at=0.5, switch_over=0.5)
    assert list(schedule.attention_at(1, 4, range(4)).values()) == MOBA_ALL
    assert list(schedule.attention_at(2, 4, range(4)).values()) == ["moba", "moba", "full", "full"]
    assert list(schedule.attention_at(3, 4, range(4)).values()) == FULL_ALL


BAD_SETTINGS = [
    ({"first": "sparse"}, "first must be one of moba, full, but is 'sparse'"),
    ({"first": "moba_naive"}, "first must be one of moba, full"),
    ({"switch_at": 90}, "switch_at must be a share of the steps, a number from 0 to 1, but is 90"),
    ({"switch_at": -0.1}, "switch_at must be a share"),
    ({"switch_at": float("nan")}, "switch_at must be a share"),
    ({"switch_at": True}, "switch_at must be a share"),
    ({"switch_over": "0.1"}, "switch_over must be a share"),
    ({"switch_over": 0.2}, r"switch_at=0\.9 and switch_over=0\.2 end after the last step: .* lower switch_over to 0\.1"),
    ({"order": "random"}, "order must be one of last_to_first, first_to_last, but is 'random'"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS, ids=[str(case[0]) for case in BAD_SETTINGS])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MobaSchedule(**settings)


def test_a_model_that_cannot_follow_is_refused_before_training(tmp_path):
    for model, message in (
        (build(), "LlamaForCausalLM is not patched: call moba_flex.patch"),
        (patched(full_attention_layers=range(4)), "no layer to switch: full_attention_layers names all layers of LlamaForCausalLM"),
    ):
        used, states = model.config._attn_implementation, [choice_of(layer) for layer in attentions(model)]
        with pytest.raises(ValueError, match=message):
            trainer(model, tmp_path, MobaSchedule())[0].train()
        assert model.config._attn_implementation == used
        assert [choice_of(layer) for layer in attentions(model)] == states


# In a training run


@pytest.mark.parametrize("first, last", [("moba", "full"), ("full", "moba")])
def test_a_run_trains_with_what_the_schedule_says_and_leaves_the_model_so(first, last, tmp_path):
    model = patched()
    run, record = trainer(model, tmp_path, MobaSchedule(first, switch_at=0.6), gradient_accumulation_steps=2)
    run.train()
    assert record.steps == {step: [first if step < 6 else last] * 4 for step in range(10)}
    assert list(moba_layers(model).values()) == [last] * 4
    assert torch.equal(logits(model, tokens()), logits(set_attention(model, last), tokens())), "the layers compute what they say"


def test_layers_that_keep_full_attention_do_not_switch(tmp_path):
    model = patched(full_attention_layers=(1, -1))
    trainer(model, tmp_path, MobaSchedule("full", switch_at=0.5), n_steps=4)[0].train()
    assert moba_layers(model) == {0: "moba", 2: "moba"}
    assert torch.equal(logits(model, tokens()), logits(patch(model, **SPARSE, full_attention_layers=(1, -1)), tokens()))


class PatchAgain(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 2:
            patch(model, **SPARSE, full_attention_layers=[0])
        if state.global_step == 6:
            patch(model, block_size=4, top_k=3)


def test_full_attention_layers_may_change_while_a_schedule_runs(tmp_path):
    model = patched()
    run, record = trainer(model, tmp_path, MobaSchedule(switch_at=0.5, switch_over=0.4), n_steps=10)
    run.callback_handler.callbacks.insert(0, PatchAgain())
    run.train()
    assert [record.steps[step] for step in (1, 2, 4)] == [MOBA_ALL, ["moba"] * 3, ["moba"] * 3]
    assert [record.steps[step] for step in (5, 6, 9)] == [["moba", "moba", "full"], ["moba", "moba", "full", "full"], FULL_ALL]
    assert model.config.moba.block_size == 4


@pytest.fixture
def _fresh_accelerate():
    """Accelerate keeps one state for the whole process, in which the precision is fixed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


WRAPPERS = {
    "PEFT": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
    "accelerate": lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "a module of one's own": nn.Sequential,
}


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_follows_the_schedule(wrapper):
    model = patch(build(num_hidden_layers=2), **SPARSE)
    wrapped = WRAPPERS[wrapper](model)
    schedule = MobaSchedule(switch_at=0.5, switch_over=0.5)
    ids = tokens()
    for step, expected in ((0, ["moba", "moba"]), (2, ["moba", "full"]), (3, ["full", "full"])):
        schedule.apply(wrapped, step, 4)
        assert list(moba_layers(model).values()) == expected, f"{wrapper}, step {step}"
        if wrapper == "torch.compile":
            assert torch.equal(logits(wrapped, ids), logits(model, ids)), "a compiled model computes what its layers say"


def test_a_model_of_peft_is_switched_by_trainer(tmp_path):
    model = get_peft_model(patched(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    run, record = trainer(model, tmp_path, MobaSchedule(switch_at=0.5), n_steps=4)
    run.train()
    assert list(record.steps.values()) == [MOBA_ALL, MOBA_ALL, FULL_ALL, FULL_ALL]


# Checkpoints


@pytest.mark.parametrize("stopped_at", [4, 8, 10])
def test_a_resumed_run_is_the_run_that_never_stopped(stopped_at, tmp_path):
    schedule = {"switch_at": 0.5, "switch_over": 0.5}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, record = trainer(patched(), tmp_path, MobaSchedule(**schedule), **saving)
    whole.train()
    again, later = trainer(patched(), tmp_path, MobaSchedule(**schedule), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped_at}"))
    assert later.steps == {step: record.steps[step] for step in range(stopped_at, 10)}
    for (name, parameter), other in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(parameter, other), name
    assert moba_layers(again.model) == moba_layers(whole.model)


def test_resuming_a_finished_run_leaves_the_attention_of_its_last_step(tmp_path):
    for attempt in range(2):
        run, record = trainer(patched(), tmp_path, MobaSchedule(switch_at=1.0), n_steps=2, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=bool(attempt))
        assert len(record.steps) == (0 if attempt else 2)
        assert list(moba_layers(run.model).values()) == MOBA_ALL


def test_a_checkpoint_restores_the_schedules_settings_where_that_is_asked_for(tmp_path):
    schedule = MobaSchedule("full", switch_at=0.5, switch_over=0.2, order="first_to_last")
    whole, record = trainer(patched(), tmp_path, schedule, save_strategy="steps", save_steps=4)
    whole.train()
    for restore in (True, False):
        run, later = trainer(patched(), tmp_path, MobaSchedule(), restore_callback_states_from_checkpoint=restore)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        used = next(callback for callback in run.callback_handler.callbacks if isinstance(callback, MobaSchedule))
        assert vars(used) == vars(schedule if restore else MobaSchedule())
        assert (later.steps == {step: record.steps[step] for step in range(4, 10)}) == restore


# The loss


def losses(model: nn.Module, folder: Path, schedule: MobaSchedule, n_steps: int) -> list[float]:
    run, _ = trainer(model, folder, schedule, n_steps, rows=16)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def jump(loss: list[float], step: int) -> float:
    """How far the loss of the three steps from `step` on lies from that of the ten before, in their standard deviations."""
    before, after = loss[step - 10 : step], loss[step : step + 3]
    return abs(statistics.mean(after) - statistics.mean(before)) / statistics.stdev(before)


def tiny(**settings) -> nn.Module:
    return patch(build(num_hidden_layers=2, initializer_range=0.05), **settings)


@pytest.mark.parametrize("first, switch_over, switches", [("moba", 0.0, [28]), ("full", 0.0, [28]), ("moba", 0.2, [28, 32])])
def test_the_loss_does_not_jump_where_layers_switch(first, switch_over, switches, tmp_path):
    loss = losses(tiny(block_size=8, top_k=3), tmp_path, MobaSchedule(first, 0.7, switch_over), 40)
    assert statistics.mean(loss[-5:]) < 0.75 * loss[0], "nothing was learned that could be lost"
    for step in switches:
        assert jump(loss, step) < 2, f"{first} first, step {step}: {loss[step - 10 : step + 3]}"


@pytest.mark.parametrize("first", ["moba", "full"])
def test_the_loss_is_seen_to_jump_where_moba_is_not_close_to_full_attention(first, tmp_path):
    """The same measure where with MoBA every token reads itself alone: without this the test above could not fail."""
    loss = losses(tiny(block_size=1, top_k=1), tmp_path, MobaSchedule(first, 0.7), 40)
    assert jump(loss, 28) > 5, f"{first} first: {loss[18:31]}"


# Importing


def test_the_trainer_is_loaded_only_with_the_schedule(fresh):
    program = "import sys, moba_flex; loaded = 'transformers.trainer_callback' in sys.modules; moba_flex.MobaSchedule; print(loaded)"
    done = fresh.run(program)
    assert done.stdout.split()[-1:] == ["False"], done.stderr
