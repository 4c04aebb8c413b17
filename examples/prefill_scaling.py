"""Prefill of one attention layer with its sequence on several processes: time, bytes sent, peak memory.

    torchrun --standalone --nproc-per-node 8 examples/prefill_scaling.py --tokens 1048576
    torchrun --standalone --nproc-per-node 2 examples/prefill_scaling.py --tokens 2048 --block-size 128 --top-k 4      # CPUs, to try it out

Prints one line of JSON. With one process, also without torchrun, it is the plain operation. docs/scaling.md has the formulas that
predict it.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moba_flex.distributed import moba_attention_cp


def main(args: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    length = args.tokens // mesh.size()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(mesh.get_rank())
    query, key, value = (torch.randn(1, h, length, args.width, device=device, dtype=dtype) for h in (args.heads, args.groups, args.groups))
    settings = {"block_size": args.block_size, "top_k": args.top_k, "exchange": args.exchange}

    times = []
    for _ in range(args.repeats + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        with torch.no_grad():
            moba_attention_cp(query, key, value, mesh, **settings)
        synchronize(device)
        slowest = torch.tensor(time.perf_counter() - started, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(slowest.item())
    memory = torch.tensor(torch.cuda.max_memory_allocated() if device == "cuda" else 0, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    return {
        "processes": mesh.size(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens": length * mesh.size(),
        **settings,
        "milliseconds": 1000 * sorted(times[1:])[args.repeats // 2],  # the first one compiles
        "GB_sent_by_each": bytes_sent(args, length, mesh.size(), query.element_size()) / 1e9,
        "peak_GB": memory.item() / 1e9,
    }


def bytes_sent(args: argparse.Namespace, length: int, size: int, e: int) -> float:
    """The formulas of docs/scaling.md, which tests hold against what is sent."""
    if args.exchange == "keys":
        return (size - 1) * length * 2 * args.groups * args.width * e
    return (size - 1) / size * length * 2 * (args.heads + max(args.groups, size)) * args.width * e


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key heads")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--exchange", choices=("keys", "heads"), default="keys")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    result = main(arguments)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    if torch.cuda.is_available():
        dist.destroy_process_group()
