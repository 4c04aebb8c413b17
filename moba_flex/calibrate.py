"""Find MoBA's settings for a pretrained model without training, and print the Python that uses them.

    python -m moba_flex.calibrate --model HuggingFaceTB/SmolLM2-135M --length 4096
    python -m moba_flex.calibrate --model Qwen/Qwen3-8B --length 32768 --text-file book.txt code.txt --within 0.01 --output qwen

The result is printed as a table, and saved to OUTPUT.json (for `moba_flex.Calibration.load`) and OUTPUT.png. Each measurement is written
to OUTPUT.measured.json at once: after Ctrl-C the same command resumes. From Python: `moba_flex.calibrate(model, texts)`.

Exit code: 0; 1 if no settings are within the limits; 2, with a one-line message, for a user error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

from .analysis.calibration.calibrate import COSTS, calibrate, limits_of, sizes_of
from .analysis.calibration.report import Calibration
from .models import AutoModelForCausalLM

CODE = ("argparse.py", "ast.py", "asyncio/base_events.py", "tarfile.py", "typing.py", "zipfile.py")
Texts = list[Tensor]


class UserError(Exception):
    """An error that the user can fix. The message is one line."""


def main(argv: list[str] | None = None) -> int:
    """Calibrate and return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        return _run(args)
    except UserError as error:
        print(f"calibrate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"calibrate: interrupted: the same command goes on from {_beside(args.output, '.measured.json')}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    _check_flags(args)
    texts = _read(args.text_file) if args.text_file else standard_texts()
    model, tokenizer = _load(args.model, args.device, args.dtype)
    pieces = text_pieces(texts, tokenizer, args.length, args.texts)
    names = ("within", "last_quarter", "agreement", "retrieval", "cost", "block_sizes", "budgets")
    with _one_line():
        report = calibrate(
            model,
            pieces,
            tokenizer=tokenizer,
            length=args.length,
            file=_beside(args.output, ".measured.json"),
            **{name: getattr(args, name) for name in names},
        )
    return show(report, args.output, args.model)


def _check_flags(args: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is loaded."""
    for name, least in (("length", 1), ("texts", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, but is {getattr(args, name)}")
    with _one_line():
        limits_of(args.within, args.last_quarter, args.agreement, args.retrieval)
        for name in ("block_sizes", "budgets"):
            if getattr(args, name) is not None:
                sizes_of(name, getattr(args, name))
    _check_device(args.device)
    _check_output(args.output)


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors of `calibrate` that the user can fix."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def show(report: Calibration, output: Path, model: str) -> int:
    """Print the table, save JSON and figure, print the Python that uses the settings, and return the exit code."""
    print(report.table())
    report.save(_beside(output, ".json"))
    saved = [_beside(output, ".json")]
    try:
        report.figure().savefig(_beside(output, ".png"))
        saved.append(_beside(output, ".png"))
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"saved: {', '.join(map(str, saved))}")
    if report.config is None:
        return 1
    settings = str(report.config).removeprefix("MobaConfig")[1:-1]
    print("\nimport moba_flex")
    print(f'model = moba_flex.AutoModelForCausalLM.from_pretrained({_named(model)}, attn="full")')
    print(f"moba_flex.patch(model, {settings})")
    return 0


def text_pieces(texts: list[str], tokenizer: Any, length: int, most: int) -> Texts:
    """At most `most` pieces of `length` tokens, from each text in turn."""
    pieces = [_pieces(text, tokenizer, length, most) for text in texts]
    turns = [[of[i] for of in pieces if i < len(of)] for i in range(most)]
    found = [piece for turn in turns for piece in turn][:most]
    if len(found) < 2:
        raise UserError(
            f"the texts give {len(found)} pieces of {length:,} tokens, but at least 2 are needed: name more, or a smaller --length"
        )
    return found


def standard_texts() -> list[str]:
    """Prose and code that ship with Python: the language reference, and modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return ["\n\n".join(topics.values()), "\n".join(_read([library / name for name in CODE if (library / name).is_file()]))]


def _read(files: list[Path]) -> list[str]:
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the text {file}: {error}") from error
    return texts


def _pieces(text: str, tokenizer: Any, length: int, most: int) -> Texts:
    """At most `most` pieces of `length` tokens, spread over the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n = len(ids) // length
    places = [i * n // min(n, most) * length for i in range(min(n, most))]
    return [torch.tensor(ids[place : place + length]) for place in places]


def _load(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder, the hub or a GGUF file."""
    on_gpu = device.startswith("cuda")
    file = Path(name)
    where: dict[str, Any] = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    source = str(file.parent) if where else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        kind = getattr(torch, dtype or ("bfloat16" if on_gpu else "float32"))
        model: Any = AutoModelForCausalLM.from_pretrained(source, attn="full", dtype=kind, **where)
        return model.to(device), tokenizer
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the model {name!r}, as a local folder, a GGUF file or from the hub: {first}") from error


def _named(model: str) -> str:
    """The arguments of `from_pretrained` that load `model`."""
    return f"{str(Path(model).parent)!r}, gguf_file={Path(model).name!r}" if model.endswith(".gguf") else repr(model)


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


def _check_output(output: Path) -> None:
    if not output.name:
        raise UserError(f"--output must be the name of files, without an ending, but is {str(output)!r}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = _beside(output, ".json.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {output.parent}: {error.strerror}") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # PyTorch has several kinds of them
        raise UserError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m moba_flex.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--model", required=True, help="a model on the Hugging Face hub, a local folder or a GGUF file (required)")
    flag("--text-file", nargs="+", type=Path, metavar="FILE", help="texts, UTF-8 (default: prose and code that Python brings)")
    flag("--length", type=int, default=4096, metavar="N", help="tokens of each text (default: 4096)")
    flag("--texts", type=int, default=12, metavar="N", help="how many pieces of the files, at most; a third is searched with (default: 12)")
    flag("--within", type=float, default=0.02, metavar="X", help="nats per token behind full attention (default: 0.02)")
    flag("--last-quarter", type=float, metavar="X", help="the same in the last quarter of the texts (default: no limit)")
    flag("--agreement", type=float, metavar="X", help="least share of next tokens that agree, 0 to 1 (default: no limit)")
    flag("--retrieval", type=float, metavar="X", help="least share of the facts that full attention finds, 0 to 1 (default: no limit)")
    flag("--cost", choices=COSTS, default="auto", help="what is made small (default: auto, time on a GPU and keys read elsewhere)")
    flag("--block-sizes", nargs="+", type=int, metavar="N", help="tokens per block to search among (default: three, by length)")
    flag("--budgets", nargs="+", type=int, metavar="N", help="keys per query to search among (default: 1/16, 1/8, 1/4, 3/8 of the length)")
    flag("--output", type=Path, default=Path("calibration"), metavar="NAME", help="of the files, without an ending (default: calibration)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one, else cpu)")
    flag("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on cuda, else float32)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which was another one during the imports
    sys.exit(main())
