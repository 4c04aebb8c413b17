"""Answer a question about a long text with a pretrained language model that uses MoBA (Mixture of Block Attention).

    python examples/llama.py             # SmolLM2-135M on source files of Python's standard library; needs only PyPI
    python examples/llama.py --compare   # the same, compared with full attention
    python examples/llama.py --adapted   # with the adapter in examples/adapter, which was trained for MoBA
    python examples/llama.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file book.txt --block-size 512

The prompt is read with MoBA (prefill); new tokens read all keys. Flags of MoonshotAI's llama.py work too: --moba-chunk-size is
--block-size, --moba-topk is --top-k. Exit code: 0, or 2 and one line for an error that you can fix, or 130 after Ctrl-C.

`run` has all the steps; the rest of the file is what they call.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import argparse
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from shared.command_line import Parser, UserError, config_of_flags, exit_code, one_line, read_file
from shared.flag_types import count
from shared.models import check_adapter, check_layers, context_of, layer_progress, load, trained_with, with_adapter
from shared.startup import run_script
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import moba_flex

# About 7,200 tokens. These files hardly change between Python versions, so the prompt always fits into the model's context.
FILES = ("sched.py", "bisect.py", "textwrap.py")
ADAPTER = Path(__file__).parent / "adapter"  # of SmolLM2-135M-Instruct
AT_ONCE = 512  # tokens whose logits are computed at a time
DEFAULTS = {"block_size": 128, "top_k": 8, "sink_blocks": 1}
QUESTION = "What is the module textwrap for?"


def run(args: argparse.Namespace) -> None:
    check_adapter("--adapted", args.adapted)
    settings = settings_of(args)
    check_layers("--full-attention-layers", args.full_attention_layers or (), args.model)
    text = read_prompt(args.prompt_file)
    model, tokenizer = load(args.model, args.device, args.dtype)
    if args.adapted:
        model = with_adapter(model, args.adapted)
    prompt = tokenize(text, model, tokenizer, args.max_new_tokens)

    share = 1.0
    if args.attn != "full":
        with one_line("this model cannot use MoBA"):
            moba_flex.patch(model, settings)  # MoBA needs only this line: prefill uses it from here on, new tokens read all keys
        full = len(settings.full_attention_layers) / model.config.get_text_config().num_hidden_layers
        share = full + (1 - full) * share_of_keys_read(prompt.shape[1], settings.block_size, settings.top_k)

    last_line = text.strip().splitlines()[-1]
    print(f"\n{prompt.shape[1]:,} tokens, which end: {'...' if len(last_line) > 100 else ''}{last_line[-100:]}\n", flush=True)
    print_table(answer(model, tokenizer, prompt, args.max_new_tokens) | {"share of keys read in prefill": f"{share:.1%}"})
    if args.compare:
        print_table(compare(model, prompt))


def settings_of(args: argparse.Namespace) -> moba_flex.MobaConfig:
    """The settings from the flags. The others are those of the adapter, or else `DEFAULTS`."""
    flags = {
        "block_size": args.block_size,
        "top_k": args.top_k,
        "sink_blocks": args.sink_blocks,
        "recent_blocks": args.recent_blocks,
        "full_attention_layers": args.full_attention_layers,
        "implementation": "naive" if args.attn == "moba_naive" else None,
    }
    given = {name: x for name, x in flags.items() if x is not None}
    return config_of_flags({**DEFAULTS, **(trained_with(args.adapted) if args.adapted else {}), **given})


def read_prompt(file: Path | None) -> str:
    """The text in `file`, or by default source files of Python's standard library and a question about them."""
    if file is None:
        library = Path(sysconfig.get_path("stdlib"))
        with one_line("cannot read Python's standard library"):
            sources = [f"# {name}\n{(library / name).read_text(encoding='utf-8')}" for name in FILES]
        return "\n\n".join([*sources, QUESTION])
    return read_file("--prompt-file", file)


