"""Train a causal language model on text files with MoBA (Mixture of Block Attention), on one process or many.

    python examples/train.py --tiny --text README.md --output /tmp/run --sequence-length 512 --block-size 64 --top-k 3 --batch-size 4
    python examples/launch.py --config_file examples/accelerate/ddp.yaml examples/train.py --model meta-llama/Llama-3.1-8B --text *.txt \\
        --output run    # eight GPUs; two with --num_processes 2 before the script
    python examples/launch.py --config_file examples/accelerate/fsdp2_cp.yaml examples/train.py ...    # sequences longer than one GPU holds

`examples/launch.py` takes the arguments of `accelerate launch`, and leaves out the launcher's own error messages. `accelerate launch` works
too.

Training uses MoBA, full attention, or MoBA followed by full attention (`--moba-share`). Ctrl-C stops before the next micro-batch and writes
a checkpoint of the completed steps. `--resume` continues from the last checkpoint, on any number of processes, sharded or not. A launcher
kills its processes half a minute after Ctrl-C: use `--checkpoint-every` for models that take longer to save. Exit code: 0 when all steps
are done, 2 and one line for an error that you can fix, 130 after Ctrl-C. If a process is killed, the others name it within a minute and
end.

Apart from weights and optimizer state, everything in a step follows from its number: its sequences, learning rate, attention and random
numbers. No step is done twice, and losses do not depend on how many processes share the work. The exception is a model with dropout,
whose random numbers differ per process.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import contextlib
import json
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from shared.changed_settings import changes
from shared.command_line import Parser, UserError, config_of_flags, one_line
from shared.flag_types import count, count_from_0, fraction, not_negative, positive, positive_or_inf
from shared.models import check_context, check_layers
from shared.saved_results import check_writable
from shared.startup import run_script
from shared.training import Stop, done, exit_code_of_job, learning_rate, mean_loss, stopped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import moba_flex
from moba_flex.distributed import ContextParallel, context_parallel, watch_processes

TINY_LAYERS = 2
# Seconds. When a process is killed, its launcher kills the others 30 seconds later. On GPUs they wait inside a kernel until then, and only
# the watch can report.
SILENT = 20.0
BLOCKS = ("block_size", "top_k", "sink_blocks", "full_attention_layers")


def train(args: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    check(args)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # from checkpoints on one process, in the middle of the progress bar
    cpu = args.cpu or not torch.accelerator.is_available()  # accelerate would not see that several processes are meant for CPUs
    with one_line("accelerate cannot begin"):
        accelerator = Accelerator(cpu=cpu, log_with=args.log_with, project_dir=args.output)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate would also reduce gradients, and return the loss, in bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    watch = watch_processes(silent=SILENT) if accelerator.num_processes > 1 else None
    share = Share(accelerator, args)
    run = Run(accelerator, args)
    tokenizer = load_tokenizer(args)
    text = Text(args, tokenizer)
    model = load(args)
    model.loss_function = mean_loss
    if args.activation_checkpointing and not (accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing):
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed in transformers 5.20
        enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    context = share.context_parallel(model)

    first = run.begin(model, optimizer, text)
    accelerator.init_trackers("moba_flex", config={name: str(x) for name, x in vars(args).items()})
    stop, interrupted = Stop(), False
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", disable=not accelerator.is_main_process)
    for step in bar:
        started = time.perf_counter()
        if watch:
            watch.at(f"step {step + 1}")
        attention = "moba" if step < args.moba_share * args.steps else "full"
        moba_flex.set_attention(accelerator.unwrap_model(model), attention)
        torch.manual_seed((args.seed * args.steps + step) * accelerator.num_processes + accelerator.process_index)
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, args)

        loss = torch.zeros((), device=accelerator.device)
        for i in range(share.accumulate):
            if interrupted := share.any(stop.wanted):
                break
            last = i == share.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                part = forward(model, text.batch(step, i, share).to(accelerator.device), context) / share.accumulate
                accelerator.backward(part)
            loss += part.detach()
        if interrupted:
            optimizer.zero_grad()
            if step:
                run.save(step)
            break
        accelerator.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        loss = accelerator.reduce(loss, "mean").item()
        tokens = args.batch_size * args.sequence_length / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.4f}, {tokens:,.0f} tokens/s, {attention}")
        run.log(step + 1, {"loss": loss, "tokens_per_second": tokens, "learning_rate": rate, "attention": attention})
        if step + 1 == args.steps or (step + 1) % args.checkpoint_every == 0:
            run.save(step + 1)
    bar.close()
    if interrupted:
        accelerator.print(stopped("interrupted", step))
    else:
        accelerator.print(done(args.steps, run.last_loss, run.save_model(tokenizer)))
    accelerator.wait_for_everyone()
    if watch:
        watch.end()
    if accelerator.device.type == "cpu":  # the group cannot be destroyed there: see `run_script`
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
    return (stop.exit_code or 130) if interrupted else 0  # another process may have got the signal


def forward(model: nn.Module, ids: Tensor, context: ContextParallel | None) -> Tensor:
    """The loss of `ids [B, N]`. Its mean over all processes is the mean over all their labels."""
    batch = {"input_ids": ids, "labels": ids}
    return model(**(context.shard(batch) if context else {**batch, "use_cache": False})).loss


class Share:
    """This process's part of each step's sequences. Context-parallel processes share the same sequences."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace) -> None:
        parallelism, n_processes = accelerator.parallelism_config, accelerator.num_processes
        for name in ("tp_size", "sp_size"):
            if (size := getattr(parallelism, name, 1)) != 1:
                raise UserError(f"accelerate's configuration has {name} {size}, which this script does not do: set it to 1")
        self._accelerator, self._exchange = accelerator, args.exchange
        self._configured = parallelism.cp_size if parallelism else 1
        self.slices = self._configured if self._configured > 1 else args.context_parallel
        if self._configured > 1 and args.context_parallel not in (1, self._configured):
            raise UserError(f"--context-parallel is {args.context_parallel}, but accelerate's configuration has cp_size {self._configured}")
        if n_processes % self.slices:
            raise UserError(f"--context-parallel must divide the {n_processes} processes, but is {self.slices}")
        self.size, self.rank, self.rows = n_processes // self.slices, accelerator.process_index // self.slices, args.micro_batch_size
        if args.batch_size % (self.size * self.rows):
            raise UserError(
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
        """Whether `wanted` is true on any process. A single process does not wait for its GPU."""
        if self._accelerator.num_processes == 1:
            return wanted
        return self._accelerator.reduce(torch.tensor(float(wanted), device=self._accelerator.device), "sum").item() > 0


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for the tiny model, which reads bytes."""
    if args.tiny:
        return None
    with one_line(f"argument --model: cannot load the tokenizer of {args.model!r}, a local folder or a model on the hub"):
        return AutoTokenizer.from_pretrained(args.model)


def load(args: argparse.Namespace) -> nn.Module:
    """The patched model."""
    torch.manual_seed(args.seed)
    if args.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"num_hidden_layers": TINY_LAYERS, "max_position_embeddings": args.sequence_length}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    else:
        with one_line(f"argument --model: cannot load {args.model!r}, a local folder or a model on the hub"):
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with one_line("this model cannot use MoBA so"):
        return moba_flex.patch(model, settings_of(args))


def settings_of(args: argparse.Namespace) -> moba_flex.MobaConfig:
    return config_of_flags({name: getattr(args, name) for name in BLOCKS})


class Text:
    """Files concatenated into one token stream and cut into sequences. Each epoch has its own order, which depends on the seed."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None) -> None:
        texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in args.text]
        ids = [x for text in texts for x in (tokenizer(text).input_ids if tokenizer else text.encode())]
        self._n = len(ids) // args.sequence_length
        if self._n == 0:
            raise UserError(f"--text has {len(ids)} tokens, but one sequence (--sequence-length) has {args.sequence_length}")
        self._sequences = torch.tensor(ids[: self._n * args.sequence_length]).view(self._n, -1)
        self._seed, self._batch = args.seed, args.batch_size
        self.fingerprint = [len(ids), int(self._sequences.sum())]

    def batch(self, step: int, i: int, share: Share) -> Tensor:
        """`[B, N]`: what this process reads in the i-th micro-batch of a step."""
        first = step * self._batch + (i * share.size + share.rank) * share.rows
        return torch.stack([self._sequence(n) for n in range(first, first + share.rows)])

    def _sequence(self, n: int) -> Tensor:
        epoch, place = divmod(n, self._n)
        order = torch.randperm(self._n, generator=torch.Generator().manual_seed(self._seed + epoch))
        return self._sequences[order[place]]


