"""Continues training of a causal language model on text, with MoBA, full attention, or one after the other.

    python examples/train.py --tiny --text README.md --output /tmp/run --sequence-length 512 --block-size 64 --top-k 3 --batch-size 4
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py --model meta-llama/Llama-3.1-8B --text *.txt --output run
    accelerate launch --config_file examples/accelerate/fsdp2_cp.yaml examples/train.py ...    # sequences longer than one GPU holds

Ctrl-C writes a checkpoint before the next micro-batch, of the steps that are done (a launcher kills its processes half a minute after it:
`--checkpoint-every` is for when that is too short); `--resume` goes on from the last one, on any number of processes, sharded or not. All
that a step depends on beside the weights and the optimizer follows from its number: which sequences it reads, its learning rate, its
attention and its random numbers. So no step is done twice, and losses do not depend on how many processes share the work, but for a
model with dropout, whose random numbers are each process's own.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # See examples/llama.py.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from changed_settings import changes
from demo_weights import DemoError
from flag_types import count, count_from_0, fraction, not_negative, positive, positive_or_inf
from llama import one_line
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import moba_flex
from moba_flex.distributed import ContextParallel, context_parallel

LOSSES_AT_ONCE = 8192  # tokens, whose losses are worked out in float32 at a time


def train(args: argparse.Namespace) -> None:
    cpu = args.cpu or not torch.accelerator.is_available()  # accelerate would not see that several processes are meant for CPUs
    with one_line("accelerate cannot begin"):
        accelerator = Accelerator(cpu=cpu, log_with=args.log_with, project_dir=args.output)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate would also sum gradients, and give the loss, in bfloat16
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    share = Share(accelerator, args)
    model, tokenizer = load(args)
    model.loss_function = mean_loss
    text = Text(args, tokenizer, model.config.vocab_size)
    if args.activation_checkpointing and not (accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing):
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed in transformers 5.20
        enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    context = share.context_parallel(model)

    run = Run(accelerator, model, optimizer, args, text)
    first = run.resume() if args.resume else run.start()
    accelerator.init_trackers("moba_flex", config={name: str(x) for name, x in vars(args).items()})
    stop = Stop()
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, disable=not accelerator.is_main_process):
        started = time.perf_counter()
        attention = "moba" if step < args.moba_share * args.steps else "full"
        moba_flex.set_attention(accelerator.unwrap_model(model), attention)
        torch.manual_seed((args.seed * args.steps + step) * accelerator.num_processes + accelerator.process_index)
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, args)

        loss = torch.zeros((), device=accelerator.device)
        for i in range(share.accumulate):
            if stopped := share.any(stop.wanted):
                break
            last = i == share.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                part = forward(model, text.batch(step, i, share).to(accelerator.device), context) / share.accumulate
                accelerator.backward(part)
            loss += part.detach()
        if stopped:
            optimizer.zero_grad()
            if step:
                run.save(step)
            kept = f"after step {step}, whose checkpoint is written: --resume goes on from there" if step else "within the first step"
            accelerator.print(f"interrupted {kept}")
            break
        accelerator.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        loss = accelerator.reduce(loss, "mean").item()
        tokens = args.batch_size * args.sequence_length / (time.perf_counter() - started)
        run.log(step + 1, {"loss": loss, "tokens_per_second": tokens, "learning_rate": rate, "attention": attention})
        if step + 1 == args.steps or (step + 1) % args.checkpoint_every == 0:
            run.save(step + 1)
    else:
        run.save_model(tokenizer)
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cpu":  # where the group cannot be destroyed: see `main`
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()


def forward(model: nn.Module, ids: Tensor, context: ContextParallel | None) -> Tensor:
    """The loss of `ids [B, N]`, whose mean over all processes is the mean over all their labels."""
    batch = {"input_ids": ids, "labels": ids}
    return model(**(context.shard(batch) if context else {**batch, "use_cache": False})).loss


def mean_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_,
) -> Tensor:
    """transformers' own, worked out some tokens at a time: in float32 all logits of a long sequence would take tens of gigabytes."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logits, shift_labels = logits.view(-1, vocab_size), shift_labels.reshape(-1)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target in zip(logits.split(LOSSES_AT_ONCE), shift_labels.split(LOSSES_AT_ONCE)):
        total = total + checkpoint(_sum_of_losses, part, target, use_reentrant=False)
    return total / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


