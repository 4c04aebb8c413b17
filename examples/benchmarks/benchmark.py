"""Measure the speed and memory of MoBA against dense attention and other implementations of MoBA, in one run on the same tensors.

    python examples/benchmarks/benchmark.py                     # on a GPU FlashMoBA's own setting, on a CPU a smaller one
    python examples/benchmarks/benchmark.py --quick             # within a minute
    python examples/benchmarks/benchmark.py --preset report     # other settings that have been published
    python examples/benchmarks/benchmark.py --preset corners    # packed and padded batches, odd blocks, float32; also corners-triton
    python examples/benchmarks/benchmark.py --model llama-8b    # the prefill of a whole model
    python examples/benchmarks/benchmark.py --train llama-1b    # a training step of a whole model
    python examples/benchmarks/benchmark.py --plot-only benchmark.json

Prints tables and writes `benchmark.json` and, with matplotlib, `benchmark.png`. After Ctrl-C the same command continues where it stopped.

`PRESETS` are the settings. The table `SYSTEMS` in `benchmarking/attention.py` lists what is compared: a new system needs one more line.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, which contains the package `shared`

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from benchmarking.attention import SYSTEMS, Attention, Settings, available
from benchmarking.corners import Corners
from benchmarking.corners import table as table_of_corners
from benchmarking.measure import Call, attempt, over_limit
from benchmarking.model import MODELS, ModelPrefill, ModelTraining
from benchmarking.results import TIME_UP, Results, check_writable, find, load, plot, skewed_over_uniform, tables
from shared.command_line import Parser, UserError, exit_code
from shared.environment import environment
from shared.flag_types import count, not_negative, positive_or_inf
from tqdm import tqdm

ROW = {"batch": 2, "heads": 16, "key_heads": 16, "width": 128, "block_size": 128, "top_k": 8, "dtype": "bfloat16"}
MILLION = 1 << 20
CORNERS = ROW | {"batch": 1, "heads": 32, "key_heads": 32, "lengths": [32768]}
PRESETS = {
    "flashmoba": ROW | {"lengths": [8192, 32768, 131072, 524288]},
    "official": ROW | {"block_size": 2048, "top_k": 3, "lengths": [32768, 131072]},
    "skewed": ROW | {"lengths": [32768, 131072], "keys": "skewed"},
    "report": ROW | {"batch": 1, "heads": 4, "key_heads": 1, "block_size": 4096, "top_k": 12, "lengths": [MILLION], "forward_only": True},
    "msa": ROW | {"batch": 1, "heads": 32, "key_heads": 8, "top_k": 16, "lengths": [MILLION], "forward_only": True},
    "corners": CORNERS | {"corners": "auto"},
    "corners-triton": CORNERS | {"corners": "triton"},
    "cpu": {"batch": 1, "heads": 9, "key_heads": 3, "width": 64, "block_size": 128, "top_k": 8, "dtype": "float32"}
    | {"lengths": [2048, 8192, 32768]},
}
MODEL_PRESET = {"block_size": 128, "top_k": 8, "lengths": [512 << i for i in range(10)]}
TRAINING_PRESET = {"block_size": 128, "top_k": 8, "lengths": [8192, 32768, 131072]}
QUICK = {"cuda": {"lengths": [4096, 16384], "batch": 1}, "cpu": {"lengths": [1024, 4096]}}
QUICK_SECONDS = 35  # no further measurement begins after that
TIMES = "milliseconds", "least", "most", "estimate"


class Workload(Protocol):
    """The interface of a comparison for `run`: `Attention`, `Corners`, `ModelPrefill`, `ModelTraining`."""

    device: torch.device
    systems: list[str]
    passes: list[str]
    scale: int  # times are multiplied by it

    def title(self) -> str: ...
    def settings(self) -> dict: ...
    def growth(self, system: str) -> int: ...
    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call: ...


def run(workload: Workload, found: dict, results: Results, args: argparse.Namespace, deadline: float) -> None:
    """Measure what the run `found` lacks. Systems are measured in turn at each length; forward passes come first."""
    lengths, repeats, limit = args.lengths, args.repeats, args.limit
    todo = [(s, p, n) for p in workload.passes for n in lengths for s in workload.systems if find(found, s, p, n) is None]
    begun = set[tuple[str, str]]()  # compiled by this process
    total = len(workload.passes) * len(lengths) * len(workload.systems)
    if len(todo) < total:
        print(f"{total - len(todo)} of {total} measurements are in {results.file} already.", flush=True)
    with tqdm(todo, unit="measurement") as bar:
        for system, pass_, tokens in bar:
            bar.set_postfix_str(f"{system}, {pass_}, {tokens:,} tokens")
            if time.monotonic() > deadline:
                record = {"skipped": TIME_UP}
            elif (record := expected_over_limit(workload, found, system, pass_, tokens, repeats, limit)) is None:
                expected = expected_milliseconds(workload, found, system, pass_, tokens) or 0.0
                warm = expected >= args.seconds * 1000 and (system, pass_) in begun
                call = partial(workload.call, system, pass_, tokens)
                record = attempt(call, workload.device, repeats, limit, seconds=args.seconds, warm=warm)
                begun.add((system, pass_))
            scaled = {k: x * workload.scale if k in TIMES else x for k, x in record.items()}
            found["results"].append({"system": system, "pass": pass_, "tokens": tokens, **scaled})
            results.save()
            if "failed" in record and workload.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the GPU can no longer be used: no other measurement must then count as failed


def expected_over_limit(workload: Workload, found: dict, system: str, pass_: str, tokens: int, repeats: int, limit: float) -> dict | None:
    """The record of a measurement that would take too long, as estimated from the longest shorter one; None if it should be tried."""
    estimate = expected_milliseconds(workload, found, system, pass_, tokens)
    return None if estimate is None else over_limit(estimate, 1 + repeats, limit)


def expected_milliseconds(workload: Workload, found: dict, system: str, pass_: str, tokens: int) -> float | None:
    """The expected time of one call, estimated from the longest shorter one; None if there is none."""
    known = [r for r in found["results"] if (r["system"], r["pass"]) == (system, pass_) and r["tokens"] < tokens]
    times = {r["tokens"]: t for r in known if (t := r.get("milliseconds") or r.get("estimate"))}
    if not times:
        return None
    longest = max(times)
    return times[longest] / workload.scale * (tokens / longest) ** workload.growth(system)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and return the exit code: 0, 1 if it had to stop, 2 for an error that the user can fix, 130 after Ctrl-C."""
    start = time.monotonic()
    return exit_code("benchmark.py", lambda: benchmark(parse(argv), start))


