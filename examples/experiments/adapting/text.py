"""The text of `adapt.py`: sequences of tokens, some of them with facts and questions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from needle import training_sequence
from shared.command_line import Parser, UserError, one_line
from shared.flag_types import positive
from shared.package_text import KINDS, Document, collect, default_roots
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase


class Text:
    """Files as sequences of tokens: training sequences, in an order that depends on the seed, and held-out sequences."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self._args, self._tokenizer = args, tokenizer
        if args.needle_share:
            with one_line("--sequence-length is too short for --needle-share"):
                training_sequence(torch.zeros(args.sequence_length, dtype=torch.long), tokenizer, torch.Generator())
        with one_line("argument --text: cannot read the text to train on"):
            documents = collect(args.text or default_roots(), args.megabytes)
        self.held_out, self.held_out_files = {}, {}
        cut = tokenizer, args.sequence_length
        for kind in KINDS:
            self.held_out[kind], self.held_out_files[kind] = sequences(documents[kind].held_out, *cut, f"held-out {kind}", args.held_out)
        self._train = torch.cat([sequences(documents[kind].train, *cut, kind)[0] for kind in KINDS])
        self.fingerprint = [len(self._train), *(int(ids.sum()) for ids in (self._train, *self.held_out.values()))]

    def batch(self, step: int) -> Tensor:
        """`[B, N]`: what every run reads in that step. Each epoch has its own order."""
        size = self._args.batch_size
        return torch.stack([self._sequence(n) for n in range(step * size, (step + 1) * size)])

    def _sequence(self, n: int) -> Tensor:
        epoch, place = divmod(n, len(self._train))
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self._args.seed + epoch))
        ids, generator = self._train[order[place]], torch.Generator().manual_seed((self._args.seed << 32) + n)
        if torch.rand((), generator=generator) < self._args.needle_share:
            return training_sequence(ids, self._tokenizer, generator)
        return ids


def add_text_flags(parser: Parser, megabytes: float) -> None:
    flag = parser.add_argument
    flag("--text", type=Path, nargs="+", metavar="FOLDER", help="where text is looked for (default: all installed packages)")
    flag("--megabytes", type=positive, default=megabytes, metavar="X", help="most text of each kind, prose and code, that is looked at")


def check_folders(args: argparse.Namespace) -> None:
    """Raise UserError if --text names something that is not a folder."""
    if missing := [folder for folder in args.text or () if not folder.is_dir()]:
        raise UserError(f"argument --text: text is read from folders, but {missing[0]} is none")


def sequences(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int, what: str, most: int = sys.maxsize
) -> tuple[Tensor, list[str]]:
    """`[n, N]`, n at most `most`: concatenated files, each with an end-of-text token, cut into sequences; and the files' names."""
    ids, names = [], []
    for first in tqdm(range(0, len(documents), 32), desc=f"Tokens of {what}"):
        if len(ids) >= most * length:
            break
        part = documents[first : first + 32]
        names += [document.name for document in part]
        for tokens in tokenizer([document.text for document in part], add_special_tokens=False).input_ids:
            ids += [*tokens, tokenizer.eos_token_id]
    n = min(most, len(ids) // length)
    if n == 0:
        raise UserError(f"there is too little text: its {what} has {len(ids):,} tokens, but one sequence has {length:,}")
    return torch.tensor(ids[: n * length]).view(n, length), names
