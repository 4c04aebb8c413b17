"""Fine-tune a language model with MoBA (Mixture of Block Attention), with Trainer of transformers or SFTTrainer of TRL.

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --output tuned          # a CPU, or one GPU
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --output tuned --trl --lora
    python examples/launch.py --config_file examples/accelerate/ddp.yaml examples/finetune.py ...          # eight GPUs of one host
    python examples/launch.py --config_file examples/accelerate/fsdp2.yaml examples/finetune.py ...        # parameters sharded over them

`examples/launch.py` is `accelerate launch` without the launcher's own error messages; `--num_processes 2` is for two GPUs. Your own script
needs only what `fine_tune` does. `--lora` trains a PEFT adapter instead of the whole model. `--trl` packs the files of --text into
sequences; MoBA keeps them apart. Ctrl-C writes a checkpoint at the end of a step. Exit code: 0 when all steps are done, 2 and one line for
an error that you can fix, 130 after Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import importlib.util
from pathlib import Path

import torch
from shared.command_line import Parser, UserError, config_of_flags, one_line, read_file
from shared.flag_types import count, positive
from shared.models import check_context, check_layers
from shared.saved_results import check_writable
from shared.startup import run_script
from shared.training import StopTrainer, done, exit_code_of_job, stopped
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import moba_flex


def fine_tune(args: argparse.Namespace, texts: list[str], settings: moba_flex.MobaConfig, stop: StopTrainer) -> Trainer:
    """Train on the texts, and save the model or its adapter to `--output`. Returns the trainer, which may have been stopped early."""
    with one_line(f"argument --model: cannot load {args.model!r}, a local folder or a model on the hub"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    if len(tokens) < args.sequence_length and not args.trl:
        raise UserError(f"--text has {len(tokens):,} tokens, but one sequence (--sequence-length) has {args.sequence_length:,}")
    with one_line(f"argument --model: cannot load {args.model!r}, a local folder or a model on the hub"):
        model = AutoModelForCausalLM.from_pretrained(args.model)
    moba_flex.patch(model, settings)  # MoBA needs only this line; the rest is as for any model
    options = {"output_dir": args.output, "max_steps": args.steps, "per_device_train_batch_size": args.batch_size}
    options |= {"learning_rate": args.learning_rate, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    options |= {"bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available()}
    lora = None
    if args.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        packed = SFTConfig(**options, max_length=args.sequence_length, packing=True)
        data = Dataset.from_list([{"text": text} for text in texts])
        trainer = SFTTrainer(model, packed, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    else:
        data = [{"input_ids": ids, "labels": ids} for ids in tokens.unfold(0, args.sequence_length, args.sequence_length)]
        trainer = Trainer(get_peft_model(model, lora) if lora else model, TrainingArguments(**options), train_dataset=data)
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=args.resume)
    if not stop.exit_code:
        trainer.save_model()
        tokenizer.save_pretrained(args.output)
    return trainer


def run(args: argparse.Namespace) -> int:
    """Train, report the result, and return the exit code."""
    check_writable(args.output)
    begun = any(args.output.glob("checkpoint-*"))
    if args.resume and not begun:
        raise UserError(f"--resume: there is no checkpoint in {args.output}")
    if begun and not args.resume:
        raise UserError(f"--output {args.output} has checkpoints already: go on from the last one with --resume, or choose another")
    check_layers("--full-attention-layers", args.full_attention_layers, args.model)
    check_context("--sequence-length", args.sequence_length, args.model)
    settings = config_of_flags({name: getattr(args, name) for name in ("block_size", "top_k", "sink_blocks", "full_attention_layers")})
    stop = StopTrainer()
    trainer = fine_tune(args, [read_file("--text", file) for file in args.text], settings, stop)
    if trainer.is_world_process_zero():
        loss = next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), float("nan"))
        step = trainer.state.global_step
        of = args.model if args.lora else None
        print(stopped("interrupted", step) if stop.exit_code else done(step, loss, args.output, adapter_of=of), flush=True)
    return stop.exit_code


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--model", required=True, help="a causal language model on the Hugging Face hub or in a folder (required)")
    flag("--text", type=Path, nargs="+", required=True, metavar="FILE", help="text files (required)")
    flag("--output", type=Path, required=True, metavar="FOLDER", help="for checkpoints and the model or its adapter (required)")
    flag("--resume", action="store_true", help="go on from the last checkpoint in --output")
    flag("--lora", action="store_true", help="train an adapter with PEFT")
    flag("--trl", action="store_true", help="train with TRL's SFTTrainer, documents packed into sequences")
    flag("--steps", type=count, default=100, metavar="N", help="optimizer steps")
    flag("--batch-size", type=count, default=1, metavar="N", help="sequences per step on each device")
    flag("--sequence-length", type=count, default=8192, metavar="N", help="tokens")
    flag("--learning-rate", type=positive, default=1e-4, metavar="X", help="at the beginning; it falls to 0")
    parser.add_block_flags(block_size=64, top_k=24, sink_blocks=1, full_attention_layers=[])
    args = parser.parse_args(argv)
    for name, package in (("lora", "peft"), ("trl", "trl")):
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            parser.error(f"argument --{name}: {package} is not installed: pip install {package}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    return exit_code_of_job("finetune.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
