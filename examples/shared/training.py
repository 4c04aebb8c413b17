"""Code that all training scripts share: the learning rate, the loss of long sequences, and how they end.

Exit codes: 0 when all is done, or the requested time is over; 2, and one line, for an error that the user can fix; 130 after Ctrl-C and 143
after SIGTERM, once a checkpoint is written.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from moba_flex.distributed.watch import missing_processes

from .command_line import UserError, exit_code

PASSED_ON = 5.0  # seconds within which a launcher forwards Ctrl-C
LOSSES_AT_ONCE = 8192  # tokens whose losses are computed in float32 at a time


def exit_code_of_job(script: str, work: Callable[[], int | None]) -> int:
    """`exit_code` for one of several processes. If it failed because another process is missing, one line says which."""

    def checked() -> int | None:
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            missing = missing_processes()  # this also tells the others that this process has failed, but is not missing
            if missing is None:
                raise
            raise UserError(f"{missing}; see what that one printed") from error

    return exit_code(script, checked)


class Stop:
    """Remembers Ctrl-C or SIGTERM until the current work is done. A second Ctrl-C ends the process immediately.

    A terminal sends Ctrl-C to a launcher and to its processes, and the launcher forwards it: processes get one Ctrl-C twice.
    """

    def __init__(self) -> None:
        self._received, self._at = 0, 0.0
        self._same = PASSED_ON if "RANK" in os.environ else 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    @property
    def wanted(self) -> bool:
        return self._received != 0

    @property
    def exit_code(self) -> int:
        """128 plus the signal number, as in a shell; 0 if there was no signal."""
        return 128 + self._received if self._received else 0

    def _remember(self, number: int, _frame) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._at = number, now
        elif number == signal.SIGINT and now - self._at >= self._same:
            os._exit(130)


class StopTrainer(TrainerCallback):
    """Lets transformers' Trainer write a checkpoint and stop after the step in which any process was asked to stop.

    Before training begins, Ctrl-C ends the script immediately. `exit_code` is 0 unless training was stopped.
    """

    exit_code = 0

    def on_train_begin(self, args, state, control, **_) -> None:
        self._stop = Stop()

    def on_step_end(self, args, state, control, **_) -> None:
        wanted = torch.tensor(float(self._stop.wanted), device=args.device)
        if args.world_size > 1:  # processes may get the signal in different steps, and would then wait for each other forever
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
        if wanted.item():
            self.exit_code = self._stop.exit_code or 130
            control.should_save = control.should_training_stop = True


def stopped(reason: str, step: int, of: str = "", resume: str = " with --resume") -> str:
    """The last message of a training script that stops early. `reason`: "interrupted", or "the time is up"."""
    if not step:
        return f"{reason} before the first step{of} was done: nothing is saved"
    return f"{reason} after step {step:,}{of}, whose checkpoint is written: the same command{resume} goes on from there"


def done(steps: int, loss: float, folder: Path, adapter_of: str | None = None) -> str:
    """The last message of a completed run: the result, and how to load it. `adapter_of` names the model of an adapter."""
    what = "adapter" if adapter_of else "model"
    words = f"done after step {steps:,}, final loss {loss:.4f}; the {what} is in {folder}\n"
    words += f"load it: moba_flex.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    return words + (f"\nread with it: python examples/llama.py --model {adapter_of} --adapted {folder}" if adapter_of else "")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def mean_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_,
) -> Tensor:
    """transformers' loss, some tokens at a time: in float32 all logits of a long sequence would take tens of gigabytes."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logits, shift_labels = logits.view(-1, vocab_size), shift_labels.reshape(-1)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target in zip(logits.split(LOSSES_AT_ONCE), shift_labels.split(LOSSES_AT_ONCE)):
        total = total + checkpoint(_sum_of_losses, part, target, use_reentrant=False)
    return total / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