def benchmark(args: argparse.Namespace, start: float) -> int:
    if args.plot_only:
        runs = load(args.plot_only)
        print(report(runs))
        draw(runs, args.plot or args.plot_only.with_suffix(".png"))
        return 0
    check_writable(**{"--json": args.json, "--plot": args.plot})
    results = Results(args.json)
    deadline = start + QUICK_SECONDS if args.quick else float("inf")
    runs, code = [], 0
    try:
        for workload in workloads(args):
            runs.append(results.run(workload.title(), workload.settings(), environment(workload.device)))
            run(workload, runs[-1], results, args, deadline)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        code = 130
    except torch.OutOfMemoryError:
        print(f"\nThe weights of {args.model or args.train} do not fit into memory.", file=sys.stderr)
        code = 1
    except torch.AcceleratorError as error:
        print(f"\nThe GPU can no longer be used: {error}\nThe same command goes on from here.", file=sys.stderr)
        code = 1
    results.save()
    print("", report(runs), "", *args.left_out, f"Written: {args.json}", sep="\n")
    draw(runs, args.plot or args.json.with_suffix(".png"))
    return code


def report(runs: list[dict]) -> str:
    shown = [table_of_corners(run) if of_corners(run) else tables(run) for run in runs]
    return "\n\n".join(filter(None, [*shown, skewed_over_uniform(runs)]))


def of_corners(run: dict) -> bool:
    return run["settings"].get("workload") == "corners"


def draw(runs: list[dict], file: Path) -> None:
    if not (runs := [run for run in runs if run["results"] and not of_corners(run)]):  # corners have a table instead
        return
    try:
        plot(runs, file)
        print(f"Written: {file}")
    except ImportError as error:
        print(f'No plot ({error}). `pip install "moba_flex[viz]"`, here or elsewhere, then --plot-only with the JSON file.')


def workloads(args: argparse.Namespace) -> Iterator[Workload]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name := args.model or args.train:
        kind = ModelPrefill if args.model else ModelTraining
        yield kind(name, args.block_size, args.top_k, args.dtype, args.repeats, args.systems, device)
        return
    fields = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name != "keys"}
    if args.corners:
        yield Corners(Settings(**fields), device, args.forward_only, args.corners)
        return
    systems, missing = available(args.systems, device, Settings(**fields))
    args.left_out = [f"{name}: {reason}, left out" for name, reason in missing.items()]
    print(*args.left_out, sep="\n", end="\n" * bool(missing), flush=True)
    if not systems:
        raise UserError("argument --systems: none of them can be measured here")
    for keys in ("uniform", "skewed") if args.keys == "skewed" else ("uniform",):
        yield Attention(Settings(**fields, keys=keys), device, systems, args.forward_only)


