"""MoBA and full attention in one training run: `MobaSchedule`, a callback of transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..config import layer_indices
from ..core.messages import shown
from ..core.validation import check_choice, check_count, is_number
from . import set_attention
from .patch import moba_layers

ATTENTION = ("moba", "full")
ORDERS = ("last_to_first", "first_to_last")


class MobaSchedule(TrainerCallback, ExportableState):
    """Train a patched model with MoBA first and full attention last (report, section 3.2), or the other way round.

    The schedule switches the layers that MoBA can replace, except those in `full_attention_layers`. The attention of a layer depends only
    on the step and the total number of steps. A run that resumes from a checkpoint therefore continues unchanged, and one that resumes with
    more total steps switches later. The checkpoint also saves the schedule's settings, which
    `TrainingArguments(restore_callback_states_from_checkpoint=True)` restores. Evaluation and saving between two steps use the attention of
    the preceding step. After training the model has the attention of the last step.

    Args:
        first: the attention that training begins with, "moba" or "full"; it ends with the other.
        switch_at: the fraction of the steps after which layers begin to switch, 0 to 1.
        switch_over: the fraction of the steps during which layers switch one after another; 0: all at once.
        order: which layer switches first, "last_to_first" (in the report the last layers profit most from full attention) or
            "first_to_last".

    Under torch.compile each combination of layers is one graph: for more than eight raise `torch._dynamo.config.recompile_limit`.

    Raises:
        ValueError: a setting is out of range; when training begins, the model is not patched or has no layer to switch.

    >>> from moba_flex import MobaSchedule
    >>> schedule = MobaSchedule(switch_at=0.8, switch_over=0.1)
    >>> [schedule.attention_at(step, 100, layers=[0, 1]) for step in (79, 80, 85)]
    [{0: 'moba', 1: 'moba'}, {0: 'moba', 1: 'full'}, {0: 'full', 1: 'full'}]
    """

    def __init__(self, first: str = "moba", switch_at: float = 0.9, switch_over: float = 0.0, order: str = "last_to_first") -> None:
        check_choice("first", first, ATTENTION)
        _check_share("switch_at", switch_at)
        _check_share("switch_over", switch_over)
        check_choice("order", order, ORDERS)
        if switch_at + switch_over > 1 + 1e-9:
            raise ValueError(
                f"switch_at={switch_at} and switch_over={switch_over} end after the last step: their sum must be at most 1, "
                f"so lower switch_over to {max(0.0, 1 - switch_at):g}"
            )
        self.first, self.switch_at, self.switch_over, self.order = first, switch_at, switch_over, order

    def attention_at(self, step: int, n_steps: int, layers: Sequence[int]) -> dict[int, str]:
        """The attention of each of `layers` in step `step` of `n_steps`, counted from 0.

        Raises ValueError for values that are not integers.
        """
        check_count("step", step, 0)
        check_count("n_steps", n_steps, 1)
        layers = layer_indices("layers", layers)
        start, stretch = round(self.switch_at * n_steps), round(self.switch_over * n_steps)
        begins, ends = ATTENTION if self.first == "moba" else ATTENTION[::-1]
        in_order = sorted(layers, reverse=self.order == "last_to_first")
        switches = {layer: start + place * stretch // len(in_order) for place, layer in enumerate(in_order)}
        return {layer: begins if step < switches[layer] else ends for layer in layers}

    def apply(self, model: nn.Module, step: int, n_steps: int) -> None:
        """Set the attention of a model's layers for a step. For custom training loops; `Trainer` calls it itself.

        `model` may be wrapped (PEFT, accelerate, DistributedDataParallel, torch.compile).

        Raises ValueError if it is not patched.
        """
        now = moba_layers(model)
        wanted = self.attention_at(step, n_steps, list(now))
        for attention in ATTENTION:
            changed = [layer for layer in now if wanted[layer] == attention and (now[layer] == "full") != (attention == "full")]
            if changed:
                set_attention(model, attention, layers=changed)

    def state(self) -> dict[str, Any]:
        """The state saved in a checkpoint."""
        return {"args": dict(vars(self)), "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None  # `Trainer` always passes it
        if not moba_layers(model):
            raise ValueError(
                f"MobaSchedule has no layer to switch: full_attention_layers names all layers of {type(model).__name__} that MoBA can "
                "replace; patch it with fewer of them"
            )
        self.apply(model, min(state.global_step, state.max_steps - 1), state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        self.apply(model, state.global_step, state.max_steps)


def _check_share(name: str, value: object) -> None:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a share of the steps, a number from 0 to 1, but is {shown(value)}")
