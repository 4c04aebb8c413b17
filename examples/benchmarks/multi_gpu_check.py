"""Test MoBA on a host with several GPUs, unattended: tests, losses, speeds, ten million tokens, a whole model.

    python examples/benchmarks/multi_gpu_check.py --output results              # all parts; about 25 minutes on four H200
    python examples/benchmarks/multi_gpu_check.py --output results --minutes 9  # those that fit; the same command goes on with the others
    python examples/benchmarks/multi_gpu_check.py --output results --list       # the parts, their time, and which are done
    python examples/benchmarks/multi_gpu_check.py --output results --dry        # toy sizes on CPU processes, to try it out

From a checkout, with the package and its "test" and "demo" extras installed. Nothing is fetched: the model that is trained has the shape of
SmolLM2-135M, random weights, and reads bytes of Python's standard library. Each part leaves NAME.json and NAME.log; a part that has its
JSON is not run again. results.json and what is printed last put them beside what docs/scaling.md predicts. Exit code: 0 when all parts are
done and well, 1 if one failed, 3 if some were left for lack of time. NVLink multicast stays off, as some hosts cannot map it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, where the package `shared` is

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field

import torch
from benchmarking.model import MODELS
from benchmarking.multi_gpu_summary import summary
from shared import saved_results
from shared.command_line import Parser, UserError, exit_code
from shared.flag_types import positive
from shared.startup import run_script

ROOT = Path(__file__).parents[2]
OVERTIME = 180  # seconds over its time after which a part is ended: a host that reads PyTorch for the first time takes a minute to begin


@dataclass(frozen=True)
class Part:
    """One command. Its result is the last line of JSON that it prints, or the log of a training run, or that it ended well."""

    name: str
    seconds: int  # on four H200, with the start
    command: list[str]
    run: Path | None = None  # of a training run, the folder
    environment: dict[str, str] = field(default_factory=dict)


def parts(args: argparse.Namespace) -> list[Part]:
    gpus = args.gpus
    sizes = [n for n in (1, 2, 4, 8) if n <= gpus]
    found = [tests(args)]
    found += [training(args, f"losses-{how}", how, gpus, short=True) for how in ("one", "ddp", "fsdp2", "fsdp2-cp")]
    for exchange in ("keys", "heads"):
        found += [prefill(args, f"prefill-{exchange}-{n}", 30, n, exchange, []) for n in sizes]
    for exchange, most in (("keys", 4), ("heads", 8)):  # heads are copied before and after they travel
        pieces = 1 if args.dry else max(1, most // gpus)  # for 140 GB a GPU
        flags = ["--tokens", "4096" if args.dry else "10485760", "--repeats", "1", "--check", "64" if args.dry else "512"]
        found.append(prefill(args, f"ten-million-{exchange}", 110, gpus, exchange, [*flags, "--pieces", str(pieces)]))
    found += [training(args, f"speed-{n}", "one" if n == 1 else "ddp", n, short=False) for n in sizes]
    for millions, seconds in ((1, 100), (4, 200)):
        tokens = str((1 << 9 if args.dry else 1 << 20) * millions)
        toy = ["--tiny", "--cpu", "--block-size", "16", "--top-k", "3"] if args.dry else []
        found.append(on_all(args, f"model-{millions}M", seconds, gpus, "model_prefill.py", ["--tokens", tokens, *toy]))
    return found


def tests(args: argparse.Namespace) -> Part:
    chosen = ["-k", "each_token_is_held"] if args.dry else []
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/distributed", *chosen]
    return Part("tests", 300, command, environment={"MOBA_FLEX_DISTRIBUTED_TESTS": "cpu" if args.dry else "cuda"})


def prefill(args: argparse.Namespace, name: str, seconds: int, n: int, exchange: str, flags: list[str]) -> Part:
    toy = ["--tokens", "2048", "--block-size", "128", "--top-k", "4", "--repeats", "1", "--heads", "8", "--key-heads", "4", "--width", "16"]
    return on_all(args, name, seconds, n, "prefill_scaling.py", [*(toy if args.dry else []), *flags, "--exchange", exchange])


def on_all(args: argparse.Namespace, name: str, seconds: int, n: int, script: str, flags: list[str]) -> Part:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return Part(name, seconds, [*launcher, f"examples/benchmarks/{script}", *flags])


def training(args: argparse.Namespace, name: str, how: str, n: int, short: bool) -> Part:
    """20 steps of as many sequences of 8,192 tokens as there are GPUs, or 10 of 131,072."""
    output, share = args.output / name, []
    launch = ["--config_file", f"examples/accelerate/{'cpu' if args.dry else how.replace('-', '_')}.yaml"]
    if args.dry:
        share = ["--context-parallel", str(n)] if how == "fsdp2-cp" else []
    elif how == "one":
        launch = ["--num_machines", "1", "--dynamo_backend", "no"]
    elif how == "fsdp2-cp":
        launch += ["--parallelism_config_dp_shard_size", "1", "--parallelism_config_cp_size", str(n)]
    launch += ["--num_processes", str(1 if how == "one" else n), "--mixed_precision", "no" if args.dry else "bf16"]
    tokens, steps = (256 if short else 512, 3) if args.dry else (8192, 20) if short else (131072, 10)
    files = [ROOT / "README.md"] if args.dry else sorted(Path(os.__file__).parent.glob("*.py"))
    work = ["--tiny", "--cpu"] if args.dry else ["--model", str(args.output / "model")]
    work += ["--text", *map(str, files), "--sequence-length", str(tokens), "--batch-size", str(args.gpus if short else n)]
    work += ["--steps", str(steps), "--warmup", "2", "--checkpoint-every", "1000", "--activation-checkpointing", *share]
    work += ["--block-size", "32", "--top-k", "3"] if args.dry else ["--block-size", "512", "--top-k", "8", "--sink-blocks", "1"]
    command = [sys.executable, "examples/launch.py", *launch, "examples/train.py", *work, "--output", str(output)]
    return Part(name, 70, command, run=output)


def save_model(folder: Path) -> None:
    """A random Llama in the shape of SmolLM2-135M that reads bytes, the same in every run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = MODELS["smollm2-135m"] | {"vocab_size": 257, "max_position_embeddings": 1 << 17}
    config = LlamaConfig(**sizes, eos_token_id=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    read = Tokenizer(models.BPE(letters, merges=[]))
    read.pre_tokenizer, read.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=read, eos_token="<end>").save_pretrained(folder)


