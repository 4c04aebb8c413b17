"""Measure what other block sizes of MoBA cost a pretrained model: the loss with each of them, beside that of full attention.

    pip install ".[demo]"
    cd examples/experiments
    python compare_blocks.py                                   # SmolLM2-135M as it is; three minutes per setting on two CPU cores
    python compare_blocks.py --blocks 64x16 64x16+18 --resume  # goes on in that file; layer 18 is full in the second
    python compare_blocks.py --adapter adapted/moba/adapter --control adapted/full/adapter --blocks 64x24 32x48 --output 32x48.json

A setting is BLOCKxTOPK, tokens per block and blocks read, and after a + the layers that keep full attention. With an adapter of
`adapt.py` all settings read with it, whatever blocks it was trained with, and full attention with `--control`. Nothing is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, where the package `shared` is

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import copy
import hashlib
import re

from adapt import losses, print_results
from adapting.text import add_held_out_flags, check_folders, check_length, held_out
from shared.command_line import Parser, UserError, exit_code, one_line
from shared.models import check_adapter, check_layers, load, with_adapter
from shared.saved_results import SavedResults, check_writable
from shared.startup import run_script

import moba_flex

FULL = "full"
SETTINGS = ("sequences", "sequence_length", "sink_blocks", "model")


def compare(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure what `--output` lacks, and print. Losses by setting and kind of text."""
    configs = {text: config_of(text, args.sink_blocks) for text in args.blocks}
    check_folders(args)
    check_writable(args.output.parent)
    for name in ("adapter", "control"):
        check_adapter(f"--{name}", getattr(args, name))
    for text, config in configs.items():
        check_layers(f"--blocks {text}", config.full_attention_layers, args.model)
    base, tokenizer = load(args.model, args.device, args.dtype)
    check_length(args, base)
    with one_line("this model cannot use MoBA"):
        for config in configs.values():
            moba_flex.patch(base, config)
        moba_flex.unpatch(base)
    sides = {FULL: args.control, **dict.fromkeys(configs, args.adapter)}
    models = {folder: base if folder is None else with_adapter(copy.deepcopy(base), folder) for folder in dict.fromkeys(sides.values())}
    text = held_out(args, tokenizer)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"text": [int(ids.sum()) for ids in text.values()]}
    settings |= {"adapter": fingerprint(args.adapter), "control": fingerprint(args.control)}
    saved = SavedResults(args.output, args.resume, "loss", settings)

    def measured(name: str) -> dict[str, list[float]]:
        model = models[sides[name]]
        model = moba_flex.patch(model, configs[name]) if name != FULL else moba_flex.unpatch(model)
        return {kind: losses(model, ids, f"{name}, {kind}") for kind, ids in text.items()}

    found = {name: saved.get(name, lambda name=name: measured(name)) for name in sides}
    print_results(found, tuple(found))
    return found


def fingerprint(adapter: Path | None) -> str | None:
    """Which adapter it is, wherever it lies."""
    return None if adapter is None else hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]


def config_of(text: str, sink_blocks: int) -> moba_flex.MobaConfig:
    """That of "64x24", or "64x24+17,18,20" with full attention in some layers."""
    if not (parts := re.fullmatch(r"(\d+)x(\d+)(?:\+(-?\d+(?:,-?\d+)*))?", text)):
        raise UserError(
            f"--blocks takes BLOCKxTOPK, such as 64x24, or with full attention in some layers 64x24+17,18, but is given {text!r}"
        )
    layers = tuple(int(n) for n in parts[3].split(",")) if parts[3] else ()
    with one_line(f"--blocks {text} cannot be"):
        return moba_flex.MobaConfig(block_size=int(parts[1]), top_k=int(parts[2]), sink_blocks=sink_blocks, full_attention_layers=layers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--blocks", nargs="+", default=["128x8", "64x16", "32x32"], metavar="BLOCKxTOPK", help="settings to compare")
    parser.add_model_flag()
    flag("--adapter", type=Path, metavar="FOLDER", help="an adapter of adapt.py, for all settings (default: the model as it is)")
    flag("--control", type=Path, metavar="FOLDER", help="an adapter for full attention (default: the model as it is)")
    flag("--output", type=Path, default=Path("compare_blocks.json"), metavar="FILE", help="for the losses")
    flag("--resume", action="store_true", help="go on with what is in --output")
    add_held_out_flags(parser, 4, 8192)
    parser.add_block_flags(sink_blocks=1)
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit code: 0, or 2 for something that the user can mend."""
    return exit_code("compare_blocks.py", lambda: compare(parse(argv)) and 0)


if __name__ == "__main__":
    run_script(main)
