"""Measure serving of many requests at once with MoBA against sdpa: requests per minute, and how long clients wait for tokens.

    python examples/benchmarks/serving.py                                  # one H200: an 8B in shape, 16 prompts of 32,768 tokens
    python examples/benchmarks/serving.py --tokens 512 --requests 64                  # short prompts
    python examples/benchmarks/serving.py --model tiny --tokens 300 --new 4 --requests 3 --device cpu

transformers' continuous batching serves the same model, patched and with full attention, one after the other in the same run. Weights and
prompts are random. All requests come at once. Times are those of the last of `--rounds` rounds; the first one compiles.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, where the package `shared` is

import argparse
import json
import time
from itertools import pairwise

import torch
from benchmarking.model import MODELS, build
from shared.command_line import Parser, config_of_flags, exit_code
from shared.flag_types import count
from shared.saved_results import check_writable
from shared.startup import run_script
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import moba_flex

SYSTEMS = {"moba_flex": "moba", "sdpa": "full"}


def serve(model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    """Serve all prompts. Seconds but for the rate."""
    greedy = GenerationConfig(max_new_tokens=args.new, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        page_size=args.page_size,
        num_blocks=args.num_pages,
        max_batch_tokens=args.max_batch_tokens,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    done = []
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=batching) as manager:
        began = time.perf_counter()
        manager.add_requests(prompts, max_new_tokens=args.new, record_timestamps=True)
        while len(done) < len(prompts):
            output = manager.get_result(timeout=1)
            if output is not None:
                done.append(output)
            elif not manager.is_running():
                raise RuntimeError(f"continuous batching ended early: {manager.background_thread_status.fatal_error}")
        seconds = time.perf_counter() - began
    if failed := [output.error for output in done if output.error is not None]:
        raise RuntimeError(f"a request failed: {failed[0]}")
    first = [output.timestamps[0] - output.created_time for output in done]
    each = [later - earlier for output in done for earlier, later in pairwise(output.timestamps)]
    return {
        "requests_per_minute": 60 * len(done) / seconds,
        "first_token_median": quantile(first, 0.5),
        "first_token_p95": quantile(first, 0.95),
        "per_token_median": quantile(each, 0.5),
        "per_token_p95": quantile(each, 0.95),
    }


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item() if values else 0.0


def run(args: argparse.Namespace) -> None:
    names = ("block_size", "top_k", "sink_blocks", "decode")
    settings = config_of_flags({name: getattr(args, name) for name in names})
    if args.output is not None:
        check_writable(args.output.parent)
    device = torch.device(args.device)
    model = moba_flex.patch(build(args.model, getattr(torch, args.dtype), device), settings)
    results: dict[str, dict[str, float]] = {}
    for i in range(args.rounds):
        torch.manual_seed(i)
        prompts = torch.randint(model.config.vocab_size, (args.requests, args.tokens)).tolist()
        for system, attention in SYSTEMS.items():
            moba_flex.set_attention(model, attention)
            results[system] = serve(model, prompts, args)
            print(f"round {i + 1} of {args.rounds}, {system}: {results[system]['requests_per_minute']:.1f} requests per minute", flush=True)
    ratio = results["moba_flex"]["requests_per_minute"] / results["sdpa"]["requests_per_minute"]
    print_table(results)
    print(f"requests per minute, moba_flex over sdpa: {ratio:.2f}")
    if args.output is not None:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        given = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
        said = {"device": where, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), **given, "results": results, "ratio": ratio}
        args.output.write_text(json.dumps(said, indent=2) + "\n")


def print_table(results: dict[str, dict[str, float]]) -> None:
    print("| | requests per minute | first token, s: median / p95 | per token, ms: median / p95 |\n|---|---|---|---|")
    for system, found in results.items():
        first = f"{found['first_token_median']:.3f} / {found['first_token_p95']:.3f}"
        each = f"{1000 * found['per_token_median']:.1f} / {1000 * found['per_token_p95']:.1f}"
        print(f"| {system} | {found['requests_per_minute']:.1f} | {first} | {each} |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--model", choices=list(MODELS), default="llama-8b", help="whose shape the model has")
    flag("--requests", type=count, default=16, metavar="N", help="how many requests there are")
    flag("--tokens", type=count, default=32768, metavar="N", help="of each prompt")
    flag("--new", type=count, default=128, metavar="N", help="tokens that each request gets")
    flag("--rounds", type=count, default=2, metavar="N", help="how often all is done, each time with other prompts")
    parser.add_block_flags(block_size=128, top_k=8, sink_blocks=1)
    flag("--decode", choices=["full", "sparse"], default="sparse", help="what generated tokens read: all keys, or their top_k blocks")
    flag("--page-size", type=count, default=256, metavar="N", help="tokens per page of the cache")
    flag("--num-pages", type=count, metavar="N", help="pages of the cache (default: as many as fit into memory)")
    flag("--max-batch-tokens", type=count, default=8192, metavar="N", help="tokens of one forward pass, of all requests together")
    flag("--output", type=Path, metavar="FILE", help="a JSON file for the results (default: none)")
    parser.add_device_flags()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code("serving.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
