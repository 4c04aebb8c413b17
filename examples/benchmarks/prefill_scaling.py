"""Measure one attention layer with MoBA whose sequence is split over several processes: time, bytes sent and peak memory of a prefill.

    torchrun --standalone --nproc-per-node 8 examples/benchmarks/prefill_scaling.py --tokens 1048576
    torchrun --standalone --nproc-per-node 4 examples/benchmarks/prefill_scaling.py --tokens 10485760 --repeats 1 --check 512 --pieces 2
    torchrun --standalone --nproc-per-node 2 examples/benchmarks/prefill_scaling.py --tokens 2048 --block-size 128 --top-k 4    # on CPUs

Prints a line of JSON for each of `--tokens` and `--exchange`. With one process, also without torchrun, it measures the plain operation.
docs/scaling.md has the formulas that predict the results. `--check N` recomputes N queries, spread over all slices, in float64: gate and
attention in plain PyTorch, the keys of one head at a time from all processes. `--pieces` processes the heads in groups, one after another,
if all at once take too much memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import json
import time
from itertools import product

import torch
import torch.distributed as dist
from benchmarking.processes import process_group, synchronize
from shared.command_line import Parser, exit_code
from shared.flag_types import count, count_from_0
from shared.startup import run_script
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moba_flex.core.settings import AttentionSettings
from moba_flex.distributed import moba_attention_cp
from moba_flex.distributed.collectives import gathered
from moba_flex.ops.decoding import KeyValueReader, attend_to_blocks, blocks_to_read, means_for, write_means

APART = 0.05  # larger errors come from the gate: another block was equally good within rounding; bfloat16 rounds to 0.004


def measure(args: argparse.Namespace, tokens: int, exchange: str) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    length = tokens // mesh.size()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(mesh.get_rank())
    query, key, value = (
        torch.randn(1, h, length, args.width, device=device, dtype=dtype) for h in (args.heads, args.key_heads, args.key_heads)
    )
    settings = {"block_size": args.block_size, "top_k": args.top_k, "exchange": exchange}
    ratio, share = args.heads // args.key_heads, args.key_heads // args.pieces
    place = torch.linspace(0, length - 1, max(1, args.check // mesh.size()), device=device).long()
    checked = query[:, :, place].double() if args.check else None  # only of these queries: all outputs would be a third of the memory

    times = []
    for _ in range(args.repeats + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        with torch.no_grad():
            for first in range(0, args.key_heads, share):
                groups, heads = slice(first, first + share), slice(first * ratio, (first + share) * ratio)
                part = moba_attention_cp(query[:, heads], key[:, groups], value[:, groups], mesh, **settings)
                if checked is not None:
                    checked[:, heads] = part[:, :, place].double()
                del part
        synchronize(device)
        slowest = torch.tensor(time.perf_counter() - started, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(slowest.item())
    memory = torch.tensor(torch.cuda.max_memory_allocated() if device == "cuda" else 0, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    found = {} if checked is None else check(args, query, key, value, checked, place, mesh)
    return {
        "processes": mesh.size(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens": length * mesh.size(),
        **settings,
        "pieces": args.pieces,
        "milliseconds": 1000 * sorted(times[1:])[args.repeats // 2],  # the first one compiles
        "GB_sent_by_each": bytes_sent(args, exchange, length, mesh.size(), query.element_size()) / 1e9,
        "peak_GB": memory.item() / 1e9,
        **found,
    }


@torch.no_grad()
def check(
    args: argparse.Namespace, query: Tensor, key: Tensor, value: Tensor, out: Tensor, place: Tensor, mesh: DeviceMesh
) -> dict[str, float]:
    """Relative errors of the outputs of queries `place` of each slice, for all heads, compared with float64."""
    length, ratio = query.shape[2], args.heads // args.key_heads
    token = mesh.get_rank() * length + place
    settings = AttentionSettings(args.block_size, args.top_k, scale=args.width**-0.5)
    errors = []
    for g in range(args.key_heads):
        k, v = (gathered(x[0, g].contiguous(), mesh.get_group())[None, None] for x in (key, value))  # [1, 1, N, D]
        means = means_for(k.new_empty(1, 1, 0, args.width, dtype=torch.float64), k.shape[2] // args.block_size)
        for c in range(0, means.shape[2], 64):  # a few in float64 at a time
            of_blocks = k[:, :, c * args.block_size : (c + 64) * args.block_size].double()
            write_means(means[:, :, c : c + 64], of_blocks, None, args.block_size)
        heads = slice(g * ratio, (g + 1) * ratio)
        q = query[:, heads, place][:, None].double()  # [1, 1, R, n, D]
        blocks = blocks_to_read(q, means, token[None], settings)
        wanted, _ = attend_to_blocks(q, KeyValueReader.of(k, v), blocks, token.new_zeros(1, 1), token, settings)
        errors.append(((out[:, heads] - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten())
    every = gathered(torch.cat(errors), mesh.get_group())
    apart = every > APART
    return {
        "queries_checked": len(place) * mesh.size() * args.heads,
        "largest_error": every[~apart].max().item() if (~apart).any() else float("nan"),
        "median_error": every.median().item(),
        "share_that_chose_other_blocks": apart.double().mean().item(),
    }


def bytes_sent(args: argparse.Namespace, exchange: str, length: int, size: int, e: int) -> float:
    """The formulas of docs/scaling.md, which tests compare with the bytes sent."""
    if exchange == "keys":
        return (size - 1) * length * 2 * args.key_heads * args.width * e
    return (size - 1) / size * length * 2 * (args.heads + max(args.key_heads, size)) * args.width * e


def run(args: argparse.Namespace) -> None:
    with process_group("cuda" if torch.cuda.is_available() else "cpu"):
        for tokens, exchange in product(args.tokens, args.exchange):
            result = measure(args, tokens, exchange)
            if dist.get_rank() == 0:
                print(json.dumps(result), flush=True)
            torch.cuda.empty_cache()  # the next measurement has other sizes
        dist.barrier()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--tokens", type=count, nargs="+", default=[1 << 20], metavar="N", help="of the sequence, over all processes")
    flag("--heads", type=count, default=32, metavar="N", help="query heads")
    flag("--key-heads", type=count, default=8, metavar="N", help="key and value heads")
    parser.add_other_name("--groups", "--key-heads")
    flag("--width", type=count, default=128, metavar="N", help="dimension of a head")
    parser.add_block_flags(block_size=4096, top_k=12)
    flag("--exchange", choices=("keys", "heads"), nargs="+", default=["keys"], help="what the processes send each other")
    flag("--pieces", type=count, default=1, metavar="N", help="groups of heads that are worked on one after the other")
    flag("--check", type=count_from_0, default=0, metavar="N", help="queries that are compared with float64")
    flag("--repeats", type=count, default=3, metavar="N", help="timings, of which the median counts")

    def work() -> None:
        args = parser.parse_args(argv)
        if args.heads % args.key_heads:
            parser.error(f"argument --heads: must be a multiple of --key-heads {args.key_heads}, but is {args.heads}")
        if args.key_heads % args.pieces:
            parser.error(f"argument --pieces: must divide --key-heads {args.key_heads}, but is {args.pieces}")
        run(args)

    return exit_code("prefill_scaling.py", work)


if __name__ == "__main__":
    run_script(main)