class Share:
    """What part of each step's sequences this process works on. Processes that share sequences (context parallelism) get the same ones."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace) -> None:
        parallelism, n_processes = accelerator.parallelism_config, accelerator.num_processes
        for name in ("tp_size", "sp_size"):
            if (size := getattr(parallelism, name, 1)) != 1:
                raise SystemExit(f"accelerate's configuration has {name} {size}, which this script does not do: set it to 1")
        self._accelerator, self._exchange = accelerator, args.exchange
        self._configured = parallelism.cp_size if parallelism else 1
        self.slices = self._configured if self._configured > 1 else args.context_parallel
        if self._configured > 1 and args.context_parallel not in (1, self._configured):
            raise SystemExit(
                f"--context-parallel is {args.context_parallel}, but accelerate's configuration has cp_size {self._configured}"
            )
        if n_processes % self.slices:
            raise SystemExit(f"--context-parallel must divide the {n_processes} processes, but is {self.slices}")
        self.size, self.rank, self.rows = n_processes // self.slices, accelerator.process_index // self.slices, args.micro_batch_size
        if args.batch_size % (self.size * self.rows):
            raise SystemExit(
                f"--batch-size, the sequences of one step, is {args.batch_size}, but must be a multiple of {self.size * self.rows}: "
                f"{self.size} processes with sequences of their own, times --micro-batch-size {self.rows}"
            )
        self.accumulate = args.batch_size // (self.size * self.rows)

    def context_parallel(self, model: nn.Module) -> ContextParallel | None:
        if self.slices == 1:
            return None
        mesh = self._accelerator.torch_device_mesh
        if self._configured == 1:
            mesh = init_device_mesh(self._accelerator.device.type, (self.size, self.slices), mesh_dim_names=("dp", "cp"))
        with one_line("this model cannot be context-parallel so"):
            return context_parallel(self._accelerator.unwrap_model(model), mesh, exchange=self._exchange)

    def any(self, wanted: bool) -> bool:
        """Whether it is true on any process. One alone need not wait for its GPU."""
        if self._accelerator.num_processes == 1:
            return wanted
        return self._accelerator.reduce(torch.tensor(float(wanted), device=self._accelerator.device), "sum").item() > 0


def load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The patched model, and its tokenizer; the tiny model reads bytes."""
    torch.manual_seed(args.seed)
    if args.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=args.sequence_length, **sizes))
        tokenizer = None
    else:
        with one_line(f"cannot load the model {args.model!r}, as a local folder or from the hub"):
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = {"block_size": args.block_size, "top_k": args.top_k, "sink_blocks": args.sink_blocks}
    with one_line("this model cannot use MoBA so"):
        return moba_flex.patch(model, **settings, full_attention_layers=args.full_attention_layers), tokenizer


