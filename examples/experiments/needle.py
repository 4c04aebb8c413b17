"""Test whether a model finds one fact in a long text (needle in a haystack), with MoBA and with full attention side by side.

    python examples/experiments/needle.py --moba adapted/moba/adapter --full adapted/full/adapter --output needle    # of adapt.py
    python examples/experiments/needle.py --moba checkpoints/50M-... --full checkpoints/50M-... --output needle      # of pretrain.py
    python examples/experiments/needle.py --block-size 128 --top-k 8 --output needle                                 # the demo's model

The fact is placed at every depth of texts of every length, and a question at the end asks for it. A cell is one depth and length. It is
right if greedy decoding gives the value of the fact, token for token. `--output` gets needle.json and needle.png, a heat map as in the
report. `--resume` continues after the last cell. `training_sequence` makes the sequences that teach a small model to do it.

N tokens of a sequence, F tokens of the text around the facts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from pretraining.compare import WORDS
from pretraining.corpus import HELD_OUT_OF
from shared.changed_settings import changes
from shared.command_line import Parser, UserError, config_of_flags, exit_code, one_line, with_flags
from shared.flag_types import count, count_from_0, fraction
from shared.models import check_adapter, context_of, load, trained_with, with_adapter
from shared.package_text import KINDS, Document, collect, default_roots
from shared.saved_results import check_writable, write
from shared.startup import run_script
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moba_flex

SIDES = ("moba", "full")
MOST_FACTS = 8  # default for one training sequence
LEAST_BYTES = 100_000  # of text to search: less may contain no held-out file
QUESTIONS = ("end", "anywhere")  # where a training sequence asks for its facts
_RUN = re.compile(r"(\w+)-(\d+)-(.+?)(?:-b(\d+)k(\d+))?-seed(\d+)")  # names of runs of pretrain.py


@dataclass(frozen=True)
class Fact:
    """A key and a value, both random, so that no other text connects them."""

    key: str
    value: str

    @classmethod
    def random(cls, generator: torch.Generator) -> Fact:
        def draw(letters: str, n: int) -> str:
            return "".join(letters[i] for i in torch.randint(len(letters), (n,), generator=generator).tolist())

        key = "".join(a + b for a, b in zip(draw("bdfgklmnprstvz", 4), draw("aeiou", 4)))
        return cls(key, draw("0123456789", 6))

    def statement(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return tokens(f"\nThe secret code of {self.key} is {self.value}.\n", tokenizer)

    def question(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return tokens(f"\nQuestion: What is the secret code of {self.key}?\nAnswer: The secret code of {self.key} is", tokenizer)

    def answer(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return tokens(f" {self.value}", tokenizer)


def tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


def training_sequence(
    filler: Tensor, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, most: int = MOST_FACTS, questions: str = "end"
) -> Tensor:
    """`[N]`, as long as `filler`: its first tokens with up to `most` facts at random positions, and questions with their answers.

    Questions are all at the end, in any order, or each at a random position after its fact (`questions="anywhere"`). In the second case
    they follow plain text, at any distance and any length. A share of these sequences in the training text teaches a model what this script
    tests. Raises ValueError if `filler` is too short for one fact with twice as much text around it.
    """
    facts = [Fact.random(generator) for _ in range(most)]
    statements = [fact.statement(tokenizer) for fact in facts]
    endings = [torch.cat([fact.question(tokenizer), fact.answer(tokenizer)]) for fact in facts]
    sizes = torch.tensor([len(statement) + len(ending) for statement, ending in zip(statements, endings)]).cumsum(0)
    n = int((3 * sizes <= len(filler)).sum())
    if n == 0:
        raise ValueError(f"filler must have at least {3 * int(sizes[0])} tokens, three times those of a fact, but has {len(filler)}")
    around = filler[: len(filler) - int(sizes[n - 1])]
    n_inserted = n if questions == "end" else 2 * n
    places = torch.randint(len(around) + 1, (n_inserted,), generator=generator).sort().values
    order = torch.randperm(n_inserted, generator=generator)
    if questions == "end":
        inserted, at_end = statements[:n], [endings[i] for i in order.tolist()]
    else:
        slots = order.view(n, 2).sort(1).values  # for each fact: its slot, then that of its question
        both = statements[:n] + endings[:n]
        inserted, at_end = [both[i] for i in slots.T.flatten().argsort().tolist()], []
    parts = [part for pair in zip(around.tensor_split(places), inserted) for part in pair]
    return torch.cat([*parts, around[places[-1] :], *at_end])


def haystack(text: Tensor, fact: Fact, length: int, depth: float, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """A prompt `[N]` and its answer, together `length` tokens: a fact after the fraction `depth` of the text `[F]`, then the question.

    Raises ValueError if `length` has no room for them, or the text is too short.
    """
    needle, question, answer = fact.statement(tokenizer), fact.question(tokenizer), fact.answer(tokenizer)
    around = length - len(needle) - len(question) - len(answer)
    if not 0 <= around <= len(text):
        raise ValueError(f"length must be from {length - around} to {length - around + len(text)} tokens, but is {length}")
    place = round(depth * around)
    return torch.cat([text[:place], needle, text[place:around], question]), answer


@torch.inference_mode()
def finds(model: PreTrainedModel, prompts: Tensor, answers: Tensor, full_tail: int = 0) -> list[bool]:
    """Whether greedy decoding after each prompt `[n, N]` gives its answer `[n, A]`. A prompt's last `full_tail` tokens read all keys."""
    ids = prompts.to(model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"logits_to_keep": full_tail + 1} if full_tail else {}  # see docs/decoding.md
    new = model.generate(ids, max_new_tokens=answers.shape[1], **options)[:, ids.shape[1] :].cpu()
    whole = F.pad(new, (0, answers.shape[1] - new.shape[1]), value=-1)  # generation stops early if every row has ended
    return (whole == answers).all(1).tolist()


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, depth: float, args) -> list[bool]:
    """One cell: whether each trial is right. The prompts depend only on the seed and the cell, so both sides get the same ones."""
    generator = torch.Generator().manual_seed((args.seed << 40) + (length << 8) + round(100 * depth))
    same: dict[int, list[tuple[int, Tensor, Tensor]]] = {}  # trials by answer length: each length is one batch
    for trial in range(args.trials):
        first = int(torch.randint(max(1, len(text) - length), (), generator=generator))
        prompt, answer = haystack(text[first:], Fact.random(generator), length, depth, tokenizer)
        same.setdefault(len(answer), []).append((trial, prompt, answer))
    right = {}
    for trials, prompts, answers in (zip(*rows) for rows in same.values()):
        right |= zip(trials, finds(model, torch.stack(prompts), torch.stack(answers), args.full_tail))
    return [right[trial] for trial in range(args.trials)]