def tokenize(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Tensor:
    """`[1, N]`: the text as a user message if the tokenizer has a chat template, else unchanged. Raises UserError if it is too long."""
    if tokenizer.chat_template:
        message = {"role": "user", "content": text}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
    context = context_of(model)
    if prompt.shape[1] + max_new_tokens > context:
        raise UserError(
            f"the prompt is too long: its {prompt.shape[1]:,} tokens and {max_new_tokens:,} new ones do not fit into the model's "
            f"context of {context:,}: give a shorter --prompt-file"
        )
    return prompt.to(model.device)


class TimedStreamer(TextStreamer):
    """Prints the answer as it is generated, and records when each token arrived. The first value that arrives is the prompt.

    Until the first new token, a progress bar shows the layers that have read the prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._model, self._progress = model, ExitStack()

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the value has been copied to the CPU, so the GPU has finished it
        self._progress.close()
        if len(self.times) == 1:
            self._progress.enter_context(layer_progress(self._model, f"Reading {value.numel():,} tokens"))
        super().put(value)

    def end(self) -> None:
        self._progress.close()
        super().end()


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, max_new_tokens: int) -> dict[str, str]:
    """Stream the answer, and return the timings as rows of a table."""
    warm_up(model, prompt)
    streamer = TimedStreamer(model, tokenizer)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    start, first, *others = streamer.times
    return {
        "prompt tokens": f"{prompt.shape[1]:,}",
        "new tokens": f"{1 + len(others):,}",
        "prefill seconds": f"{first - start:.2f}",
        "new tokens per second": f"{len(others) / (others[-1] - first):.1f}" if others else "-",
    }


def share_of_keys_read(n_tokens: int, block_size: int, top_k: int) -> float:
    """The keys that all tokens of a prompt read with MoBA, divided by those of full causal attention.

    A token reads its own block up to itself, and up to `top_k - 1` whole past blocks.
    """
    read = sum(t % block_size + 1 + block_size * min(t // block_size, top_k - 1) for t in range(n_tokens))
    return read / (n_tokens * (n_tokens + 1) // 2)


@torch.inference_mode()
def compare(model: PreTrainedModel, prompt: Tensor) -> dict[str, str]:
    """Read the prompt again with MoBA and with full attention, and return the differences as rows of a table."""
    reading = f"Reading {prompt.shape[1]:,} tokens again with"
    with layer_progress(model, f"{reading} MoBA"):
        states, seconds = hidden_states(model, prompt)
    with moba_flex.full_attention(model):
        warm_up(model, prompt)
        with layer_progress(model, f"{reading} full attention"):
            full_states, full_seconds = hidden_states(model, prompt)

    # In slices: all logits of a long prompt would take more memory than the model.
    head, targets = model.get_output_embeddings(), prompt[0, 1:]
    same, gain, full_gain = 0, 0.0, 0.0
    parts = list(zip(*(x.split(AT_ONCE) for x in (states[:-1], full_states[:-1], targets))))
    for part, full_part, target in tqdm(parts, desc="Comparing their next tokens", leave=False):
        logits, full_logits = head(part).float(), head(full_part).float()
        same += (logits.argmax(-1) == full_logits.argmax(-1)).sum().item()
        gain -= F.cross_entropy(logits, target, reduction="sum").item()
        full_gain -= F.cross_entropy(full_logits, target, reduction="sum").item()
    n = len(targets)
    return {
        "prefill seconds, MoBA": f"{seconds:.2f}",
        "prefill seconds, full attention": f"{full_seconds:.2f}",
        "same choice of next token": f"{same / n:.1%}",
        "mean log-likelihood, MoBA": f"{gain / n:.4f}",
        "mean log-likelihood, full attention": f"{full_gain / n:.4f}",
        "nats per token behind full attention": f"{(full_gain - gain) / n:+.4f}",
    }


def hidden_states(model: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, float]:
    """`[N, width]`, the hidden states that the language-model head gets, and the seconds that they took."""
    start = now(model.device)
    states = model.base_model(prompt, use_cache=True).last_hidden_state[0]
    return states, now(model.device) - start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def warm_up(model: PreTrainedModel, prompt: Tensor) -> None:
    """Run a first pass on a GPU, which compiles kernels. A CPU compiles nothing."""
    if model.device.type == "cuda":
        print("Warming up the GPU; the times below are without that.", file=sys.stderr)
        hidden_states(model, prompt)


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:<{width}}  {value:>8}" for name, value in rows.items()), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    flag = parser.add_argument
    parser.add_model_flag()
    flag(
        "--adapted",
        type=Path,
        nargs="?",
        const=ADAPTER,
        metavar="FOLDER",
        help="use an adapter that adapt.py trained for MoBA, examples/adapter unless a folder is named (default: no adapter)",
    )
    flag("--attn", choices=["moba", "moba_naive", "full"], default="moba", help="attention of the prefill")
    defaults = {name: f"the adapter's, or {DEFAULTS.get(name, 0)}" for name in ("block_size", "top_k", "sink_blocks", "recent_blocks")}
    parser.add_block_flags(**defaults, full_attention_layers="the adapter's, or none")
    parser.add_other_name("--moba-chunk-size", "--block-size", shown=True)
    parser.add_other_name("--moba-topk", "--top-k", shown=True)
    for name in ("sink-blocks", "recent-blocks"):
        parser.add_other_name(f"--moba-{name}", f"--{name}")
    parser.add_other_name("--moba-full-layers", "--full-attention-layers")
    flag("--prompt-file", type=Path, metavar="FILE", help="a text to read (default: files of Python's standard library, and a question)")
    flag("--max-new-tokens", type=count, default=64, metavar="N", help="longest answer")
    parser.add_device_flags()
    flag("--compare", action="store_true", help="read the prompt with full attention too, and say how they differ")
    args = parser.parse_args(argv)
    if args.compare and args.attn == "full":
        parser.error("argument --compare: compares MoBA with full attention, so that --attn must be moba or moba_naive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo, and return the exit code: 0, or 2 for an error that the user can fix."""
    return exit_code("llama.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    run_script(main)
