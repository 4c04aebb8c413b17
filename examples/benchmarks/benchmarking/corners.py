"""Batches as in real use: packed, padded, block sizes that are no power of two, float32, wide heads; each compared with a plain batch of
its size.

All calls of a case share one mask, as the layers of a model do, unless the case says otherwise.

B rows, H query heads, G key heads, N tokens of a row, T tokens of all rows, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex import moba_attention, moba_attention_varlen

from .attention import BOTH, FORWARD, Settings, one_pass
from .measure import Call
from .results import describe, find, markdown, number, of

FULL_BATCH = "4 rows"


@dataclass(frozen=True)
class Case:
    """One kind of batch of T tokens."""

    against: str | None = None  # the case by which its times are divided
    rows: int = 1
    sequences: tuple[int, ...] = ()  # packed, with these shares of T; empty: not packed
    real: tuple[float, ...] = ()  # the fraction of each row that is not padding; padding is on the left
    new_mask: bool = False  # in each call
    dense: bool = False
    change: Callable[[Settings], dict[str, Any]] = field(default=lambda row: {})


def _fewer_heads(row: Settings, by: int) -> dict[str, int]:
    return {"heads": max(1, row.heads // by), "key_heads": max(1, row.key_heads // by)}


def _in_float32(row: Settings) -> dict[str, Any]:
    return {"dtype": "float32", **_fewer_heads(row, 4)}


CASES = {
    "plain": Case(),
    "packed, 1 sequence": Case("plain", sequences=(1,)),
    FULL_BATCH: Case(rows=4),
    "packed, 4 sequences": Case(FULL_BATCH, sequences=(1,) * 4),
    "packed, 4 sequences, new in each call": Case(FULL_BATCH, sequences=(1,) * 4, new_mask=True),
    "32 rows": Case(rows=32),
    "packed, 32 sequences": Case("32 rows", sequences=(1,) * 32),
    "packed, 7 mixed lengths": Case(FULL_BATCH, sequences=(1, 9, 2, 5, 3, 8, 4)),
    "4 rows, 2 of them padded": Case(FULL_BATCH, rows=4, real=(1, 0.7, 1, 0.4)),
    "4 rows, 2 of them padded, new in each call": Case(FULL_BATCH, rows=4, real=(1, 0.7, 1, 0.4), new_mask=True),
    "block 100": Case("plain", change=lambda row: {"block_size": 100}),
    "block 64, top-16": Case(change=lambda row: {"block_size": 64, "top_k": 16}),
    "block 48, top-16": Case("block 64, top-16", change=lambda row: {"block_size": 48, "top_k": 16}),
    "twice the width, half the heads": Case("plain", change=lambda row: {"width": 2 * row.width, **_fewer_heads(row, 2)}),
    "float32, a quarter of the heads, dense": Case(dense=True, change=_in_float32),
    "float32, a quarter of the heads": Case("float32, a quarter of the heads, dense", change=_in_float32),
}


class Corners:
    """All cases at each number of tokens T. Cases take the place of systems in `run`. Only "auto" computes in float32."""

    scale = 1

    def __init__(self, row: Settings, device: torch.device, forward_only: bool, implementation: str = "auto") -> None:
        self.row, self.device, self.implementation = row, device, implementation
        self.systems = [name for name, case in CASES.items() if implementation == "auto" or "dtype" not in case.change(row)]
        self.passes = [FORWARD] if forward_only else [FORWARD, BOTH]
        self._masks: dict[tuple[Case, int], Tensor] = {}

    def title(self) -> str:
        return f"real batches: {self.row.title()}" + (f', "{self.implementation}"' if self.implementation != "auto" else "")

    def settings(self) -> dict:
        return {"workload": "corners", **vars(self.row), "implementation": self.implementation}

    def growth(self, system: str) -> int:
        return 2 if CASES[system].dense else 1

    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call:
        case = CASES[system]
        row = replace(self.row, **case.change(self.row))
        normal = partial(
            torch.randn, generator=torch.Generator(self.device).manual_seed(sample), device=self.device, dtype=getattr(torch, row.dtype)
        )
        heads = (row.heads, row.key_heads, row.key_heads)
        if case.sequences:
            shapes = [(tokens, h, row.width) for h in heads]
        else:
            shapes = [(case.rows, h, tokens // case.rows, row.width) for h in heads]
        leaves = [normal(shape).requires_grad_(pass_ == BOTH) for shape in shapes]
        grad = [normal(shapes[0])] if pass_ == BOTH else []
        return one_pass(self.attention(case, row, tokens), leaves, grad, pass_)

    def attention(self, case: Case, row: Settings, tokens: int) -> Callable[..., Tensor]:
        if case.dense:
            return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=row.heads != row.key_heads)
        blocks = {"block_size": row.block_size, "top_k": row.top_k, "implementation": self.implementation}
        if not (case.sequences or case.real):
            return partial(moba_attention, **blocks)
        function, name = (moba_attention_varlen, "cu_seqlens") if case.sequences else (moba_attention, "padding_mask")
        mask = self.mask(case, tokens)

        def attend(*tensors: Tensor) -> Tensor:
            return function(*tensors, **{name: mask.clone() if case.new_mask else mask}, **blocks)

        return attend

    def mask(self, case: Case, tokens: int) -> Tensor:
        """`cu_seqlens` or `padding_mask`, the same tensor for all samples."""
        if (case, tokens) not in self._masks:
            packed, padded = partial(bounds, case.sequences, tokens), partial(left_padding, case.real, tokens // case.rows)
            self._masks[case, tokens] = (packed if case.sequences else padded)(self.device)
        return self._masks[case, tokens]


def bounds(shares: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences that divide `tokens` in this proportion."""
    ends = [tokens * part // sum(shares) for part in itertools.accumulate(shares, initial=0)]
    return torch.tensor(ends, device=device, dtype=torch.int32)


def left_padding(real: tuple[float, ...], tokens: int, device: torch.device) -> Tensor:
    """`[B, N]`, True for real tokens."""
    first = torch.tensor([round(tokens * (1 - part)) for part in real], device=device)
    return torch.arange(tokens, device=device) >= first[:, None]


def table(run: dict) -> str:
    """One line per case: milliseconds of each pass, their ratios to the case that it is compared with, and peak memory."""
    parts, passes = [describe(run)], of(run, "pass")
    for tokens in of(run, "tokens"):
        rows = [["batch", *passes, "against", *(f"ratio, {pass_}" for pass_ in passes), "peak GB"]]
        for name in of(run, "system"):
            against = CASES[name].against if name in CASES else None
            here = [find(run, name, pass_, tokens) or {} for pass_ in passes]
            there = [find(run, against, pass_, tokens) or {} for pass_ in passes] if against else [{} for _ in passes]
            times = [number(r["milliseconds"]) if "milliseconds" in r else r.get("skipped", "failed") for r in here]
            both = [("milliseconds" in a and "milliseconds" in b) for a, b in zip(here, there)]
            ratios = [f"{a['milliseconds'] / b['milliseconds']:.2f}" if known else "" for a, b, known in zip(here, there, both)]
            rows.append([name, *times, against or "", *ratios, f"{max(r.get('peak_gb', 0) for r in here):.2f}"])
        parts.append(f"{tokens:,} tokens, milliseconds\n{markdown(rows)}")
    parts += [f"failed: {r['system']}, {r['pass']}, {r['tokens']:,} tokens: {r['failed']}" for r in run["results"] if "failed" in r]
    return "\n\n".join(parts)