def parse(argv: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = Parser(__doc__)
    flag = parser.add_argument
    usual = "flashmoba" if device == "cuda" else "cpu"
    flag("--preset", choices=PRESETS, help=f"a published setting, which other flags change (default: {usual}, on this machine)")
    flag("--quick", action="store_true", help="two short lengths, within a minute")
    flag("--model", choices=MODELS, help="prefill by a whole model of this shape, random weights, against sdpa (default: attention alone)")
    flag("--train", choices=MODELS, help="a training step of such a model, plain and packed, against sdpa (default: attention alone)")
    of_preset = "(default: the preset's)"
    flag("--batch", type=count, metavar="N", help=f"sequences {of_preset}")
    flag("--heads", type=count, metavar="N", help=f"query heads {of_preset}")
    flag("--key-heads", type=count, metavar="N", help=f"key and value heads {of_preset}")
    flag("--width", type=count, metavar="N", help=f"dimension of a head {of_preset}")
    parser.add_block_flags(block_size="the preset's", top_k="the preset's")
    flag("--lengths", type=count, nargs="+", metavar="N", help=f"tokens {of_preset}")
    flag("--dtype", choices=["float32", "bfloat16", "float16"], help=f"of the tensors {of_preset}")
    of_model, of_training = (", ".join(workload.SYSTEMS + workload.MORE) for workload in (ModelPrefill, ModelTraining))
    models = f"with --model of {of_model}, with --train of {of_training}"
    names = f"of {', '.join(SYSTEMS)}; {models} (default: all that the device has)"
    flag("--systems", nargs="+", metavar="NAME", help=names)
    flag("--forward-only", action="store_true", default=None, help=f"no backward pass {of_preset}")
    flag("--one-group", action="store_true", default=None, help="measure one key head, and multiply its times (default: no)")
    flag("--repeats", type=count, default=5, metavar="N", help="timings, of which the median counts")
    most = (
        "no further timing of a measurement begins after that; calls that alone take it are timed once, and not warmed up (default: none)"
    )
    flag("--seconds", type=positive_or_inf, default=math.inf, metavar="N", help=most)
    flag("--limit", type=not_negative, default=300.0, metavar="SECONDS", help="skip a measurement that would take longer")
    flag("--json", type=Path, default=Path("benchmark.json"), metavar="FILE", help="results, continued if there are some")
    flag("--plot", type=Path, metavar="FILE", help="a picture of them (default: the JSON file's name with .png)")
    flag("--plot-only", type=Path, metavar="JSON", help="print and plot the results in a file; measure nothing (default: measure)")
    args = parser.parse_args(argv)

    usual_preset = PRESETS[usual]
    preset = dict(PRESETS[args.preset or usual])
    workload = ModelPrefill if args.model else ModelTraining if args.train else None
    if workload:
        one = "--model" if args.model else "--train"
        fixed = [n for n in (*ROW, "preset", "one_group", "forward_only") if n not in (*MODEL_PRESET, "dtype")]
        if wrong := [n for n in fixed if getattr(args, n)]:
            parser.error(f"argument --{wrong[0].replace('_', '-')}: does not go with {one}, whose shape and pass are fixed")
        if args.model and args.train:
            parser.error("argument --train: does not go with --model; measure one after the other")
        preset = (MODEL_PRESET if args.model else TRAINING_PRESET) | {"dtype": usual_preset["dtype"]}
    if args.quick:
        preset |= QUICK[device]
    args.keys, args.corners = preset.pop("keys", "uniform"), preset.pop("corners", None)
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.one_group, args.forward_only = bool(args.one_group), bool(args.forward_only)
    if args.corners and (wrong := [n for n in ("systems", "one_group") if getattr(args, n)]):
        parser.error(f"argument --{wrong[0].replace('_', '-')}: does not go with --preset {args.preset}, which compares batches")
    known = workload.SYSTEMS + workload.MORE if workload else SYSTEMS
    if unknown := [name for name in args.systems or () if name not in known]:
        parser.error(f"argument --systems: no system {unknown[0]!r}; there are {', '.join(known)}")
    if workload is None and args.heads % args.key_heads:
        parser.error(f"argument --heads: must be a multiple of --key-heads, but is {args.heads} with {args.key_heads}")
    args.lengths = sorted(set(args.lengths))
    args.left_out = []
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C keeps and prints the results so far
    sys.exit(main())
