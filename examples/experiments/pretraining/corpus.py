"""Text that exists on any machine with Python: the source files of the standard library and of all installed packages.

Files are collected in the order of their paths, so that files of a package are neighbours and a long context has something to refer to.
Equal files count once. The SHA-256 of its text decides whether a file is held out, so that all machines hold out the same files. A
byte-level BPE is trained on a part of the other files. Both halves are stored as files of 16-bit tokens, which training memory-maps.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from shared.changed_settings import changes
from shared.command_line import UserError, one_line
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

ENDINGS = {".py", ".pyi", ".pyx", ".h", ".hpp", ".cuh", ".c", ".cpp", ".md", ".rst"}
END, VOCABULARY = "<|end|>", 8192
MOST_OF_A_FILE = 1 << 20  # bytes: larger files are generated tables
HELD_OUT_OF = 50  # one file in this many is held out
BPE_BYTES = 20_000_000  # of text to train the BPE on
AT_ONCE = 2048  # files tokenised together: enough that one long file does not delay the others
DESCRIPTION = "corpus.json"


class Corpus:
    """`train` and `held_out` `[T]`: uint16 tokens stored as int16, see `windows`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.description = json.loads((folder / DESCRIPTION).read_text())
        self.train, self.held_out = (torch.from_numpy(np.memmap(folder / f"{half}.bin", np.int16, "c")) for half in ("train", "held_out"))
        for half in ("train", "held_out"):
            if (wanted := self.description[half]["tokens"]) != (n := len(getattr(self, half))):
                raise ValueError(f"{half}.bin has {n} tokens instead of {wanted}")

    @property
    def vocabulary(self) -> int:
        return self.description["vocabulary"]

    @property
    def fingerprint(self) -> str:
        return self.description["fingerprint"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_file=str(self._folder / "tokenizer.json"), eos_token=END)


def windows(tokens: Tensor, which: Tensor, context: int) -> Tensor:
    """`[B, context + 1]` int64: the windows with these indices, each with the token after it."""
    at = which[:, None] * context + torch.arange(context + 1, device=which.device)
    return tokens[at].long() & 0xFFFF


def corpus(folder: Path, sources: list[Path] | None = None, most_bytes: int | None = None) -> Corpus:
    """The corpus in `folder`, created first if the folder has none. `sources` are folders of source files, by default Python's own.

    Raises UserError if the sources do not exist, have too little text to hold some out, or are not those of the existing corpus, or if the
    folder cannot be read or written.
    """
    asked = {"sources": sources and [str(source.resolve()) for source in sources], "most_bytes": most_bytes}
    if not (folder / DESCRIPTION).exists():
        if missing := [source for source in sources or () if not source.is_dir()]:
            raise UserError(f"--sources: there is no folder {missing[0]}")
        _make(folder, sources or _of_python(), most_bytes, asked)
    with one_line(f"{folder} has no whole text: delete it, and it is collected again"):
        found = Corpus(folder)
    given = {name: x for name, x in asked.items() if x is not None}
    if changed := changes(found.description.get("asked", given), given):
        raise UserError(f"the text in {folder} was collected otherwise: {changed}. Choose another --corpus, or delete it")
    return found


def _of_python() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


def _make(folder: Path, sources: list[Path], most_bytes: int | None, asked: dict) -> None:
    files: dict[str, str] = {}  # by the hash of their text
    size = 0
    for path in _paths(sources):
        if most_bytes is not None and size >= most_bytes:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        name = hashlib.sha256(text.encode()).hexdigest()
        if text and name not in files:
            files[name] = text
            size += len(text)
    held_out = [name for name in files if int(name[:8], 16) % HELD_OUT_OF == 0]
    train = [name for name in files if int(name[:8], 16) % HELD_OUT_OF]
    if not held_out or not train:
        where = ", ".join(map(str, sources))
        raise UserError(f"only {len(files)} different source files below {where}: none to train on, or none to hold out")

    tokenizer = _trained([files[name] for name in train])
    with one_line("cannot write to the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    counts, fingerprint = {}, hashlib.sha256()
    for half, names in (("train", train), ("held_out", held_out)):
        tokens = _tokens(tokenizer, [files[name] for name in names], half)
        tokens.tofile(folder / f"{half}.bin")
        fingerprint.update(tokens.tobytes())
        counts[half] = {"files": len(names), "bytes": sum(len(files[name].encode()) for name in names), "tokens": len(tokens)}
    description = {"vocabulary": tokenizer.get_vocab_size(), "fingerprint": fingerprint.hexdigest()[:16], "asked": asked, **counts}
    description["held_out"]["sha256"] = [name[:16] for name in held_out]
    (folder / DESCRIPTION).write_text(json.dumps(description))  # last: its existence marks the corpus as complete


def _paths(sources: list[Path]) -> list[Path]:
    found = {path for source in sources for path in source.rglob("*") if path.suffix in ENDINGS and path.is_file()}
    found = {path for path in found if path.stat().st_size <= MOST_OF_A_FILE}
    return sorted(found)


def _trained(texts: list[str]) -> Tokenizer:
    """A BPE of every n-th text, about `BPE_BYTES` in total."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every = -(-sum(map(len, texts)) // BPE_BYTES)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts[::every], trainer)
    return tokenizer


def _tokens(tokenizer: Tokenizer, texts: list[str], half: str) -> np.ndarray:
    end, parts = tokenizer.token_to_id(END), []
    for first in tqdm(range(0, len(texts), AT_ONCE), desc=f"tokenising, {half}"):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + AT_ONCE]):
            parts.append(np.array([*encoding.ids, end], np.uint16))
    return np.concatenate(parts)
