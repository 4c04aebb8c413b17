"""The texts of a calibration: sequences of one length, the split into search and held-out texts, and facts put into them.

N tokens of a text, S search texts, H held-out texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.messages import shown
from ..inputs import check_ids

SHORTEST = 64  # tokens: shorter texts have too few blocks
HELD_OUT_PER_SEARCH = 2  # one text in three is a search text
FACTS = 8  # largest number of facts per text
_CONSONANTS, _VOWELS, _DIGITS = "bdfgklmnprstvz", "aeiou", "0123456789"


def sequences(texts: object, tokenizer: Any, length: int | None, model: nn.Module) -> list[Tensor]:
    """Each text as `[N]` int64 tokens on the CPU, cut to `length` or to the shortest of them. Raises ValueError or TypeError."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, (Iterable, Tensor)) or (isinstance(texts, Tensor) and not texts.dim()):
        raise TypeError(f"texts must be several texts, a list of strings or of token ids, but is {shown(texts)}: put it into a list")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"tokenizer must be one of transformers, but is {shown(tokenizer)}: load it with AutoTokenizer.from_pretrained")
    given = list(texts)
    if len(given) < 2:
        raise ValueError(
            f"texts has {len(given)} text{'s' * (len(given) != 1)}, but at least 2 are needed, one to search with and one to check on: "
            "give more, or cut a long one into pieces"
        )
    ids = [_tokens(i, text, tokenizer) for i, text in enumerate(given)]
    for i, x in enumerate(ids):
        if len(x):
            check_ids("calibrate", f"texts[{i}]", x, model)
    ids = [x.cpu() for x in ids]
    shortest = min(len(x) for x in ids)
    wanted = shortest if length is None else length
    if shortest < wanted:
        short = next(i for i, x in enumerate(ids) if len(x) == shortest)
        raise ValueError(f"texts[{short}] has {shortest:,} tokens, but length is {wanted:,}: leave it out, or give a smaller length")
    if wanted < SHORTEST:
        raise ValueError(f"texts of {wanted:,} tokens are too short: MoBA needs at least {SHORTEST}, and is for texts of thousands of them")
    return [x[:wanted] for x in ids]


def _tokens(i: int, text: object, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"texts[{i}] is a string, and strings need a tokenizer: give tokenizer=, or token ids in place of texts")
        text = tokenizer(text, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"texts[{i}] must be a string or token ids, but is {shown(text)}") from None
    if ids.dim() == 2 and len(ids) == 1:  # the shape that tokenizers return
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"texts[{i}] must be a string or one row of token ids, ints, but is {shown(text)}")
    return ids.long()


def split(n: int) -> tuple[list[int], list[int]]:
    """The indices of the search texts, and of the held-out texts.

    Every third text is a search text, so that both parts have texts of each kind, whether kinds alternate or follow each other.

    >>> from moba_flex.analysis.calibration.texts import split
    >>> split(7)
    ([0, 3, 6], [1, 2, 4, 5])
    """
    search = list(range(0, n, 1 + HELD_OUT_PER_SEARCH))
    return search, [i for i in range(n) if i not in search]


@dataclass(frozen=True)
class FactText:
    """A text `ids [N]` with facts in it, and with questions and answers at its end; `answers` are their positions."""

    ids: Tensor
    answers: tuple[tuple[int, int], ...]  # first position and one past the last, of each answer


def with_facts(ids: Tensor, tokenizer: Any, seed: int) -> FactText:
    """Put up to `FACTS` facts into a text without changing its length. They take at most a third of it.

    A fact is "The secret code of <made-up word> is <six digits>.", at a random position. Each is asked for at the end, in another order. It
    is the needle of `examples/experiments/needle.py`, several at once.
    """
    generator = torch.Generator().manual_seed(seed)
    facts = [(_word(generator), _pick(_DIGITS, 6, generator)) for _ in range(FACTS)]

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    statements = [tokens(f"\nThe secret code of {key} is {value}.\n") for key, value in facts]
    questions = [tokens(f"\nQuestion: What is the secret code of {key}?\nAnswer: The secret code of {key} is") for key, _ in facts]
    answers = [tokens(f" {value}") for _, value in facts]
    n = _most(len(ids) // 3, [len(a) + len(b) + len(c) for a, b, c in zip(statements, questions, answers)])
    asked = [(questions[i], answers[i]) for i in torch.randperm(n, generator=generator).tolist()]
    around = ids[: len(ids) - sum(map(len, statements[:n])) - sum(len(q) + len(a) for q, a in asked)].tolist()
    parts: list[int] = []
    places = sorted(torch.randint(len(around) + 1, (n,), generator=generator).tolist())
    for first, last, statement in zip([0, *places], places, statements):
        parts += around[first:last] + statement
    parts += around[places[-1] if places else 0 :]
    found = []
    for question, answer in asked:
        parts += question
        found.append((len(parts), len(parts) + len(answer)))
        parts += answer
    return FactText(torch.tensor(parts), tuple(found))


def _most(room: int, sizes: Sequence[int]) -> int:
    """How many of the first sizes fit."""
    n = 0
    while n < len(sizes) and sum(sizes[: n + 1]) <= room:
        n += 1
    return n


def _word(generator: torch.Generator) -> str:
    return "".join(a + b for a, b in zip(_pick(_CONSONANTS, 4, generator), _pick(_VOWELS, 4, generator)))


def _pick(letters: str, n: int, generator: torch.Generator) -> str:
    return "".join(letters[i] for i in torch.randint(len(letters), (n,), generator=generator).tolist())
