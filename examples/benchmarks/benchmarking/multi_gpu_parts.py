"""The parts of multi_gpu_check.py: their commands, and their times on four H200."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .model import MODELS

ROOT = Path(__file__).parents[3]
TEXT = 1 << 20  # bytes of training text: more would only take longer to read


@dataclass(frozen=True)
class Part:
    """One command. Its result is its lines of JSON, the log of a training run, or the counts of tests."""

    name: str
    seconds: int  # on four H200, including the start
    command: list[str]
    run: Path | None = None  # folder of a training run
    environment: dict[str, str] = field(default_factory=dict)
    timed: bool = True  # nothing runs at the same time; parts that are not timed run side by side
    whole: bool = True  # False: it may begin without time for all of it, and partial results count


def parts(args: argparse.Namespace) -> list[Part]:
    """Correctness comes first, then the most informative speeds: that of all GPUs and that of one."""
    sizes = [n for n in (1, 2, 4, 8) if n <= args.gpus]
    found = [losses(args, how) for how in ("one", "ddp", "fsdp2", "fsdp2-cp")]
    found += [resume(args), speed(args, sizes[-1]), speed(args, 1), tests(args)]
    found += [prefill(args, n) for n in sizes]
    found += [ten_million(args, exchange, most) for exchange, most in (("keys", 4), ("heads", 8))]  # heads are copied before and after
    found += [speed(args, n) for n in sizes[1:-1]]
    for millions, seconds in ((1, 100), (4, 200)):
        tokens = str((1 << 9 if args.dry else 1 << 20) * millions)
        toy = ["--tiny", "--cpu", "--block-size", "16", "--top-k", "3"] if args.dry else []
        found.append(on_several(f"model-{millions}M", seconds, args.gpus, "model_prefill.py", ["--tokens", tokens, *toy]))
    twice = ("losses-fsdp2", "model-4M")  # on CPUs the same as losses-ddp and model-1M
    return [replace(part, timed=False) for part in found if part.name not in twice] if args.dry else found


def tests(args: argparse.Namespace) -> Part:
    side_by_side = ["-n", "0", "-k", "each_token_is_held"] if args.dry else ["-n", "4"]
    command = [sys.executable, "-m", "pytest", "-v", "tests/distributed", *side_by_side]
    return Part("tests", 240, command, environment={"MOBA_FLEX_DISTRIBUTED_TESTS": "cpu" if args.dry else "cuda"}, whole=False)


def prefill(args: argparse.Namespace, n: int) -> Part:
    exchanges = ["keys", "heads"] if n > 1 else ["keys"]  # one process exchanges nothing
    return on_several(f"prefill-{n}", 40, n, "prefill_scaling.py", [*layer(args), "--exchange", *exchanges])


def ten_million(args: argparse.Namespace, exchange: str, most: int) -> Part:
    """Heads are processed in groups if there are few GPUs, `most` groups on one GPU: for 140 GB per GPU."""
    flags = ["--tokens", "4096" if args.dry else "10485760", "--repeats", "1", "--check", "64" if args.dry else "512"]
    flags += ["--pieces", str(1 if args.dry else max(1, most // args.gpus)), "--exchange", exchange]
    return on_several(f"ten-million-{exchange}", 110, args.gpus, "prefill_scaling.py", [*layer(args), *flags])


def layer(args: argparse.Namespace) -> list[str]:
    toy = ["--tokens", "2048", "--block-size", "128", "--top-k", "4", "--repeats", "1", "--heads", "8", "--key-heads", "4", "--width", "16"]
    return toy if args.dry else []


def on_several(name: str, seconds: int, n: int, script: str, flags: list[str]) -> Part:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    return Part(name, seconds, [sys.executable, *launcher, f"examples/benchmarks/{script}", *flags])


def losses(args: argparse.Namespace, how: str) -> Part:
    """20 steps with a sequence of 8,192 tokens per GPU. Processes that share sequences, or a single one, process all of them at once."""
    at_once = args.gpus if how in ("one", "fsdp2-cp") else 1
    tokens, steps = ("256", "3") if args.dry else ("8192", "20")
    flags = ["--sequence-length", tokens, "--steps", steps, "--batch-size", str(args.gpus), "--micro-batch-size", str(at_once)]
    return training(args, f"losses-{how}", 120, how, args.gpus, flags, timed=False)


def speed(args: argparse.Namespace, n: int) -> Part:
    """10 steps with a sequence of 131,072 tokens per GPU."""
    tokens, steps = ("512", "3") if args.dry else ("131072", "10")
    flags = ["--sequence-length", tokens, "--steps", steps, "--batch-size", str(n)]
    return training(args, f"speed-{n}", 70, "one" if n == 1 else "ddp", n, flags, timed=True)


def training(args: argparse.Namespace, name: str, seconds: int, how: str, n: int, flags: list[str], timed: bool) -> Part:
    """A training run. One process needs no launcher."""
    output, precision = args.output / name, "no" if args.dry else "bf16"
    launcher = [] if how == "one" else ["examples/launch.py", *launch(args, how, n), "--num_processes", str(n)]
    share = ["--context-parallel", str(n)] if args.dry and how == "fsdp2-cp" else []
    command = [sys.executable, *launcher, *train(args), *flags, *share, "--checkpoint-every", "1000", "--output", str(output)]
    return Part(name, seconds, command, run=output, environment={"ACCELERATE_MIXED_PRECISION": precision}, timed=timed)


def resume(args: argparse.Namespace) -> Part:
    """Parameters are sharded over all GPUs, then over one GPU fewer; both divide the sequences of a step evenly."""
    flags = ["--sequence-length", "512" if args.dry else "8192", "--batch-size", str(args.gpus * (args.gpus - 1))]
    job = [*launch(args, "fsdp2", args.gpus), *train(args), *flags]
    command = ["examples/benchmarks/kill_and_resume.py", "--processes", str(args.gpus), "--output", str(args.output / "resume"), "--", *job]
    return Part("resume", 200, [sys.executable, *command], timed=False)


def launch(args: argparse.Namespace, how: str, n: int) -> list[str]:
    """Flags for examples/launch.py, except the number of processes."""
    if args.dry:
        return ["--config_file", "examples/accelerate/cpu.yaml", "--mixed_precision", "no"]
    sizes = ["--parallelism_config_dp_shard_size", "1", "--parallelism_config_cp_size", str(n)] if how == "fsdp2-cp" else []
    return ["--config_file", f"examples/accelerate/{how.replace('-', '_')}.yaml", "--mixed_precision", "bf16", *sizes]


def train(args: argparse.Namespace) -> list[str]:
    """The command of examples/train.py that all runs share."""
    which = ["--tiny", "--cpu"] if args.dry else ["--model", str(args.output / "model")]
    blocks = ["--block-size", "32", "--top-k", "3"] if args.dry else ["--block-size", "512", "--top-k", "8", "--sink-blocks", "1"]
    return ["examples/train.py", *which, *blocks, "--text", *texts(args), "--warmup", "2", "--activation-checkpointing"]


def texts(args: argparse.Namespace) -> list[str]:
    """Files of Python's standard library."""
    if args.dry:
        return [str(ROOT / "README.md")]
    found, size = [], 0
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        if size < TEXT:
            found.append(str(file))
            size += file.stat().st_size
    return found


def save_model(folder: Path) -> None:
    """Save a random Llama with the shape of SmolLM2-135M that reads bytes. It is the same in every run."""
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