def run(part: Part, output: Path) -> dict | None:
    """The part's result, which is saved; None if it failed. What it prints goes to its log."""
    if part.run is not None:
        shutil.rmtree(part.run, ignore_errors=True)  # of a run that was cut off
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    nccl = {"NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    started, log = time.monotonic(), output / f"{part.name}.log"
    with open(log, "w") as file:
        environment = {**os.environ, **nccl, "PYTHONPATH": path, **part.environment}
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=part.seconds + OVERTIME)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            end_launcher(process)
    result = result_of(part, log)
    if (code and not result.get("out_of_memory")) or (part.run is not None and not result):
        return None
    result = {"part": part.name, "seconds": time.monotonic() - started, "command": part.command, **result}
    saved_results.write(output / f"{part.name}.json", result)
    if part.run is not None:
        shutil.rmtree(part.run)  # gigabytes of checkpoints
    return result


def end_launcher(process: subprocess.Popen) -> None:
    """With its processes, which have sessions of their own: it ends them if it is asked to, within half a minute."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def result_of(part: Part, log: Path) -> dict:
    if part.run is not None:
        lines = (part.run / "log.jsonl").read_text().splitlines() if (part.run / "log.jsonl").exists() else []
        entries = [json.loads(line) for line in lines]
        names = ("loss", "tokens_per_second")
        return {name: [entry[name] for entry in entries] for name in names} if entries else {}
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("{")]
    return json.loads(found[-1]) if found else {"last_line": lines[-1] if lines else ""}


def check(args: argparse.Namespace) -> int:
    every = parts(args)
    chosen = [part for part in every if not args.only or part.name in args.only]
    if unknown := sorted(set(args.only) - {part.name for part in every}):
        raise UserError(f"argument --only: there is no part {', '.join(unknown)}, but {', '.join(part.name for part in every)}")
    done = {part.name for part in every if (args.output / f"{part.name}.json").exists()}
    budget = sum(part.seconds for part in chosen if part.name not in done)
    print(f"{len(chosen)} parts, {sum(part.name in done for part in chosen)} done; the others take about {budget / 60:.0f} minutes")
    if args.list:
        for part in chosen:
            print(f"{part.name:20} {part.seconds:5} s  {'done' if part.name in done else ''}")
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    same_as_before(args)
    if not args.dry and not (args.output / "model" / "tokenizer.json").exists():
        save_model(args.output / "model")
    end, failed, left = time.monotonic() + 60 * args.minutes, [], []
    for part in chosen:
        if part.name in done:
            continue
        if time.monotonic() + part.seconds > end:
            left.append(part.name)
            continue
        print(f"{part.name}: {part.seconds} s ...", end=" ", flush=True)
        result = run(part, args.output)
        print("failed" if result is None else f"took {result['seconds']:.0f} s", flush=True)
        if result is None:
            failed.append(part.name)
    return report(args.output, every, failed, left)


def same_as_before(args: argparse.Namespace) -> None:
    """Results in one folder are of one kind of run. Raises UserError."""
    file, settings = args.output / "settings.json", {"gpus": args.gpus, "dry": args.dry}
    before = json.loads(file.read_text()) if file.exists() else settings
    if before != settings:
        raise UserError(f"--output {args.output} has results of {before}, but these would be of {settings}: name another folder")
    saved_results.write(file, settings)


def report(output: Path, every: list[Part], failed: list[str], left: list[str]) -> int:
    files = [output / f"{part.name}.json" for part in every]
    results = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    lines, numbers = summary(results)
    saved_results.write(output / "results.json", {"failed": failed, "left": left, "parts": results, **numbers})
    print(*lines, sep="\n")
    for name in failed:
        tail = (output / f"{name}.log").read_text(errors="replace").splitlines()[-3:]
        print(f"{name} failed, see {output / name}.log: {' | '.join(tail)}")
    if left:
        print(f"no time was left for {', '.join(left)}: the same command goes on with them")
    return 1 if failed or numbers["wrong"] else 3 if left else 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for results and logs (required)")
    flag("--minutes", type=positive, default=1e9, metavar="X", help="a part begins only if its time fits into them (default: no limit)")
    flag("--only", nargs="+", default=[], metavar="NAME", help="these parts (default: all)")
    flag("--list", action="store_true", help="print the parts and run none")
    flag("--dry", action="store_true", help="toy sizes on CPU processes")
    flag("--gpus", type=int, default=0, metavar="N", help="how many, or processes with --dry (default: all, or 2)")

    def work() -> int:
        args = parser.parse_args(argv)
        args.output = args.output.resolve()
        args.gpus = args.gpus or (2 if args.dry else torch.cuda.device_count())
        if args.gpus < 2:
            raise UserError(f"needs at least 2 GPUs, but there are {args.gpus}: --dry tries it out on CPU processes")
        return check(args)

    return exit_code("multi_gpu_check.py", work)


if __name__ == "__main__":
    run_script(main)
