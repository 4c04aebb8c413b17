"""Answer many requests at once over HTTP with a language model that uses MoBA (Mixture of Block Attention).

    pip install ".[demo,serve]"
    python examples/serve.py                              # SmolLM2-135M on http://127.0.0.1:8000/v1; Ctrl-C ends it
    python examples/serve.py --model Qwen/Qwen3-8B --block-size 128 --top-k 8 --decode sparse

This is transformers' server with continuous batching. It works with OpenAI clients: /v1/chat/completions, /v1/completions and /v1/models,
streamed or not. For each request it prints the tokens per second and the share of the keys that were read.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import socket

from shared.command_line import Parser, config_of_flags, exit_code, one_line
from shared.flag_types import count, count_from_0
from shared.models import check_layers, load
from shared.startup import run_script

import moba_flex

SETTINGS = ("block_size", "top_k", "sink_blocks", "full_attention_layers", "decode")


def run(args: argparse.Namespace) -> None:
    with one_line('the packages of the server are missing: pip install ".[serve]"'):
        from shared.server import serve
    settings = config_of_flags({name: getattr(args, name) for name in SETTINGS})
    check_layers("--full-attention-layers", args.full_attention_layers, args.model)
    with one_line(f"cannot listen on {args.host}, port {args.port}"):
        listening = socket.create_server((args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    model, tokenizer = load(args.model, args.device, args.dtype)
    with one_line("MoBA cannot be used with this model"):
        moba_flex.patch(model, settings)
    name = "SmolLM2-135M-Instruct" if args.model is None else args.model.removesuffix(".gguf")
    batching = {"page_size": args.page_size, "num_blocks": args.num_pages, "max_batch_tokens": args.max_batch_tokens}
    serve(model, tokenizer, name, listening, batching)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    parser.add_model_flag()
    parser.add_block_flags(block_size=128, top_k=8, sink_blocks=1, full_attention_layers=())
    flag("--decode", choices=["full", "sparse"], default="sparse", help="what generated tokens read: all keys, or their top_k blocks")
    flag("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 lets other machines in, whoever they are")
    flag("--port", type=count_from_0, default=8000, metavar="N", help="the port; 0: any that is free")
    flag("--page-size", type=count, default=256, metavar="N", help="tokens per page of the cache; best a multiple of --block-size")
    flag("--num-pages", type=count, metavar="N", help="pages of the cache (default: as many as fit into memory)")
    flag("--max-batch-tokens", type=count, default=2048, metavar="N", help="tokens of one forward pass, of all requests together")
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C. Returns the exit code: 2 for an error that the user can fix."""
    return exit_code("serve.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
