"""What the code of README and docs is run with, in place of models from the hub and of the reader's own names.

A page's code is run as it stands, block by block, each in a namespace of its own and in an empty folder. Four things are substituted:

- **Names from the hub.** `from_pretrained("Qwen/Qwen3-8B")` of transformers' auto classes loads a tiny random Llama, or its tokenizer of
  bytes, from a folder. Names of folders that the code has written itself are left alone.
- **The reader's own names.** A comment `<!-- given: model, input_ids -->` before a block says which names it expects. `GIVEN` makes them.
- **Sizes.** A comment `<!-- smaller: 8192 -> 512 -->` before a block says which numbers of it are made smaller for the test.
- **The reader's own files and launcher.** The folder has a `book.txt`, and the environment is that of `torchrun` with one process.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOKENS, HEADS, WIDTH = 100, 4, 8
BOOK = "\n\n".join(f"Paragraph {i} says that blocks of keys are read by queries, again and again and again." for i in range(400))

_NOTES = re.compile(r"(?:^<!-- (?:given|smaller): .*? -->\n)+\Z", re.MULTILINE)
_NOTE = re.compile(r"<!-- (given|smaller): (.*?) -->")
_FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code on a page: its language, its text, the names that it is given, and the numbers that are made smaller."""

    page: Path
    line: int
    language: str
    code: str
    given: tuple[str, ...]
    smaller: tuple[tuple[str, str], ...]

    def for_tests(self) -> str:
        """The code with the numbers of `smaller` replaced, each of which it must hold."""
        code = self.code
        for written, small in self.smaller:
            code, n = re.subn(rf"\b{written}\b", small, code)
            assert n, f"{self}: there is no {written}"
        return code

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        before = _NOTES.search(text, 0, fence.start())
        notes = {kind: [part.strip() for part in parts.split(",")] for kind, parts in _NOTE.findall(before[0] if before else "")}
        smaller = tuple(tuple(part.split(" -> ")) for part in notes.get("smaller", ()))
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[2], fence[3], tuple(notes.get("given", ())), smaller))
    return found


@functools.cache
def _vocabulary() -> dict[str, int]:
    return {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def tiny_model() -> LlamaForCausalLM:
    """A Llama with random weights, and with as many layers as the pages name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GIVEN: dict[str, Callable[[], object]] = {
    **{name: functools.partial(_random, TOKENS, HEADS, WIDTH, seed=i) for i, name in enumerate(("q", "k", "v"))},
    **{name: functools.partial(_random, 1, HEADS, TOKENS, WIDTH, seed=i) for i, name in enumerate(("query", "key", "value"))},
    "cu_seqlens": lambda: torch.tensor([0, 30, TOKENS], dtype=torch.int32),
    "max_seqlen": lambda: TOKENS - 30,
    "model": tiny_model,
    "texts": lambda: [(torch.arange(128) * (i + 1)) % 32 + 2 for i in range(3)],
    "input_ids": lambda: torch.arange(128)[None] % 32 + 2,
}