def needle(args: argparse.Namespace) -> dict:
    """Measure the cells that `--output` lacks, and draw the heat map."""
    with one_line('cannot draw, since matplotlib is not installed: pip install ".[demo,viz]"'):
        import matplotlib.figure  # noqa: F401
    file = args.output / "needle.json"
    check_writable(args.output)
    check_blocks(args)
    if file.exists() and not args.resume:
        raise UserError(f"{file} is there already: go on with --resume, or choose another --output")
    for side in SIDES:
        model, tokenizer, moba = load_side(side, args)
        lengths = args.lengths or default_lengths(model)
        if max(lengths) > context_of(model):
            raise UserError(f"--lengths has {max(lengths):,}, but the context of --{side}'s model is {context_of(model):,} tokens")
        asked = {"lengths": lengths, "depths": args.depths, "trials": args.trials, "seed": args.seed}
        asked |= {"full_tail": args.full_tail} if args.full_tail else {}
        results = begin(file, asked)
        read_by = {"model": name_of(getattr(args, side)), "moba": moba, "weights": fingerprint(model)}
        before = results["models"].setdefault(side, read_by)
        if changed := changes(before, {name: read_by[name] for name in before}):
            raise UserError(f"{file} cannot be continued: of {side}, {changed}")
        text = held_out_text(tokenizer, 2 * max(lengths), args)
        cells = [(length, depth) for length in lengths for depth in args.depths if key(length, depth) not in results["right"][side]]
        for length, depth in tqdm(cells, desc=side):
            with one_line("a cell cannot be made"):
                results["right"][side][key(length, depth)] = score(model, tokenizer, text, length, depth, args)
            with one_line("argument --output: cannot write to the folder"):
                args.output.mkdir(parents=True, exist_ok=True)
                write(file, results)
    heat_map(results).savefig(args.output / "needle.png", dpi=120)
    report(results)
    return results


