"""Measure each step of one MoBA attention call on a CUDA GPU: gate, routing, attention, merge, and the backward steps.

    python examples/benchmarks/phases.py

The settings are those of one row of the benchmark with fewer heads. Times are medians of event timings on random bfloat16 data.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import statistics
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from benchmarking.measure import milliseconds
from shared.command_line import Parser, UserError, exit_code
from shared.flag_types import count
from shared.startup import run_script

from moba_flex import moba_attention

# The measured steps. Not public, and may be renamed.
from moba_flex.backends import flex
from moba_flex.core.layout import slots_per_block
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings


def median(call, repeats: int = 7, together: int = 4) -> float:
    """The median milliseconds of `call` on the GPU, after a warm-up. A sample is `together` calls, so that launches overlap with work."""
    call()
    return statistics.median(milliseconds(call, torch.device("cuda"), together) for _ in range(repeats))


def tensors(batch: int, heads: int, groups: int, tokens: int, width: int, **options):
    return [torch.randn(batch, h, tokens, width, device="cuda", dtype=torch.bfloat16, **options) for h in (heads, groups, groups)]


@torch.no_grad()
def phases(heads: int, groups: int, tokens: int, width: int, block_size: int, top_k: int) -> dict[str, float]:
    """Milliseconds of each step at batch 1, forward and backward."""
    from moba_flex.ops import triton as kernels

    q, k, v = tensors(1, heads, groups, tokens, width)
    grad = torch.randn_like(q)
    settings = AttentionSettings(block_size, top_k, scale=width**-0.5, implementation="flex")
    layout = dense_layout(1, tokens, tokens, block_size, slots_per_block(block_size), q.device)
    q, k, v, grad = layout.query_slots(q), layout.key_slots(k), layout.key_slots(v), layout.query_slots(grad)
    layout = layout.in_slots()
    pairs = heads * layout.max_pairs(settings.n_routed, True)

    chosen = kernels.choose(q, k, layout, settings)
    routes = flex.route(chosen, groups, layout.n_key_blocks, pairs)
    row_q = kernels.dispatch(q, routes)
    row_out, row_lse = flex.routed(row_q, k, v, routes, layout, settings)
    out, lse = flex.local(q, k, v, layout, settings)
    delta = kernels.delta(out, grad, None)
    rows = kernels.dispatch_backward(q, grad, lse, delta, routes)
    merged, total = torch.empty_like(out), torch.empty_like(lse)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    row_dq = flex.routed_backward(*rows, k, v, routes, layout, settings)[0]
    steps = {
        "gate": lambda: kernels.choose(q, k, layout, settings),
        "order rows": lambda: flex.route(chosen, groups, layout.n_key_blocks, pairs),
        "dispatch": lambda: kernels.dispatch(q, routes),
        "routed call": lambda: flex.routed(row_q, k, v, routes, layout, settings),
        "local call": lambda: flex.local(q, k, v, layout, settings),
        "merge": lambda: kernels.merge(out, lse, row_out, row_lse, routes, layout, (merged, total)),
        "delta": lambda: kernels.delta(out, grad, None),
        "dispatch backward": lambda: kernels.dispatch_backward(q, grad, lse, delta, routes),
        "routed backward": lambda: flex.routed_backward(*rows, k, v, routes, layout, settings),
        "local backward": lambda: flex.local_backward(q, k, v, grad, lse, delta, layout, settings),
        "sum gradients": lambda: kernels.sum_rows(grad, row_dq, routes, merged),
        "backward, all of it": lambda: flex.backward(q, k, v, grad, lse, delta, routes, layout, settings, grads),
    }
    return {name: median(step) for name, step in steps.items()}


def totals(batch: int, heads: int, groups: int, tokens: int, width: int, block_size: int, top_k: int) -> dict[str, float]:
    """Milliseconds and peak gigabytes of the whole operation, forward and forward + backward."""
    leaves = tensors(batch, heads, groups, tokens, width, requires_grad=True)
    grad = torch.randn(batch, heads, tokens, width, device="cuda", dtype=torch.bfloat16)

    def forward():
        with torch.no_grad():
            moba_attention(*leaves, block_size=block_size, top_k=top_k)

    def both():
        torch.autograd.grad(moba_attention(*leaves, block_size=block_size, top_k=top_k), leaves, grad)

    result = {}
    for name, call in (("forward", forward), ("forward + backward", both)):
        result[name] = median(call, 5)
        torch.cuda.reset_peak_memory_stats()
        call()
        result[f"{name} GB"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def dense(batch: int, heads: int, tokens: int, width: int) -> float:
    """Milliseconds of the fastest dense attention, forward."""
    q, k, v = tensors(batch, heads, heads, tokens, width)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 5)


def measure(args: argparse.Namespace) -> None:
    if find_spec("triton") is None or not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU, and Triton, which comes with PyTorch's builds for them")
    print(torch.cuda.get_device_name(), torch.__version__)
    for block_size, top_k in ((128, 8), (512, 4), (2048, 4)):
        times = phases(8, 8, args.tokens, 128, block_size, top_k)
        print(f"{args.tokens} tokens, 8 heads, block {block_size}, top-{top_k}:", {k: round(v, 2) for k, v in times.items()})
    for tokens in args.lengths:
        whole = totals(2, 16, 16, tokens, 128, 128, 8)
        print(f"{tokens} tokens, batch 2, 16 heads, block 128, top-8:", {k: round(v, 2) for k, v in whole.items()})
        print(f"  dense (cuDNN) forward: {dense(2, 16, tokens, 128):.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=count, default=131072, metavar="N", help="of the sequence whose steps are measured")
    parser.add_argument("--lengths", type=count, nargs="*", default=[8192, 32768, 131072], metavar="N", help="tokens of whole calls")
    return exit_code("phases.py", lambda: measure(parser.parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
