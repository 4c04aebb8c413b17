"""Measure serving of many requests at once with MoBA against sdpa: requests per minute, and how long clients wait for tokens.

    python examples/benchmarks/serving.py                                  # one H200: an 8B in shape, 16 prompts of 32,768 tokens
    python examples/benchmarks/serving.py --tokens 512 32768 --requests 64 16         # short prompts, then long ones
    python examples/benchmarks/serving.py --model tiny --tokens 300 --new 4 --requests 3 --num-pages 16 --device cpu

transformers' continuous batching serves the same model, patched and with full attention, in the same run; the two take turns in being
first. Weights and prompts are random. All requests arrive at once. Times are those of the last of `--rounds` rounds. The first round
compiles, unless a warm-up with a few requests of half the length precedes it (`--warm-up`). With `--limit`, a system whose requests take
longer is stopped; the printed rate is then an upper bound.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
import transformers
from benchmarking.model import MODELS, build
from shared.command_line import Parser, UserError, config_of_flags, exit_code
from shared.flag_types import count, count_from_0, positive
from shared.saved_results import check_writable, write
from shared.startup import run_script
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import moba_flex

SYSTEMS = {"moba_flex": "moba", "sdpa": "full"}
WARM_UP_NEW = 16  # largest number of new tokens per request of the warm-up

Results = dict[str, dict[str, float]]


def serve(model: PreTrainedModel, prompts: list[list[int]], new: int, args: argparse.Namespace) -> dict[str, float]:
    """Serve all prompts with `new` tokens each. Returns seconds, and the rate."""
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        page_size=args.page_size,
        num_blocks=args.num_pages,
        max_batch_tokens=args.max_batch_tokens,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    done: list = []
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=batching) as manager:
        began = time.perf_counter()
        manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True)
        try:
            while len(done) < len(prompts) and (args.limit is None or time.perf_counter() - began < args.limit):
                output = manager.get_result(timeout=1)
                if output is not None:
                    done.append(output)
                elif not manager.is_running():
                    raise RuntimeError(f"continuous batching ended early: {manager.background_thread_status.fatal_error}")
            seconds = time.perf_counter() - began
        finally:
            if len(done) < len(prompts):
                manager.stop(hard_stop=True)  # without this, leaving the block waits until all requests are finished
    if failed := [output.error for output in done if output.error is not None]:
        raise RuntimeError(f"a request failed: {failed[0]}")
    first = [output.timestamps[0] - output.created_time for output in done]
    each = [later - earlier for output in done for earlier, later in pairwise(output.timestamps)]
    measured = {"requests_per_minute": 60 * len(prompts) / seconds}
    if len(done) < len(prompts):  # the rate is then a bound, and the requests that waited longest have not finished
        return {**measured, "finished": len(done)}
    return {
        **measured,
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
    runs: list[dict] = []
    for tokens, requests, rounds in zip(args.tokens, args.requests, args.rounds):
        if args.warm_up:
            prompts = random_prompts(model, args.warm_up, max(1, tokens // 2), seed=-1)
            whole = argparse.Namespace(**{**vars(args), "limit": None})  # no limit, which would include compilation
            list(served(model, prompts, min(args.new, WARM_UP_NEW), whole))
        runs.append({"tokens": tokens, "requests": requests, "rounds": []})
        for i in range(rounds):
            results: Results = {}
            runs[-1]["rounds"].append(results)
            for system, found in served(model, random_prompts(model, requests, tokens, seed=i), args.new, args, turned=i % 2 == 1):
                results[system] = found
                save(runs, device, args)
                said = f"{tokens:,} tokens, round {i + 1} of {rounds}, {system}"
                print(f"{said}: {rate(found)} requests per minute", flush=True)
        print_table(runs[-1])


def served(
    model: PreTrainedModel, prompts: list[list[int]], new: int, args: argparse.Namespace, turned: bool = False
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each system with its times; `turned`: the last one first."""
    systems = list(SYSTEMS.items())
    for system, attention in reversed(systems) if turned else systems:
        moba_flex.set_attention(model, attention)
        yield system, serve(model, prompts, new, args)


