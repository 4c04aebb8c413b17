"""Train small Llamas from scratch with full attention and with MoBA, on the same text, and compare their losses.

    python examples/experiments/pretrain.py --size 50M --context 8192 --tokens 100e6 --output results
    python examples/experiments/pretrain.py --size 10M --context 32768 --runs full --blocks 8 16 32 64 128 --output results
    python examples/experiments/pretrain.py --compare results/*.json --plot results/losses.png
    python examples/experiments/pretrain.py --size 50M --context 32768 --needle-share 0.3 --output results --checkpoints checkpoints
    python examples/experiments/needle.py --moba checkpoints/50M-32768-moba-... --full checkpoints/50M-32768-full-seed0 --output needle

No data set is needed: the text is the source files of Python and of the installed packages (`pretraining/corpus.py`). Runs follow one
another. All runs of a seed start with the same weights and read the same tokens in the same order; steps that two runs share are trained
once. Ctrl-C, or the end of `--budget-seconds`, writes a checkpoint at the end of a step. The same command continues from it to the same
losses, and skips the runs that are done. Exit code: 0 when all runs are done or the time is up, 2 and one line for an error that you can
fix, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date

import torch
import torch.nn.functional as F
import transformers
from needle import QUESTIONS
from packaging.version import Version
from pretraining.batches import Batches, Upload
from pretraining.captured import Passes
from pretraining.compare import compare
from pretraining.corpus import Corpus, corpus, windows
from pretraining.optimizer import MuonAndAdamW
from pretraining.runs import NAMES, SIZES, Run, complete, named, new_model, of_blocks
from shared.changed_settings import changes
from shared.command_line import Parser, UserError, config_of_flags, exit_code, one_line
from shared.compiled_layers import compile_layers, mask_of
from shared.environment import environment
from shared.flag_types import count, count_from_0, duration, fraction, not_negative, positive, positive_or_inf
from shared.saved_results import check_writable
from shared.startup import run_script
from shared.training import Stop, learning_rate, stopped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import moba_flex

LOG_EVERY = 10  # steps per logged mean loss
EVALUATIONS = 4  # number of evaluations of held-out loss in a run
TRAILING = 2048  # tokens at the end of a context whose loss is reported
BINS = 16  # number of position bins
DENSE = [  # full attention's kernels, best first
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# transformers 5.17 creates the dense mask of full attention only within a capture, so layers would have to be compiled there.
CAPTURES_FULL = Version(transformers.__version__).release >= (5, 18)
NEEDLE_CONTEXT = 512  # tokens: three times a fact, its question and its answer, at one token per letter


def pretrain(args: argparse.Namespace) -> int:
    """Train the runs that are not done. Returns the exit code."""
    stop, ends = Stop(), time.monotonic() + args.budget_seconds
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":  # a batch is little work, and the threads of several runs on one host would busy-wait for each other
        torch.set_num_threads(min(torch.get_num_threads(), 4))
    runs = [named(name, args.block_size, args.top_k) for name in args.runs] + [of_blocks(n, args.context) for n in args.blocks]
    for run in runs:
        config_of_flags(run.settings)
    for flag, folder in (("--output", args.output), ("--checkpoints", args.checkpoints)):
        check_writable(folder, flag)
        folder.mkdir(parents=True, exist_ok=True)
    text = corpus(args.corpus, args.sources, args.most_bytes)
    if (least := min(len(text.train), len(text.held_out))) <= args.context:
        raise UserError(
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
            if (i and enough()) or not training.go_on(enough):  # at least one step, however little time there is
                why, left = "interrupted" if stop.wanted else "the time is up", len(pending) - i
                print(f"{stopped(why, training.step, f' of {training.name}', resume='')}; runs left: {left}")
                return stop.exit_code
            training.release()
    if pending:
        print(f"done; the models are in {args.checkpoints}\ncompare the runs: --compare {args.output / '*.json'}")
    return 0


class Training:
    """One run: its model, its log, and its files."""

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
        self.step, self.recent = 0, []  # steps done, and the losses that are not logged yet
        self.successors: list[Training] = []  # runs that share this run's first steps
        if self.file.exists():
            with one_line(f"{self.file} is no log of this script: delete it, or choose another --output"):
                self.log = json.loads(self.file.read_text())
                settings, _ = self.log["settings"], self.log["done"]
            self._check(settings, self.file)

    @property
    def done(self) -> bool:
        return self.log["done"]

    def begins_as(self, other: Training) -> bool:
        """Whether this run is MoBA followed by full attention, and the other is the same MoBA to the end."""
        blocks, seed = self.run.settings == other.run.settings, self.settings["seed"] == other.settings["seed"]
        return blocks and seed and 0 < self.run.switch_at < other.run.switch_at == 1

    @property
    def first_of_its_own(self) -> int:
        """The first step with full attention."""
        return round(self.run.switch_at * self.args.steps)

    def go_on(self, enough) -> bool:
        """Train until the end, or until `enough()` is true after a step. Returns whether the end was reached."""
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

        bar = tqdm(range(self.step, args.steps), desc=self.name, initial=self.step, total=args.steps, unit="step", mininterval=5)
        for step in bar:
            moba_flex.MobaSchedule(switch_at=self.run.switch_at).apply(self.model, step, args.steps)
            self.recent.append(self._train(batches.batch(step), learning_rate(step, args)))
            self.step = step + 1
            ends, last = enough(), self.step == args.steps
            if self.step % LOG_EVERY == 0 or last:
                since = self._note(since)
                speed = f", {self.log['tokens_per_second'][-1]:,} tokens/s" if self.log["tokens_per_second"] else ""
                bar.set_postfix_str(f"loss {self.log['train'][-1][1]:.4f}{speed}", refresh=False)
            if self.step % max(1, args.steps // EVALUATIONS) == 0 or last:
                self.evaluate()
                since = None
            for other in self.successors:
                if self.step == other.first_of_its_own and not other.checkpoint.exists():
                    self._save(other)  # which need not repeat these steps
                    since = None
            if ends or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                self._save()
                saved, since = time.monotonic(), None
            if ends and not last:
                bar.close()
                return False
        self._finish()
        return True

    def release(self) -> None:
        """Free the memory of a run that is done, and its graphs."""
        del self.model, self.optimizer, self.held_out, self.passes, self.upload
        torch.compiler.reset()

    def _train(self, ids: Tensor, rate: float) -> Tensor:
        """Run one step on `[B, context + 1]`, and return its loss, which stays on the device."""
        ids = self.upload(ids)
        sparse = self.step < self.first_of_its_own
        captured = self.passes is not None and (sparse or CAPTURES_FULL)
        loss = self.passes(ids, kind=sparse) if captured else self._passes(ids)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step(rate)
        return loss

    def _passes(self, ids: Tensor) -> Tensor:
        """Run the forward and backward pass of a step, as many contexts at a time as fit, and return the loss."""
        parts, total = ids.split(self.rows), torch.zeros((), device=self.device)
        for part in parts:
            with self._autocast():
                loss = self._losses(part).mean() / len(parts)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure held-out loss with the attention of the preceding step, and loss by position, which replaces that of earlier steps."""
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
        """Log the mean loss of the steps since the last note, and their speed if nothing else ran in between."""
        loss = torch.stack(self.recent).mean().item()
        self.recent = []
        if not math.isfinite(loss):
            raise UserError(f"{self.name}: the loss at step {self.step} is {loss}: lower --learning-rate")
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
            raise UserError(f"{file} is of a run with other settings: {changed}. Choose another --output and --checkpoints, or delete it")

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
        """Write a checkpoint atomically, of this run or for another one to start from."""
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
        self.model.save_pretrained(folder)  # in float32, with MoBA's settings
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
    """If whole steps are captured in CUDA graphs, disable the graphs of attention calls, which would only take memory."""
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
    """`[B, N, D]`, `[B, N]` -> `[B, N]`. One function, so that its compiled form need not keep the logits."""
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape)


