"""Measure a whole model with MoBA whose prompt several processes share: the time to the first token, and per following token.

    torchrun --standalone --nproc-per-node 4 examples/benchmarks/model_prefill.py --tokens 1048576
    torchrun --standalone --nproc-per-node 2 examples/benchmarks/model_prefill.py --tiny --tokens 512 --block-size 16 --top-k 3    # on CPUs

The model is a Llama of 1B in shape, with random weights; the prompt is read in one pass. Prints one line of JSON, with "out_of_memory":
true if a GPU has too little memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from benchmarking.model import build
from benchmarking.processes import process_group, synchronize
from shared.command_line import Parser, config_of_flags, exit_code
from shared.flag_types import count
from shared.startup import run_script

import moba_flex
from moba_flex.distributed import context_parallel, watch_processes


def measure(args: argparse.Namespace, device: str) -> dict:
    shape = "tiny" if args.tiny else "llama-1b"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(shape, dtype, torch.device(device), positions=args.tokens + args.new_tokens)
    settings = {name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks", "full_attention_layers")}
    moba_flex.patch(model, config_of_flags({**settings, "decode": "sparse"}))
    if dist.get_world_size() > 1:
        context_parallel(model, dist.group.WORLD, exchange=args.exchange)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    warm = ids[:, : min(args.tokens, 4 * dist.get_world_size() * args.block_size)]
    model.generate(warm, attention_mask=torch.ones_like(warm), max_new_tokens=2, do_sample=False)  # compiles

    seconds, memory, tokens = [], 0.0, None
    for new in (1, 1, 1 + args.new_tokens):  # the first one allocates, and compiles what only long prompts need
        synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    return {
        "processes": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": shape,
        "tokens": args.tokens,
        **settings,
        "exchange": args.exchange,
        "seconds_to_first_token": seconds[1],
        "milliseconds_per_new_token": 1000 * (seconds[2] - seconds[1]) / args.new_tokens,
        "peak_GB_of_process_0": memory,
        "new_tokens": tokens[0, args.tokens :].tolist(),
    }


def run(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    with process_group(device):
        watch = watch_processes(silent=120.0)  # long, because kernels are compiled
        try:
            result = measure(args, device)
        except torch.OutOfMemoryError as error:
            print(json.dumps({"tokens": args.tokens, "out_of_memory": True, "said": str(error).splitlines()[0]}), flush=True)
            os._exit(3)  # the others wait for this one, and no exception would reach them
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        dist.barrier()
        watch.end()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--tokens", type=count, default=1 << 20, metavar="N", help="of the prompt")
    flag("--new-tokens", type=count, default=8, metavar="N", help="that are generated behind the first, with sparse decoding")
    parser.add_block_flags(block_size=4096, top_k=12, sink_blocks=1, full_attention_layers=[])
    flag("--exchange", choices=("keys", "heads"), default="keys", help="what the processes send each other")
    flag("--tiny", action="store_true", help="a tiny Llama")
    flag("--cpu", action="store_true", help="on CPUs, even where there are GPUs")

    def work() -> None:
        run(parser.parse_args(argv))

    return exit_code("model_prefill.py", work)


if __name__ == "__main__":
    run_script(main)
