"""Draw which blocks of a text a pretrained language model reads with MoBA (Mixture of Block Attention), as two pictures.

    pip install ".[demo,viz]"
    python examples/inspect_blocks.py             # writes blocks.png, one layer's heads, and model.png, all layers
    python examples/inspect_blocks.py --layer 12 --top-k 4 --output pictures
    python examples/inspect_blocks.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file book.txt --block-size 512

The model and the text are those of examples/llama.py. It needs the memory of one forward pass: each layer's queries are freed after it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
from pathlib import Path

from llama import print_table, read_prompt, tokenize
from shared.command_line import Parser, config_of_flags, exit_code, one_line
from shared.models import check_layers, load
from shared.saved_results import check_writable
from shared.startup import run_script

import moba_flex


def run(args: argparse.Namespace) -> None:
    with one_line('cannot draw, since matplotlib is not installed: pip install ".[demo,viz]"'):
        import matplotlib.figure  # noqa: F401
    settings = config_of_flags({name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks")})
    check_layers("--layer", [args.layer], args.model)
    check_writable(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    text = read_prompt(args.prompt_file)
    model, tokenizer = load(args.model, args.device, args.dtype)
    prompt = tokenize(text, model, tokenizer, max_new_tokens=0)

    with one_line("cannot look into this model"):
        trace = moba_flex.trace(model, prompt, config=settings, selections=[args.layer])
    (layer,) = trace.selections
    name = "SmolLM2-135M-Instruct" if args.model is None else Path(args.model).name
    title = f"{name}, layer {layer}: {prompt.shape[1]:,} tokens in blocks of {settings.block_size}, top-{settings.top_k}"
    with one_line("cannot write the pictures"):
        moba_flex.visualize(trace.selections[layer], title=title).savefig(args.output / "blocks.png")
        figure = trace.figure()
        figure.suptitle(f"{name}, {figure.get_suptitle()}", fontsize=12)
        figure.savefig(args.output / "model.png")
    print(f"Wrote {args.output / 'blocks.png'} and {args.output / 'model.png'}")
    print_table(
        {
            "prompt tokens": f"{prompt.shape[1]:,}",
            "share of keys read": f"{trace.share_of_keys.mean():.1%}",
            "choices shared with the next query": f"{trace.overlap.nanmean():.1%}",
        }
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    parser.add_model_flag()
    flag("--layer", type=int, default=20, metavar="N", help="the layer in blocks.png, negative from the last")
    flag("--output", type=Path, default=Path(), metavar="FOLDER", help="where the pictures go (default: the current folder)")
    parser.add_other_name("--folder", "--output")
    parser.add_block_flags(block_size=128, top_k=8, sink_blocks=1)
    for old, new in (("chunk-size", "block-size"), ("topk", "top-k"), ("sink-blocks", "sink-blocks")):
        parser.add_other_name(f"--moba-{old}", f"--{new}")
    flag("--prompt-file", type=Path, metavar="FILE", help="a text to read (default: files of Python's standard library, and a question)")
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw, and return the exit code: 0, or 2 for an error that the user can fix."""
    return exit_code("inspect_blocks.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
