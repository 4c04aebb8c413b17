"""What do blocks of other sizes cost a model? Held-out loss with each of them, beside that of full attention.

    pip install ".[demo]"
    python examples/compare_blocks.py                                   # SmolLM2-135M as it is; three minutes a setting on two CPU cores
    python examples/compare_blocks.py --blocks 64x16 64x16+18 --resume  # goes on in that file; layer 18 is full in the second
    python examples/compare_blocks.py --adapter adapted/moba/adapter --control adapted/full/adapter --blocks 64x24 32x48 --output 32x48.json

A setting is BLOCKxTOPK, tokens a block and blocks read, and after a + the layers that keep full attention. With an adapter of
`examples/adapt.py` all settings read with it, whatever blocks it was trained with, and full attention with `--control`. Nothing is trained.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # See examples/llama.py.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import copy
import hashlib
import re
from pathlib import Path

from adapt import losses, print_results
from adapting.text import add_held_out_flags, check_length, held_out
from demo_weights import DemoError
from kept_results import KeptResults
from llama import Parser, exit_code, load, one_line, with_adapter

import moba_flex

FULL = "full"
SETTINGS = ("sequences", "sequence_length", "sink_blocks", "model")


def compare(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure what `--output` lacks, and print. Losses by setting and kind of text."""
    configs = {text: config_of(text, args.sink_blocks) for text in args.blocks}
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
    kept = KeptResults(args.output, args.resume, "loss", settings)

    def measured(name: str) -> dict[str, list[float]]:
        model = models[sides[name]]
        model = moba_flex.patch(model, configs[name]) if name != FULL else moba_flex.unpatch(model)
        return {kind: losses(model, ids, f"{name}, {kind}") for kind, ids in text.items()}

    found = {name: kept.get(name, lambda name=name: measured(name)) for name in sides}
    print_results(found, tuple(found))
    return found


def fingerprint(adapter: Path | None) -> str | None:
    """Which adapter it is, wherever it lies."""
    return None if adapter is None else hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]


def config_of(text: str, sink_blocks: int) -> moba_flex.MobaConfig:
    """That of "64x24", or "64x24+17,18,20" with full attention in some layers."""
    if not (parts := re.fullmatch(r"(\d+)x(\d+)(?:\+(-?\d+(?:,-?\d+)*))?", text)):
        raise DemoError(
            f"--blocks takes BLOCKxTOPK, such as 64x24, or with full attention in some layers 64x24+17,18, but is given {text!r}"
        )
    layers = tuple(int(n) for n in parts[3].split(",")) if parts[3] else ()
    with one_line(f"--blocks {text} cannot be"):
        return moba_flex.MobaConfig(block_size=int(parts[1]), top_k=int(parts[2]), sink_blocks=sink_blocks, full_attention_layers=layers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--blocks", nargs="+", default=["128x8", "64x16", "32x32"], metavar="BLOCKxTOPK", help="settings (default: 128x8 64x16 32x32)")
    flag("--model", help="a GGUF file, a local folder or a model on the hub (default: SmolLM2-135M-Instruct, from PyPI)")
    flag("--adapter", type=Path, metavar="FOLDER", help="of examples/adapt.py, for all settings (default: the model as it is)")
    flag("--control", type=Path, metavar="FOLDER", help="an adapter for full attention (default: the model as it is)")
    flag("--output", type=Path, default=Path("compare_blocks.json"), metavar="FILE", help="losses (default: compare_blocks.json)")
    flag("--resume", action="store_true", help="go on with what is in --output")
    add_held_out_flags(parser, 4, 8192)
    flag("--sink-blocks", type=int, default=1)
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit code: 0, or 2 for something that whoever runs it can mend."""
    return exit_code("compare_blocks.py", lambda: compare(parse(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
