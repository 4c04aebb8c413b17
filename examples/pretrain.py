"""Trains small Llamas from scratch on source code, with full attention and with MoBA, and compares them.

    python examples/pretrain.py --size 50M --context 8192 --tokens 100e6 --output results
    python examples/pretrain.py --size 10M --context 32768 --runs full --blocks 8 16 32 64 128 --output results
    python examples/pretrain.py --compare results/*.json --plot results/losses.png
    python examples/pretrain.py --size 50M --context 32768 --needle-share 0.3 --output results --checkpoints checkpoints
    python examples/needle.py --moba checkpoints/50M-32768-moba-last-3-full-... --full checkpoints/50M-32768-full-seed0 --output needle

Needs no data set: it reads the source files of Python and of the installed packages (`pretraining/corpus.py`). Runs follow one another,
and all of a seed begin with the same weights and read the same tokens in the same order; steps that two runs share are trained once.
Ctrl-C, or the end of `--budget-seconds`, writes a checkpoint at the end of a step; the same command goes on from it to the same losses, and
leaves out the runs that are done.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # See examples/llama.py.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarking.results import environment
from changed_settings import changes
from compiled_layers import compile_layers, mask_of
from demo_weights import DemoError
from flag_types import count, count_from_0, duration, fraction, not_negative, positive, positive_or_inf
from llama import one_line
from needle import QUESTIONS
from pretraining.batches import Batches, Upload
from pretraining.captured import Passes
from pretraining.compare import compare
from pretraining.corpus import Corpus, corpus, windows
from pretraining.optimizer import MuonAndAdamW
from pretraining.runs import NAMES, SIZES, Run, complete, named, new_model, of_blocks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from train import Stop, learning_rate

import moba_flex

LOG_EVERY = 10  # steps, whose mean loss is kept
EVALUATIONS = 4  # of held-out loss in a run
TRAILING = 2048  # tokens at the end of a context, whose loss is reported
BINS = 16  # of positions
DENSE = [  # full attention's kernels, best first
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NEEDLE_CONTEXT = 512  # tokens: three times those of a fact, its question and its answer, if each letter is one


def pretrain(args: argparse.Namespace) -> bool:
    """Whether all runs are done."""
    stop, ends = Stop(), time.monotonic() + args.budget_seconds
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":  # a batch is little work, and the threads of several runs on one host wait for each other in a busy loop
        torch.set_num_threads(min(torch.get_num_threads(), 4))
    runs = [named(name, args.block_size, args.top_k) for name in args.runs] + [of_blocks(n, args.context) for n in args.blocks]
    with one_line("these flags do not fit together"):
        for run in runs:
            moba_flex.MobaConfig.from_dict(run.settings)
    with one_line("cannot write to the folder"):
        for folder in (args.output, args.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
    text = corpus(args.corpus, args.sources, args.most_bytes)
    if (least := min(len(text.train), len(text.held_out))) <= args.context:
        raise SystemExit(
            f"--context is {args.context}, but a half of the text in {args.corpus} has only {least} tokens: give more --sources"
        )

    def enough() -> bool:
        return stop.wanted or time.monotonic() > ends

    every = [Training(args, run, seed, text, device) for seed in args.seeds for run in runs]
    pending = [training for training in every if not training.done]
    if not pending:
        print(f"all runs are done: see --compare {args.output / '*.json'}")
    for training in pending:
        training.successors = [other for other in pending if other.begins_as(training)]
    with sdpa_kernel(DENSE, set_priority=True), steps_in_graphs(device, args):
        for i, training in enumerate(pending):
            if (i and enough()) or not training.go_on(enough):  # a step at least, however little time there is
                why, left = "interrupted" if stop.wanted else "the time is up", len(pending) - i
                print(f"{why} after step {training.step} of {training.name}, {left} runs left: the same command goes on from there")
                return False
            training.release()
    return True


class Training:
    """One run: its model, what it has logged, and its files."""

    def __init__(self, args: argparse.Namespace, run: Run, seed: int, text: Corpus, device: torch.device) -> None:
        self.args, self.run, self.text, self.device = args, run, text, device
        blocks = "" if run.full else f"-b{run.settings['block_size']}k{run.settings['top_k']}"
        self.name = f"{args.size}-{args.context}-{run.name}{blocks}-seed{seed}"
        self.file, self.checkpoint = args.output / f"{self.name}.json", args.checkpoints / f"{self.name}.pt"
        rule = ("size", "context", "steps", "batch_tokens", "learning_rate", "warmup", "weight_decay", "clip")
        rule += ("needle_facts", "needle_questions", "needle_share")
        self.settings = {name: getattr(args, name) for name in rule}
        self.settings |= {"run": run.name, "seed": seed, "corpus": text.fingerprint, "optimizer": "muon"}
        if not run.full:
            self.settings |= json.loads(json.dumps(run.settings))
        self.settings = complete(self.settings)
        self.log = {"settings": self.settings, "train": [], "held_out": [], "tokens_per_second": [], "done": False}
        self.step, self.recent = 0, []  # steps that are done, and the losses of those that are not logged yet
        self.successors: list[Training] = []  # runs whose first steps are this one's
        if self.file.exists():
            with one_line(f"{self.file} is no log of this script: delete it, or choose another --output"):
                self.log = json.loads(self.file.read_text())
                settings, _ = self.log["settings"], self.log["done"]
            self._check(settings, self.file)

    @property
    def done(self) -> bool:
        return self.log["done"]

    def begins_as(self, other: Training) -> bool:
        """Whether this run is MoBA for its first steps and full attention then, and the other is the same MoBA to the end."""
        blocks, seed = self.run.settings == other.run.settings, self.settings["seed"] == other.settings["seed"]
        return blocks and seed and 0 < self.run.switch_at < other.run.switch_at == 1

    @property
    def first_of_its_own(self) -> int:
        """The first step whose attention is not MoBA."""
        return round(self.run.switch_at * self.args.steps)

    def go_on(self, enough) -> bool:
        """Train until the end, or until `enough()` after a step; whether it is the end."""
        args = self.args
        self.model = new_model(args.size, self.text.vocabulary, args.context, self.run, self.settings["seed"], self.device).train()
        self.optimizer = MuonAndAdamW(self.model, args.learning_rate, args.weight_decay)
        self._resume()
        self.held_out = self.text.held_out.to(self.device)
        self.rows = rows_together(args)
        self.of_hidden = losses_of_hidden
        on_gpu = self.device.type == "cuda"
        if on_gpu and not args.no_compile:
            compile_layers(self.model)
            self.of_hidden = torch.compile(losses_of_hidden, dynamic=False, fullgraph=True)
        self.upload = Upload(self.device) if on_gpu else lambda ids: ids
        self.passes = Passes(self._passes, self.model) if on_gpu and not args.no_step_graphs else None
        batches, saved, since = Batches(self.text, args, self.settings["seed"]), time.monotonic(), None

        for step in tqdm(range(self.step, args.steps), desc=self.name, initial=self.step, total=args.steps, mininterval=5):
            moba_flex.MobaSchedule(switch_at=self.run.switch_at).apply(self.model, step, args.steps)
            self.recent.append(self._train(batches.batch(step), learning_rate(step, args)))
            self.step = step + 1
            stopped, last = enough(), self.step == args.steps
            if self.step % LOG_EVERY == 0 or last:
                since = self._note(since)
            if self.step % max(1, args.steps // EVALUATIONS) == 0 or last:
                self.evaluate()
                since = None
            for other in self.successors:
                if self.step == other.first_of_its_own and not other.checkpoint.exists():
                    self._save(other)  # which need not train these steps once more
                    since = None
            if stopped or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                self._save()
                saved, since = time.monotonic(), None
            if stopped and not last:
                return False
        self._finish()
        return True

    def release(self) -> None:
        """Let go of the memory of a run that is done, and of its graphs."""
        del self.model, self.optimizer, self.held_out, self.passes, self.upload
        torch.compiler.reset()

    def _train(self, ids: Tensor, rate: float) -> Tensor:
        """One step on `[B, context + 1]`; its loss, which stays on the device."""
        ids = self.upload(ids)
        loss = self._passes(ids) if self.passes is None else self.passes(ids, kind=self.step < self.first_of_its_own)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step(rate)
        return loss

    def _passes(self, ids: Tensor) -> Tensor:
        """The forward and backward pass of a step, as many contexts at a time as fit; the loss."""
        parts, total = ids.split(self.rows), torch.zeros((), device=self.device)
        for part in parts:
            with self._autocast():
                loss = self._losses(part).mean() / len(parts)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss with the attention of the step before, and loss by position; both replace what an earlier step had."""
        context = self.args.context
        n = min((len(self.held_out) - 1) // context, max(1, self.args.held_out_tokens // context))
        by_position = torch.zeros(context, dtype=torch.float64, device=self.device)
        self.model.eval()
        for which in torch.arange(n, device=self.device).split(self.rows):
            with self._autocast():
                by_position += self._losses(windows(self.held_out, which, context)).sum(0) / n
        self.model.train()
        self.log["held_out"].append([self.step, round(by_position.mean().item(), 5)])
        self.log["by_position"] = [round(part.mean().item(), 5) for part in by_position.chunk(BINS)]
        self.log["trailing"] = round(by_position[-min(TRAILING, context // 4) :].mean().item(), 5)

    def _note(self, since: tuple[int, float] | None) -> tuple[int, float]:
        """Log the mean loss of the steps since the last note, and how fast they were if nothing else came in between."""
        loss = torch.stack(self.recent).mean().item()
        self.recent = []
        if not math.isfinite(loss):
            raise SystemExit(f"{self.name}: the loss at step {self.step} is {loss}: lower --learning-rate")
        self.log["train"].append([self.step, round(loss, 5)])
        now = time.perf_counter()
        if since is not None:
            self.log["tokens_per_second"].append(round((self.step - since[0]) * self.args.batch_tokens / (now - since[1])))
        return self.step, now

    def _losses(self, ids: Tensor) -> Tensor:
        return losses(self.model, ids, self.of_hidden)

    def _autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def _check(self, settings: dict, file: Path) -> None:
        if changed := changes(complete(settings), self.settings):
            raise SystemExit(f"{file} is of a run with other settings: {changed}. Choose another --output and --checkpoints, or delete it")

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            self.log |= {"train": [], "held_out": [], "tokens_per_second": []}
            return
        with one_line(f"{self.checkpoint} cannot be read: delete it to begin this run anew"):
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self._check(saved["log"]["settings"], self.checkpoint)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.log, self.step, self.recent = saved["log"], saved["step"], list(saved["recent"])

    def _save(self, other: Training | None = None) -> None:
        """A checkpoint, of this run or for another one to go on from. Complete or not there."""
        of = other or self
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "log": self.log | {"settings": of.settings}}
        state |= {"step": self.step, "recent": self.recent}
        partial = of.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(of.checkpoint)
        self._write()

    def _finish(self) -> None:
        self.log |= {"done": True, "environment": environment(self.device), "date": str(date.today())}
        self.log["parameters"] = sum(x.numel() for x in self.model.parameters())
        folder = self.args.checkpoints / self.name
        self.model.save_pretrained(folder)  # float32, with MoBA's settings
        self.text.tokenizer.save_pretrained(folder)
        self._write()
        self.checkpoint.unlink(missing_ok=True)
        print(f"{self.name}: held-out loss {self.log['held_out'][-1][1]:.4f}, trailing {self.log['trailing']:.4f}")

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.log))
        partial.replace(self.file)


@contextmanager
def steps_in_graphs(device: torch.device, args: argparse.Namespace) -> Iterator[None]:
    """Where whole steps are captured in CUDA graphs, calls of attention need none, nor the memory of theirs."""
    before = moba_flex.set_cuda_graphs(device.type != "cuda" or args.no_step_graphs)
    try:
        yield
    finally:
        moba_flex.set_cuda_graphs(before)


def losses(model: nn.Module, ids: Tensor, of_hidden: Callable) -> Tensor:
    """`[B, N + 1]` -> `[B, N]`: the loss of each token after the first."""
    read = ids[:, :-1]
    hidden = model.model(read, attention_mask=mask_of(*read.shape, read.device), use_cache=False).last_hidden_state
    return of_hidden(model.lm_head, hidden, ids[:, 1:])


def losses_of_hidden(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """`[B, N, D]`, `[B, N]` -> `[B, N]`. One function, so that compiled it need not keep the logits."""
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape)


def rows_together(args: argparse.Namespace) -> int:
    """How many contexts the device works on at a time: at least one."""
    return max(1, min(args.micro_tokens, args.batch_tokens) // args.context)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, nargs="+", metavar="LOG", help="print the table of these logs, and train nothing")
    parser.add_argument("--plot", type=Path, help="with --compare: write a plot to this file")
    parser.add_argument("--size", choices=SIZES, default="50M", help="parameters (default: 50M)")
    parser.add_argument("--context", type=count, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--tokens", type=positive, default=100e6, help="that a run reads (default: 100e6)")
    parser.add_argument("--batch-tokens", type=count, default=65536, help="a step: few, so that few tokens are many steps (default: 65536)")
    parser.add_argument("--micro-tokens", type=count, default=65536, help="tokens that the device works on at a time")
    parser.add_argument("--runs", nargs="*", choices=NAMES, default=list(NAMES[:4]), help=f"default: {' '.join(NAMES[:4])}")
    parser.add_argument(
        "--blocks", type=count, nargs="*", default=[], help="also MoBA with so many blocks, of which a query reads a quarter"
    )
    parser.add_argument("--block-size", type=count, default=512, help="tokens (default: 512)")
    parser.add_argument("--top-k", type=count, default=3, help="blocks (default: 3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--needle-share", type=fraction, default=0.0, help="of the windows with facts and questions, see needle.py; default: 0"
    )
    parser.add_argument("--needle-facts", type=count, default=32, help="at most in such a window; default: 32")
    parser.add_argument(
        "--needle-questions", choices=QUESTIONS, default="anywhere", help="each anywhere after its fact (the default), or all at the end"
    )
    parser.add_argument("--learning-rate", type=positive, default=4e-3)
    parser.add_argument("--warmup", type=count_from_0, help="steps; default: a twentieth")
    parser.add_argument("--weight-decay", type=not_negative, default=0.1)
    parser.add_argument("--clip", type=positive_or_inf, default=1.0, help="norm of the gradient")
    parser.add_argument("--held-out-tokens", type=count, default=1 << 20, help="that a held-out loss is of, if there are so many")
    parser.add_argument("--output", type=Path, default=Path("pretraining-results"), help="for the logs (default: pretraining-results)")
    checkpoints = os.environ.get("CHECKPOINT", "pretraining-checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=Path(checkpoints), help="folder for them and for models (default: %(default)s)")
    parser.add_argument("--checkpoint-minutes", type=duration, default=3)
    parser.add_argument(
        "--budget-seconds", type=duration, default=float("inf"), help="after which a checkpoint is written and the program ends"
    )
    parser.add_argument("--corpus", type=Path, help="folder for the tokens; default: in --checkpoints")
    parser.add_argument("--sources", type=Path, nargs="+", help="folders of source files; default: those of Python and its packages")
    parser.add_argument("--most-bytes", type=count, help="of the sources")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers")
    parser.add_argument("--no-step-graphs", action="store_true", help="do not capture the two passes of a step in a CUDA graph")
    args = parser.parse_args(arguments)
    rows, together = args.batch_tokens // args.context, rows_together(args)
    if args.batch_tokens % args.context or rows % together:
        parser.error(
            f"--batch-tokens must be a multiple of {together * args.context}, the contexts that --micro-tokens has room for, "
            f"but is {args.batch_tokens}"
        )
    if not args.compare and not args.runs and not args.blocks:
        parser.error("there is nothing to run: name some --runs, or numbers of --blocks")
    if args.plot and not args.compare:
        parser.error("argument --plot: goes with --compare, which reads the logs that it draws")
    if args.needle_share and args.context < NEEDLE_CONTEXT:
        parser.error(f"--context must be at least {NEEDLE_CONTEXT} for --needle-share, but is {args.context}")
    args.steps = max(1, round(args.tokens / args.batch_tokens))
    args.warmup = max(1, args.steps // 20) if args.warmup is None else args.warmup
    args.corpus = args.corpus or args.checkpoints / "corpus"
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    given = parse()
    try:
        compare(given.compare, given.plot) if given.compare else pretrain(given)
    except DemoError as error:
        sys.exit(f"pretrain.py: error: {error}")