class Text:
    """Files as one line of tokens, cut into sequences. Each epoch has an order of its own, which follows from the seed."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
        with one_line("cannot read the files of --text"):
            texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in args.text]
        ids = [x for text in texts for x in (tokenizer(text).input_ids if tokenizer else text.encode())]
        self._n = len(ids) // args.sequence_length
        if self._n == 0:
            raise SystemExit(f"--text has {len(ids)} tokens, but one sequence (--sequence-length) has {args.sequence_length}")
        self._sequences = torch.tensor(ids[: self._n * args.sequence_length]).view(self._n, -1)
        self._seed, self._batch = args.seed, args.batch_size
        self.fingerprint = [len(ids), int(self._sequences.sum())]

    def batch(self, step: int, i: int, share: Share) -> Tensor:
        """`[B, N]`: what this process reads in the i-th part of a step."""
        first = step * self._batch + (i * share.size + share.rank) * share.rows
        return torch.stack([self._sequence(n) for n in range(first, first + share.rows)])

    def _sequence(self, n: int) -> Tensor:
        epoch, place = divmod(n, self._n)
        order = torch.randperm(self._n, generator=torch.Generator().manual_seed(self._seed + epoch))
        return self._sequences[order[place]]


class Run:
    """The files of a run: checkpoints, the log, the finished model."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer, args: argparse.Namespace, text: Text) -> None:
        self._accelerator, self._model, self._optimizer, self._output = accelerator, model, optimizer.optimizer, Path(args.output)
        # What decides what a step does, and so must be the same after --resume.
        names = ("seed", "steps", "batch_size", "sequence_length", "learning_rate", "warmup", "weight_decay", "clip", "moba_share")
        blocks = ("block_size", "top_k", "sink_blocks", "full_attention_layers")
        self._settings = {"text": text.fingerprint, **{name: getattr(args, name) for name in (*names, *blocks)}}

    def start(self) -> int:
        if self._checkpoints():
            raise SystemExit(f"--output {self._output} has checkpoints already: go on from the last one with --resume, or choose another")
        self._accelerator.wait_for_everyone()
        with one_line("cannot write to the folder"):
            self._output.mkdir(parents=True, exist_ok=True)
        self._keep_log(0)
        return 0

    def resume(self) -> int:
        """Load the last checkpoint; the number of the next step."""
        if not self._checkpoints():
            raise SystemExit(f"--resume: there is no checkpoint in {self._output}")
        path = self._checkpoints()[-1]
        saved = json.loads((path / "run.json").read_text())
        if changed := changes(saved["settings"], self._settings):
            raise SystemExit(f"--resume from {path}: these must not change: {changed}")
        model, optimizer = get_state_dict(self._model, self._optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(self._model, self._optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self._keep_log(saved["step"])
        return saved["step"]

    def save(self, step: int) -> None:
        """One format whatever the processes are: each writes its part, and whoever loads takes what it needs. Complete or not there."""
        path = self._output / f"step-{step:08d}"
        if path.exists():
            return
        partial = path.with_suffix(".partial")
        model, optimizer = get_state_dict(self._model, self._optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial)
        if self._accelerator.is_main_process:
            (partial / "run.json").write_text(json.dumps({"step": step, "settings": self._settings}))
            partial.rename(path)
        self._accelerator.wait_for_everyone()

    def save_model(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """In transformers' format, with MoBA's settings in its configuration."""
        weights = self._accelerator.get_state_dict(self._model)
        if self._accelerator.is_main_process:
            self._accelerator.unwrap_model(self._model).save_pretrained(self._output / "model", state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(self._output / "model")

    def log(self, step: int, entry: dict[str, float | str]) -> None:
        if self._accelerator.is_main_process:
            with open(self._output / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        self._accelerator.log({name: x for name, x in entry.items() if name != "attention"}, step=step)

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self._output.glob("step-*") if path.suffix != ".partial")

    def _keep_log(self, last: int) -> None:
        """Drop what was logged after the checkpoint, and a line that was cut off: these steps come again."""
        path = self._output / "log.jsonl"
        if self._accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last))


class Stop:
    """Ctrl-C, or a launcher's request to end, is remembered until the micro-batch is done. A second one ends the process at once."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        if self.wanted and number == signal.SIGINT:
            os._exit(130)
        self.wanted = True


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="name or folder of a causal language model")
    which.add_argument("--tiny", action="store_true", help="a tiny Llama with random weights that reads bytes")
    parser.add_argument("--text", nargs="+", required=True, help="text files")
    parser.add_argument("--output", required=True, help="folder for checkpoints, log.jsonl and the finished model")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument("--sequence-length", type=count, default=32768, help="tokens, two at least")
    parser.add_argument("--batch-size", type=count, default=16, help="sequences a step, over all processes")
    parser.add_argument("--micro-batch-size", type=count, default=1, help="sequences that a process works on at a time")
    parser.add_argument("--learning-rate", type=positive, default=2e-5)
    parser.add_argument("--warmup", type=count_from_0, default=20, help="steps")
    parser.add_argument("--weight-decay", type=not_negative, default=0.1)
    parser.add_argument("--clip", type=positive_or_inf, default=1.0, help="norm of the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moba-share", type=fraction, default=1.0, help="share of the steps with MoBA; full attention from then on")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--sink-blocks", type=int, default=0)
    parser.add_argument("--full-attention-layers", type=int, nargs="*", default=[], help="layers that keep full attention")
    parser.add_argument("--context-parallel", type=count, default=1, help="processes that share a sequence, if accelerate's file is silent")
    parser.add_argument("--exchange", choices=("keys", "heads"), default="keys", help="how they share it")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--checkpoint-every", type=count, default=100, help="steps")
    parser.add_argument("--cpu", action="store_true", help="on CPUs, even where there are GPUs")
    parser.add_argument("--log-with", help="a tracker that accelerate knows: tensorboard, wandb, ...")
    args = parser.parse_args(arguments)
    if args.sequence_length < 2:
        parser.error("argument --sequence-length: a sequence of 1 token has nothing to predict")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, and end the process. On CPUs at once: gloo's threads may still want Python's lock. To destroy their group would hold it for
    ever, and if Python ends under them they abort the process.
    """
    try:
        train(parse(arguments))
    except DemoError as error:
        sys.exit(f"train.py: error: {error}")
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    main()