def check_blocks(args: argparse.Namespace) -> None:
    """Raise UserError, before a model is loaded, if MoBA's settings are missing or do not fit together."""
    saved = {}
    if args.moba is not None:
        saved = trained_with(args.moba) if is_adapter(args.moba) else _saved_settings(args.moba)
    given = {name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks") if getattr(args, name) is not None}
    if not saved and not {"block_size", "top_k"} <= given.keys():
        raise UserError("the model of --moba has no settings of MoBA saved with it: give --block-size and --top-k")
    config_of_flags({**saved, **given})


def _saved_settings(folder: Path) -> dict:
    file = folder / "config.json"
    with one_line(f"argument --moba: cannot read {file}"):
        return (json.loads(file.read_text()) if file.is_file() else {}).get("moba") or {}


def load_side(side: str, args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict | None]:
    """The model, its tokenizer, and MoBA's settings if it uses MoBA: the saved ones, overridden by flags."""
    source: Path | None = getattr(args, side)
    adapter = is_adapter(source)
    name, flag = (args.base, "--base") if adapter or source is None else (str(source), f"--{side}")
    model, tokenizer = load(name, args.device, args.dtype, flag)
    if adapter:
        model = with_adapter(model, source)
    if side == "full":
        return model.eval(), tokenizer, None
    saved = getattr(model.config, "moba", None) or {}
    if adapter:
        saved = trained_with(source) or saved
    given = {name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks") if getattr(args, name) is not None}
    if not saved and not {"block_size", "top_k"} <= given.keys():
        raise UserError("the model of --moba has no settings of MoBA saved with it: give --block-size and --top-k")
    try:
        moba_flex.patch(model, {**saved, **given})
    except (TypeError, ValueError) as error:
        raise UserError(f"the model of --moba cannot use MoBA: {with_flags(str(error).splitlines()[0])}") from error
    return model.eval(), tokenizer, json.loads(json.dumps(dict(model.config.moba)))


def is_adapter(source: Path | None) -> bool:
    return source is not None and (source / "adapter_config.json").is_file()


def default_lengths(model: PreTrainedModel) -> list[int]:
    """Powers of two up to the model's context, from 1,024 tokens, or from an eighth of the context if that is less.

    An adapter that examples/adapt.py trained for a longer context has the longer one.
    """
    context = context_of(model)
    return [context >> i for i in reversed(range(8)) if context >> i >= min(1024, context // 8)]


def held_out_text(tokenizer: PreTrainedTokenizerBase, n: int, args: argparse.Namespace) -> Tensor:
    """`[F]`: n tokens of prose and code from `held_out_files`, repeated from the beginning if there are fewer."""
    with one_line("argument --text: cannot read the text around the needle"):
        documents = held_out_files(args.text or default_roots(), max(10 * n, LEAST_BYTES))  # a token has up to 10 bytes
    found = torch.cat([tokens(document.text, tokenizer) for document in documents] or [torch.empty(0)])
    if len(found) == 0:
        raise UserError("there is no held-out text to hide the needle in: name larger folders with --text")
    return found.long().repeat(-(-n // len(found)))[:n]


def held_out_files(roots: list[Path], n_bytes: int) -> list[Document]:
    """About n bytes each of prose and code that neither examples/adapt.py nor examples/pretrain.py trains on.

    Both decide by the hash of a file; the files held out by pretraining are a subset of those held out by `package_text`.
    """
    documents = collect(roots, megabytes=HELD_OUT_OF * n_bytes / 1e6)
    return [document for kind in KINDS for document in documents[kind].held_out if int(document.name[:8], 16) % HELD_OUT_OF == 0]


def begin(file: Path, asked: dict) -> dict:
    """The results in the file, which must have been requested with the same settings; new ones if there is no file."""
    if not file.exists():
        about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "transformers": transformers.__version__}
        return {**about, "asked": asked, "models": {}, "right": {side: {} for side in SIDES}}
    with one_line(f"{file} is no result of this script"):
        results = json.loads(file.read_text())
        results["models"], results["right"], results["asked"]
    if changed := changes(results["asked"], asked):
        raise UserError(f"{file} cannot be continued: {changed}")
    return results


def key(length: int, depth: float) -> str:
    return f"{length} tokens, depth {depth:g}"


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights, independent of the device."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {weight.double().sum().item()} {weight.double().square().sum().item()}".encode())
    return found.hexdigest()[:12]


def name_of(source: Path | None) -> str:
    return "SmolLM2-135M-Instruct" if source is None else "/".join(source.parts[-2:])


def in_words(model: str, moba: Mapping | None = None) -> str:
    """The name of a model in the figure, with the settings of MoBA that read it.

    50M-32768-moba-last-3-full-b512k3-seed0 -> 50M parameters, 32,768 tokens, seed 0      # a run of pretrain.py
                                               trained with MoBA, last 3 layers full (block 512, top-3)
    moba/adapter -> adapter of run moba                                                   # of adapt.py
                    block 64, top-24
    """
    if run := _RUN.fullmatch(model.rpartition("/")[2]):
        size, context, name, blocks, top_k, seed = run.groups()
        blocks = f" (block {blocks}, top-{top_k})" if blocks else ""
        return f"{size} parameters, {int(context):,} tokens, seed {seed}\ntrained with {WORDS.get(name, name.replace('-', ' '))}{blocks}"
    folder, _, last = model.rpartition("/")
    words = last
    if model == "examples/adapter":
        words = "the adapter in examples/adapter"
    elif folder and last == "adapter":
        words = f"adapter of run {folder}"
    elif folder and last in ("full", "moba", "hybrid"):
        words = f"adapter of run {last}"
    if moba:
        words += f"\nblock {moba['block_size']}, top-{moba['top_k']}"
        words += f", full attention in layers {', '.join(map(str, full))}" if (full := moba.get("full_attention_layers")) else ""
    return words


def shares(results: dict, side: str) -> Tensor:
    """`[depths, lengths]`: the share of right trials."""
    asked, right = results["asked"], results["right"][side]
    rows = [[right[key(length, depth)] for length in asked["lengths"]] for depth in asked["depths"]]
    return torch.tensor(rows, dtype=torch.float).mean(-1)


def heat_map(results: dict):
    """A `matplotlib.figure.Figure`, a panel per side: lengths to the right, depths downwards, from red (never right) to green (always)."""
    from matplotlib.figure import Figure

    lengths, depths = results["asked"]["lengths"], results["asked"]["depths"]
    figure = Figure(figsize=(4 + 1.1 * len(lengths), 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side, title in zip(panels, SIDES, ("MoBA", "full attention")):
        share, trials = shares(results, side), [right for cell in results["right"][side].values() for right in cell]
        image = panel.imshow(100 * share.numpy(), vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        model = in_words(results["models"][side]["model"], results["models"][side].get("moba"))
        panel.set_title(f"read with {title}: {sum(trials)} of {len(trials)} right\n{model}", fontsize=10)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)
        panel.set_yticks([i + 0.5 for i in range(len(depths) - 1)], minor=True)
        panel.grid(which="minor", color="white", linewidth=1)
        panel.tick_params(which="minor", length=0)
    figure.supxlabel("length of the text, tokens", fontsize=10)
    panels[0].set_ylabel("depth of the fact in the text")
    figure.colorbar(image, ax=panels, label="trials with the right answer, %")
    return figure


def report(results: dict) -> None:
    """Print how many cells are right on each side, and the cells that only full attention gets right."""
    moba, full = shares(results, "moba"), shares(results, "full")
    print(f"\ncells always right, MoBA            {int((moba == 1).sum()):>4} of {moba.numel()}")
    print(f"cells always right, full attention  {int((full == 1).sum()):>4} of {full.numel()}")
    missed = ((full == 1) & (moba < 1)).nonzero().tolist()
    print(f"right with full attention only      {len(missed):>4}", flush=True)
    for depth, length in missed:
        print(f"    {key(results['asked']['lengths'][length], results['asked']['depths'][depth])}: MoBA {moba[depth, length]:.0%}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag(
        "--moba",
        type=Path,
        metavar="FOLDER",
        help="what reads with MoBA: an adapter of adapt.py or a saved model (default: the demo's model)",
    )
    flag("--full", type=Path, metavar="FOLDER", help="what reads with full attention, likewise (default: the demo's model)")
    flag("--base", metavar="MODEL", help="the model of the adapters: a GGUF file, a folder or a model on the hub (default: the demo's)")
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for needle.json and needle.png (required)")
    flag("--resume", action="store_true", help="go on with what is in --output")
    flag("--lengths", type=count, nargs="+", metavar="N", help="tokens (default: powers of two to the model's context)")
    depths = [i / 10 for i in range(11)]
    flag("--depths", type=fraction, nargs="+", default=depths, metavar="X", help="shares of the text (default: 0 0.1 ... 1)")
    flag("--trials", type=count, default=5, metavar="N", help="needles per cell")
    parser.add_block_flags(**dict.fromkeys(("block_size", "top_k", "sink_blocks"), "what was saved with the model"))
    flag("--full-tail", type=count_from_0, default=0, metavar="N", help="a prompt's last N tokens, its question, read all keys")
    flag("--text", type=Path, nargs="+", metavar="FOLDER", help="where text is looked for (default: all installed packages)")
    flag("--seed", type=int, default=0, metavar="N", help="of the facts and of where the text begins")
    parser.add_device_flags()
    args = parser.parse_args(argv)
    if missing := [folder for folder in args.text or () if not folder.is_dir()]:
        parser.error(f"argument --text: text is read from folders, but {missing[0]} is none")
    for side in SIDES:
        source = getattr(args, side)
        if source is not None and not source.exists():
            parser.error(f"argument --{side}: there is no folder {source}")
        if is_adapter(source):
            check_adapter(f"--{side}", source)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and draw, and return the exit code: 0, or 2 for an error that the user can fix."""
    return exit_code("needle.py", lambda: needle(parse(argv)) and 0)


if __name__ == "__main__":
    run_script(main)