def rows_together(args: argparse.Namespace) -> int:
    """The number of contexts that the device processes at a time: at least one."""
    return max(1, min(args.micro_tokens, args.batch_tokens) // args.context)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--compare", type=Path, nargs="+", metavar="LOG", help="print the table of these logs, and train nothing (default: train)")
    flag("--plot", type=Path, metavar="FILE", help="with --compare: write a plot to this file (default: no plot)")
    flag("--size", choices=SIZES, default="50M", help="parameters")
    flag("--context", type=count, default=8192, metavar="N", help="tokens per sequence")
    flag("--tokens", type=positive, default=100e6, metavar="N", help="that a run reads (default: 100e6)")
    flag("--batch-tokens", type=count, default=65536, metavar="N", help="per step: few, so that few tokens are many steps")
    flag("--micro-tokens", type=count, default=65536, metavar="N", help="tokens that the device works on at a time")
    flag("--runs", nargs="*", choices=NAMES, default=list(NAMES[:4]), help="what is trained")
    flag("--blocks", type=count, nargs="*", default=[], metavar="N", help="also MoBA with so many blocks, of which a query reads a quarter")
    parser.add_block_flags(block_size=512, top_k=3)
    flag("--seeds", type=int, nargs="+", default=[0], metavar="N", help="each run is trained once for each of them")
    flag("--needle-share", type=fraction, default=0.0, metavar="X", help="of the windows with facts and questions, see needle.py")
    flag("--needle-facts", type=count, default=32, metavar="N", help="at most in such a window")
    flag("--needle-questions", choices=QUESTIONS, default="anywhere", help="each anywhere after its fact, or all at the end")
    flag("--learning-rate", type=positive, default=4e-3, metavar="X", help="after the warm-up")
    flag("--warmup", type=count_from_0, metavar="N", help="steps in which the learning rate rises (default: a twentieth of all)")
    flag("--weight-decay", type=not_negative, default=0.1, metavar="X", help="of matrices")
    flag("--clip", type=positive_or_inf, default=1.0, metavar="X", help="largest norm of the gradient")
    flag("--held-out-tokens", type=count, default=1 << 20, metavar="N", help="that a held-out loss is of, if there are so many")
    flag("--output", type=Path, default=Path("pretraining-results"), metavar="FOLDER", help="for the logs")
    checkpoints = os.environ.get("CHECKPOINT", "pretraining-checkpoints")
    flag("--checkpoints", type=Path, default=Path(checkpoints), metavar="FOLDER", help="for checkpoints and finished models")
    flag("--checkpoint-minutes", type=duration, default=3, metavar="X", help="time between checkpoints")
    flag("--budget-seconds", type=duration, default=float("inf"), metavar="X", help="write a checkpoint and end after that time")
    flag("--corpus", type=Path, metavar="FOLDER", help="for the tokens (default: in --checkpoints)")
    flag("--sources", type=Path, nargs="+", metavar="FOLDER", help="of source files (default: those of Python and its packages)")
    flag("--most-bytes", type=count, metavar="N", help="of the sources (default: all)")
    flag("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    flag("--no-compile", action="store_true", help="do not compile the layers")
    flag("--no-step-graphs", action="store_true", help="do not capture the two passes of a step in a CUDA graph")
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


def main(arguments: list[str] | None = None) -> int:
    """Train, or compare, and return the exit code."""

    def work() -> int:
        args = parse(arguments)
        return compare(args.compare, args.plot) or 0 if args.compare else pretrain(args)

    return exit_code("pretrain.py", work)


if __name__ == "__main__":
    run_script(main)