def random_prompts(model: PreTrainedModel, requests: int, tokens: int, seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    return torch.randint(model.config.vocab_size, (requests, tokens)).tolist()


def rate(found: dict[str, float]) -> str:
    """Requests per minute; or an upper bound, and how many have finished."""
    number = f"{found['requests_per_minute']:.1f}"
    return f"less than {number} ({found['finished']} finished)" if "finished" in found else number


def ratio(results: Results) -> str:
    """Requests per minute of the patched model, divided by those of full attention."""
    moba, full = results["moba_flex"], results["sdpa"]
    number = f"{moba['requests_per_minute'] / full['requests_per_minute']:.2f}"
    if "finished" in moba:
        return "unknown" if "finished" in full else f"less than {number}"
    return f"more than {number}" if "finished" in full else number


def save(runs: list[dict], device: torch.device, args: argparse.Namespace) -> None:
    """Write everything measured so far: later measurements may fail."""
    if args.output is None:
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    given = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    write(args.output, {**given, "device": where, **versions, "date": time.strftime("%Y-%m-%d"), "runs": runs})


def print_table(run: dict) -> None:
    """Print the last round, and the ratios of all rounds, which vary."""
    print(f"\n{run['requests']} requests of {run['tokens']:,} tokens\n")
    print("| | requests per minute | first token, s: median / p95 | per token, ms: median / p95 |\n|---|---|---|---|")
    for system in SYSTEMS:
        found = run["rounds"][-1][system]
        first = each = "-"
        if "finished" not in found:
            first = f"{found['first_token_median']:.3f} / {found['first_token_p95']:.3f}"
            each = f"{1000 * found['per_token_median']:.1f} / {1000 * found['per_token_p95']:.1f}"
        print(f"| {system} | {rate(found)} | {first} | {each} |")
    ratios = ", ".join(ratio(results) for results in run["rounds"])
    print(f"\nrequests per minute, moba_flex over sdpa, round by round: {ratios}\n", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--model", choices=list(MODELS), default="llama-8b", help="whose shape the model has")
    flag("--tokens", type=count, nargs="+", default=[32768], metavar="N", help="of each prompt; several are measured in turn")
    flag("--requests", type=count, nargs="+", default=[16], metavar="N", help="how many requests there are, for all lengths or for each")
    flag("--new", type=count, default=128, metavar="N", help="tokens that each request gets")
    flag("--rounds", type=count, nargs="+", default=[2], metavar="N", help="how often that is done, each time with other prompts")
    flag("--warm-up", type=count_from_0, default=0, metavar="N", help="requests of half the length that come before the first round")
    flag("--limit", type=positive, metavar="SECONDS", help="for one system's requests (default: none)")
    parser.add_block_flags(block_size=128, top_k=8, sink_blocks=1)
    flag("--decode", choices=["full", "sparse"], default="sparse", help="what generated tokens read: all keys, or their top_k blocks")
    flag("--page-size", type=count, default=256, metavar="N", help="tokens per page of the cache")
    flag("--num-pages", type=count, metavar="N", help="pages of the cache (default: as many as fit into memory)")
    flag("--max-batch-tokens", type=count, default=8192, metavar="N", help="tokens of one forward pass, of all requests together")
    flag("--output", type=Path, metavar="FILE", help="a JSON file for the results (default: none)")
    parser.add_device_flags()
    args = parser.parse_args(argv)
    for flag_name, given in (("--requests", args.requests), ("--rounds", args.rounds)):
        if len(given) not in (1, len(args.tokens)):
            raise UserError(f"argument {flag_name}: must be one number or as many as --tokens ({len(args.tokens)}), but is {len(given)}")
        given *= len(args.tokens) // len(given)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code("serving.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
