"""Measure how fast one new token is decoded with MoBA and with full attention, on a CUDA GPU.

    python examples/benchmarks/decode_speed.py                  # the attention step of one layer
    python examples/benchmarks/decode_speed.py --whole-model    # tokens per second of a Llama with random weights

The attention step is compared with the fastest full decoding in PyTorch (`scaled_dot_product_attention` and compiled FlexAttention, which
splits the keys), on a full cache of random bfloat16 keys: 32 query heads on 8, width 128. Times are medians of event timings. Each call is
replayed from a CUDA graph, so that launches from Python do not count on either side.

The whole model decodes greedily, by one compiled step per token, with a cache of random keys. "full" is transformers' own `sdpa`. It masks
the free slots of the static cache, and therefore cannot use FlashAttention. "full, no mask" also reads free slots, at FlashAttention's
speed, which is a lower bound for the time of full decoding.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarking.model import MODELS
from shared.command_line import Parser, UserError, exit_code
from shared.flag_types import count
from shared.startup import run_script
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from moba_flex import patch, unpatch

# Called by a patched model in each layer. Not public, and may be renamed.
from moba_flex.core.settings import AttentionSettings
from moba_flex.decoding import decode
from moba_flex.ops.decoding import means_for, write_means

HEADS, GROUPS, WIDTH = 32, 8, 128
LLAMA_8B = MODELS["llama-8b"] | {"max_position_embeddings": 1 << 20}


KINDS = ("full", "full, no mask", "sparse", "shared")


def milliseconds(call: Callable, repeats: int = 20, together: int = 10) -> float:
    """The median time of `call` on the GPU, replayed from a CUDA graph of `together` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(together):
            call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / together)
    return statistics.median(times)


def full(query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    """Milliseconds of each kind of full decoding that runs on this device."""
    by_group = query.view(query.shape[0], GROUPS, -1, WIDTH)  # the query heads of a key head as queries: no kernel repeats keys
    compiled = torch.compile(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True))
    calls = {"SDPA": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        calls[f"SDPA {backend.lower()}"] = lambda backend=backend: _with(backend, by_group, key, value)
    calls["flex decoding"] = lambda: compiled(query, key, value)
    times = {}
    for name, call in calls.items():
        try:
            times[name] = milliseconds(call)
        except Exception as error:  # a kernel that this GPU, driver or length does not support
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return times


def _with(backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        return F.scaled_dot_product_attention(query, key, value)


@torch.no_grad()
def attention_step(batch: int, tokens: int, block_size: int, top_k: int) -> dict:
    """Milliseconds of one decoding step of one layer: each kind of full attention, sparse, sparse with a shared selection."""
    shapes = ((batch, HEADS, 1, WIDTH), (batch, GROUPS, tokens, WIDTH), (batch, GROUPS, tokens, WIDTH))
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    means = write_means(means_for(key, tokens // block_size), key, None, block_size)
    length = torch.tensor(tokens, device="cuda")
    result: dict = {"batch": batch, "tokens": tokens}
    for name, shared in (("sparse", False), ("shared", True)):
        settings = AttentionSettings(block_size, top_k, share_selection=shared, scale=WIDTH**-0.5, implementation="flex")
        result[name] = milliseconds(lambda settings=settings: decode(query, key, value, means, length, None, settings))
    result["full"] = full(query, key, value)
    fastest = min(result["full"].values())
    result |= {"speed-up": fastest / result["sparse"], "speed-up shared": fastest / result["shared"]}
    result["memory"] = means.nbytes / (key.nbytes + value.nbytes)
    return result


def llama(layers: int) -> PreTrainedModel:
    """A model of the shape of Llama-3.1-8B, with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers})).eval()
    finally:
        torch.set_default_dtype(before)


def no_mask(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, **_) -> tuple[Tensor, None]:
    """One query's attention to every slot of the cache, with transformers' interface."""
    return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("no_mask", no_mask)


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel, tokens: int, new: int, compiled: bool) -> float:
    """The speed of greedy decoding at batch 1, after `tokens` random tokens in a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + new + 16)
    for index in range(model.config.num_hidden_layers):  # as after a prefill, but with random keys
        key, value = (torch.randn(1, GROUPS, tokens, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache.update(key, value, index)

    def step(call: Callable, token: Tensor) -> Tensor:
        # Positional, because transformers 5.24 renamed past_key_values to cache.
        return call(token, None, None, cache, use_cache=True).logits[:, -1:].argmax(-1)

    token = step(model, torch.zeros(1, 1, dtype=torch.int64, device="cuda"))  # uncompiled: stores block means beside the cache
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    for _ in range(8):
        token = step(call, token).clone()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(new):
        token = step(call, token).clone()
    torch.cuda.synchronize()
    return new / (time.perf_counter() - begin)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--batch", type=count, nargs="+", default=[1, 8], metavar="N", help="sequences that are decoded together")
    flag("--lengths", type=count, nargs="+", default=[131072, 524288], metavar="N", help="tokens in the cache")
    parser.add_other_name("--tokens", "--lengths")
    parser.add_block_flags(block_size=128, top_k=8)
    flag("--whole-model", action="store_true", help="measure a whole model, with the first of --lengths and batch 1")
    parser.add_other_name("--model", "--whole-model")
    flag("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of decoding by the model")
    flag("--layers", type=count, default=32, metavar="N", help="of the model")
    flag("--new", type=count, default=64, metavar="N", help="tokens that the model decodes")
    flag("--eager", action="store_true", help="do not compile the model")
    flag("--json", type=Path, metavar="FILE", help="for the figures (default: they are printed only)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code("decode_speed.py", lambda: measure(parse(argv)))


def measure(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU")
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "block_size": args.block_size, "top_k": args.top_k}
    print(", ".join(f"{name} {value}" for name, value in figures.items()))

    if args.whole_model:
        blocks = {"block_size": args.block_size, "top_k": args.top_k}
        kinds = {"sparse": {**blocks, "decode": "sparse"}, "shared": {**blocks, "decode": "sparse", "share_selection": True}}
        figures["tokens per second"] = {}
        print(f"\n{args.layers} layers, {args.lengths[0]:,} cached tokens, batch 1      tokens per second")
        model = llama(args.layers)
        for name in args.kinds:
            if name in kinds:
                model = patch(model, **kinds[name])
            else:
                model = unpatch(model)
                model.set_attn_implementation("sdpa" if name == "full" else "no_mask")
            speed = tokens_per_second(model, args.lengths[0], args.new, not args.eager)
            figures["tokens per second"][name] = speed
            print(f"{name:<52}{speed:>8.1f}", flush=True)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    else:
        figures["steps"] = []
        print(f"\n{'tokens':>9}{'batch':>7}{'full, ms':>11}{'sparse':>9}{'shared':>9}{'times':>8}{'shared':>9}{'memory':>9}  fastest full")
        for tokens in args.lengths:
            for batch in args.batch:
                s = attention_step(batch, tokens, args.block_size, args.top_k)
                figures["steps"].append(s)
                name, fastest = min(s["full"].items(), key=lambda item: item[1])
                speeds = f"{s['speed-up']:>8.1f}{s['speed-up shared']:>9.1f}{s['memory']:>9.2%}"
                print(f"{tokens:>9,}{batch:>7}{fastest:>11.3f}{s['sparse']:>9.3f}{s['shared']:>9.3f}{speeds}  {name}", flush=True)
                torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_script(main)