class Run:
    """The files of a run: checkpoints, the log, the finished model."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace) -> None:
        """Raises UserError if the folder does not match --resume."""
        self._accelerator, self._args, self._output, self.last_loss = accelerator, args, Path(args.output), float("nan")
        if args.resume and not self._checkpoints():
            raise UserError(f"--resume: there is no checkpoint in {self._output}")
        if self._checkpoints() and not args.resume:
            raise UserError(f"--output {self._output} has checkpoints already: go on from the last one with --resume, or choose another")

    def begin(self, model: nn.Module, optimizer, text: Text) -> int:
        """The index of the first step: 0, or the one after the last checkpoint."""
        self._model, self._optimizer = model, optimizer.optimizer
        # Settings that determine what a step does, and must not change with --resume.
        names = ("seed", "steps", "batch_size", "sequence_length", "learning_rate", "warmup", "weight_decay", "clip", "moba_share")
        self._settings = {"text": text.fingerprint, **{name: getattr(self._args, name) for name in (*names, *BLOCKS)}}
        if self._args.resume:
            return self._resume()
        self._accelerator.wait_for_everyone()
        with one_line("argument --output: cannot write to the folder"):
            self._output.mkdir(parents=True, exist_ok=True)
        self._keep_log(0)
        return 0

    def _resume(self) -> int:
        """Load the last checkpoint, and return the index of the next step."""
        path = self._checkpoints()[-1]
        saved = json.loads((path / "run.json").read_text())
        if changed := changes(saved["settings"], self._settings):
            raise UserError(f"--resume from {path}: these must not change: {changed}")
        model, optimizer = get_state_dict(self._model, self._optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(self._model, self._optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self._keep_log(saved["step"])
        return saved["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint atomically. The format does not depend on the processes: each writes its part, and reads what it needs."""
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

    def save_model(self, tokenizer: PreTrainedTokenizerBase | None) -> Path:
        """Save the model in transformers' format, with MoBA's settings in its configuration. Returns the folder."""
        weights, folder = self._accelerator.get_state_dict(self._model), self._output / "model"
        if self._accelerator.is_main_process:
            self._accelerator.unwrap_model(self._model).save_pretrained(folder, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return folder

    def log(self, step: int, entry: dict[str, float | str]) -> None:
        self.last_loss = entry["loss"]
        if self._accelerator.is_main_process:
            with open(self._output / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        self._accelerator.log({name: x for name, x in entry.items() if name != "attention"}, step=step)

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self._output.glob("step-*") if path.suffix != ".partial")

    def _keep_log(self, last: int) -> None:
        """Remove log entries after the checkpoint, and an incomplete last line: these steps are done again."""
        path = self._output / "log.jsonl"
        if self._accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]
            path.write_text("".join(kept))
            self.last_loss = json.loads(kept[-1])["loss"] if kept else float("nan")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a causal language model on the Hugging Face hub or in a folder (no default: this or --tiny)")
    which.add_argument("--tiny", action="store_true", help="a tiny random Llama that reads bytes (no default: this or --model)")
    flag("--text", nargs="+", required=True, metavar="FILE", help="text files (required)")
    flag("--output", required=True, metavar="FOLDER", help="for checkpoints, log.jsonl and the finished model (required)")
    flag("--resume", action="store_true", help="go on from the last checkpoint in --output")
    flag("--steps", type=count, default=1000, metavar="N", help="optimizer steps")
    flag("--sequence-length", type=count, default=32768, metavar="N", help="tokens, two at least")
    flag("--batch-size", type=count, default=16, metavar="N", help="sequences per step, over all processes")
    flag("--micro-batch-size", type=count, default=1, metavar="N", help="sequences that a process works on at a time")
    flag("--learning-rate", type=positive, default=2e-5, metavar="X", help="after the warm-up")
    flag("--warmup", type=count_from_0, default=20, metavar="N", help="steps in which the learning rate rises")
    flag("--weight-decay", type=not_negative, default=0.1, metavar="X", help="of AdamW")
    flag("--clip", type=positive_or_inf, default=1.0, metavar="X", help="largest norm of the gradient")
    flag("--seed", type=int, default=0, metavar="N", help="of the order of the text and of random numbers")
    flag("--moba-share", type=fraction, default=1.0, metavar="X", help="share of the steps with MoBA; full attention from then on")
    parser.add_block_flags(block_size=512, top_k=8, sink_blocks=0, full_attention_layers=[])
    flag("--context-parallel", type=count, default=1, metavar="N", help="processes that share a sequence, if accelerate's file is silent")
    flag("--exchange", choices=("keys", "heads"), default="keys", help="what they send each other")
    flag("--activation-checkpointing", action="store_true", help="compute activations again in the backward pass, to save memory")
    flag("--checkpoint-every", type=count, default=100, metavar="N", help="steps between checkpoints")
    flag("--cpu", action="store_true", help="on CPUs, even where there are GPUs")
    flag("--log-with", metavar="NAME", help="a tracker that accelerate knows: tensorboard, wandb, ... (default: none)")
    args = parser.parse_args(arguments)
    if args.sequence_length < 2:
        parser.error("argument --sequence-length: a sequence of 1 token has nothing to predict")
    settings_of(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Check what can be known before anything is loaded. Raises UserError."""
    for file in args.text:
        with one_line("argument --text: cannot read the file"), open(file, "rb"):
            pass
    check_writable(Path(args.output))
    check_layers("--full-attention-layers", args.full_attention_layers, args.model, TINY_LAYERS)
    if args.model is not None:
        check_context("--sequence-length", args.sequence_length, args.model)


def main(arguments: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    return exit_code_of_job("train.py", lambda: train(parse(arguments)))


if __name__ == "__main__":
    run_script(main)
