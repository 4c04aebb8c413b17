"""What one fuzzed call is: a `Draw`, plain values that print as Python, and how number n of a seed is drawn."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.cases import Case, Packed, generator, laid_out
from torch import Tensor

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "tokens first", "width first", "sliced", "every other", "expanded")
SAME_KERNELS = 320  # compiling one takes seconds
VALUES = ("normal", "integers", "repeated blocks", "equal keys", "large", "tiny")


@dataclass(frozen=True)
class Draw:
    """A call of `moba_attention`, or with `lengths` of `moba_attention_varlen`; with `keys` its sequences have so many keys.

    `spoilt` are places of NaN and the like: an operand's name, "padding" or an index into all of its numbers, and what stands there.
    """

    case: Case
    dtype: str = "float32"
    values: str = "normal"
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    spoilt: tuple[tuple[str, str | int, float], ...] = field(default=())
    memory: int | None = None
    threads: int = 1
    return_lse: bool = True
    routed: bool = False  # also where a GPU would compute all past blocks under a dense mask

    def but(self, **changes) -> Draw:
        of_case = {name: value for name, value in changes.items() if name in Case.__dataclass_fields__}
        others = {name: value for name, value in changes.items() if name not in of_case}
        return replace(self, case=self.case.but(**of_case), **others)

    def packed(self) -> Packed:
        return Packed(self.lengths, self.case, self.keys)

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """query, key, value and, if the case has them, sinks; all as the draw says they lie in memory."""
        case, source, dtype = self.case, generator(self.case.seed), DTYPES[self.dtype]
        shapes = {
            "query": (case.batch, case.heads, case.n_query, case.width),
            "key": (case.batch, case.groups, case.n_key, case.width),
            "value": (case.batch, case.groups, case.n_key, case.value_width),
        }
        tensors = {}
        for name, shape in shapes.items():
            x = self._numbers(name, shape, source).to(dtype)
            for where, at, number in self.spoilt:
                if where == name:
                    number = _at_most(torch.finfo(dtype).max, number)
                    x = x.masked_fill(self._padding(name), number) if at == "padding" else _put(x, at, number)
            tensors[name] = laid_out(x, self.layout).to(device)
        if case.sinks:
            tensors["sinks"] = torch.randn(case.heads, generator=source, dtype=torch.float64).to(dtype).to(device)
        return tensors

    def _numbers(self, name: str, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        if self.values == "integers":  # with many equal scores
            return torch.randint(-2, 3, shape, generator=source).double()
        x = torch.randn(shape, generator=source, dtype=torch.float64)
        if name == "key" and self.values == "equal keys":
            return x[:, :, :1].expand(shape).clone() if x.numel() else x
        if name == "key" and self.values == "repeated blocks":
            return x.index_select(2, torch.arange(shape[2]) % (2 * self.case.block_size)) if x.numel() else x
        return x * {"large": 30.0, "tiny": 1e-4}.get(self.values, 1.0)

    def _padding(self, name: str) -> Tensor:
        """`[B, 1, N, 1]`: padded queries, or keys."""
        mask = self.case.padding_mask()
        mask = torch.ones(self.case.batch, self.case.n_key).bool() if mask is None else mask
        return ~(self.case.real_queries() if name == "query" else mask)[:, None, :, None]


def _at_most(largest: float, number: float) -> float:
    """A finite number that a dtype can hold: the largest of another dtype may have been drawn."""
    return max(-largest, min(largest, number)) if math.isfinite(number) else number


def _put(x: Tensor, at: int, number: float) -> Tensor:
    if x.numel():
        x.view(-1)[at % x.numel()] = number
    return x


def draw(seed: int, number: int, device: str = "cpu") -> Draw:
    """Case `number` of `seed` for a device, the same in every run.

    On a GPU `SAME_KERNELS` cases in a row have all that a kernel is compiled for in common, but for strides, and but for what PyTorch's
    dense attention computes. A size of 1 is such a thing to torch.compile, and so is whether there are 128 queries: three in four of
    these rows of cases have several of everything.
    """
    if device == "cpu":
        return _draw(seed, str(number))
    family = f"kernels {number // SAME_KERNELS}"
    like, rng, own = _draw(seed, family), random.Random(f"{seed}/more {family}"), random.Random(f"{seed}/more {number}")
    one = next(one for one in (_draw(seed, f"{number}/{attempt}") for attempt in itertools.count()) if _kind(one) == _kind(like))
    block_size, width = rng.choice([like.case.block_size, 16, 32, 64, 128]), rng.choice([like.case.width, 64, 128])
    kernels = {
        "width": width,
        "value_width": rng.choice([like.case.value_width, 64, width, width]),
        "block_size": block_size,
        "scale": like.case.scale,
        "softcap": rng.choice([like.case.softcap, None]),
        "dtype": rng.choice([like.dtype, "float32", "bfloat16", "float16"]),
        "memory": like.memory,
        "threads": 1,
    }
    groups = one.case.groups
    if rng.random() < 0.75:
        groups = kernels["groups"] = 2
        if one.lengths is None:
            n_key, batch = own.randint(130 + block_size, 190 + block_size), own.randint(2, 3)
            kernels |= {"batch": batch, "n_key": n_key, "n_query": own.choice([n_key, n_key, own.randint(129, n_key)])}
            kernels["padding"] = None if one.case.padding is None else _paddings(own, batch, n_key)
    dense = one.case.causal and own.random() < 0.2
    if one.lengths is not None and (dense or own.random() < 0.5):  # long enough for PyTorch's kernels for packed sequences
        kernels["lengths"] = tuple(9 * n for n in one.lengths)
        kernels["keys"] = None if one.keys is None else tuple(9 * n for n in one.keys)
        kernels |= {"n_query": sum(kernels["lengths"]), "n_key": sum(kernels["keys"] or kernels["lengths"])}
    if dense:
        kernels |= _of_dense_attention(own, kernels["width"], kernels.get("n_key", one.case.n_key) if one.lengths is None else None)
    routed = random.Random(f"{seed}/routed {number}").random() < 0.4
    return one.but(**kernels, heads=groups * like.case.repeats, routed=routed)


def _of_dense_attention(rng: random.Random, width: int, n_key: int | None) -> dict[str, Any]:
    """What PyTorch's dense attention computes, which needs no kernels of ours. `n_key`: of rows that are not packed."""
    width = width if width % 8 == 0 else 64
    half = {"width": width, "value_width": width, "dtype": rng.choice(["bfloat16", "float16"]), "softcap": None}
    square = {} if n_key is None else {"n_query": n_key, "n_key": n_key}
    return {**half, **square, "top_k": 70, "sinks": False, "return_lse": False, "padding": None, "scale": rng.choice([None, 0.1, 1.0])}


def _kind(one: Draw) -> tuple[bool, bool, bool]:
    """What else kernels are compiled for."""
    return one.case.causal, one.lengths is not None, one.keys is not None


def _draw(seed: int, name: str) -> Draw:
    rng = random.Random(f"{seed}/{name}")
    pick = rng.choice
    long = rng.random() < 0.1
    lengths = tuple(pick([0, rng.randint(1, 30)]) for _ in range(rng.randint(1, 5))) if rng.random() < 0.12 else None
    keys = None
    if lengths is not None and random.Random(f"{seed}/keys {name}").random() < 0.5:
        lengths, keys = _with_more_keys(random.Random(f"{seed}/more keys {name}"), lengths)
    n_key = sum(keys or lengths) if lengths is not None else rng.randint(1, 200 if long else 40)
    n_query = sum(lengths) if lengths is not None else pick([n_key, n_key, rng.randint(1, n_key), 1])
    block_size = pick([rng.randint(1, 9), rng.randint(1, 9), 16, 17, 64, rng.randint(1, 100)])
    causal = rng.random() < 0.8
    sink_blocks, recent_blocks = (pick([0, 0, 1, 2]), pick([0, 0, 1, 2])) if causal else (0, 0)
    least = 1 + sink_blocks + recent_blocks
    groups = rng.randint(1, 3)
    batch = 1 if lengths is not None else rng.randint(1, 3)
    extreme = rng.random() < 0.2
    case = Case(
        batch=batch,
        heads=groups * rng.randint(1, 3),
        groups=groups,
        n_query=n_query,
        n_key=n_key,
        width=pick([rng.randint(1, 8), 16, 33]),
        value_width=pick([rng.randint(1, 8), 16, 33]),
        block_size=block_size,
        top_k=pick([least, least + 1, rng.randint(least, least + 5), max(least, -(-n_key // block_size) + 1), 70]),
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        causal=causal,
        share_selection=rng.random() < 0.3,
        scale=_of_any_size(rng, signed=True) if extreme else pick([None, None, 0.1, 1.0, 2.5, -0.7]),
        softcap=_of_any_size(rng) if extreme and rng.random() < 0.5 else pick([None, None, None, 0.5, 2.0, 30.0]),
        sinks=rng.random() < 0.3,
        padding=_paddings(rng, batch, n_key) if lengths is None and rng.random() < 0.4 else None,
        seed=rng.randint(0, 2**31),
    )
    dtype = pick(["float64", "float64", "float32", "float32", "bfloat16", "float16"])
    values = pick(["normal"] * 5 + list(VALUES))
    return Draw(
        case,
        dtype,
        "normal" if lengths is not None and values == "integers" else values,
        pick(["contiguous", *LAYOUTS]),
        lengths,
        keys,
        () if lengths is not None or rng.random() < 0.6 else tuple(_spoilt(rng, case, dtype) for _ in range(rng.randint(1, 3))),
        pick([None, None, None, 1, 20_000]),
        1 if rng.random() < 0.98 else pick([2, 3]),  # a busy machine takes long over them
        random.Random(f"{seed}/lse {name}").random() < 0.5,  # without it, a GPU may take the dense path
    )


def _with_more_keys(rng: random.Random, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of each sequence: chunks of prompts, tokens that are generated one by one, and what has no query now."""
    keys = tuple(n + rng.choice([0, rng.randint(0, 40), rng.randint(0, 150)]) for n in lengths)
    return tuple(rng.choice([n, n, min(1, n_key), 0]) for n, n_key in zip(lengths, keys)), keys


def _of_any_size(rng: random.Random, signed: bool = False) -> float:
    return 10 ** rng.uniform(-37.9, 38) * (rng.choice([1, 1, -1]) if signed else 1)


def _paddings(rng: random.Random, batch: int, n_key: int) -> tuple[tuple[int, int], ...]:
    rows = []
    for _ in range(batch):
        n = rng.choice([0, rng.randint(0, n_key), rng.randint(0, n_key // 2)])
        rows.append((n, 0) if rng.random() < 0.6 else (0, n))
    return tuple(rows)


def _spoilt(rng: random.Random, case: Case, dtype: str) -> tuple[str, str | int, float]:
    name = rng.choice(["query", "key", "value", "value"])
    largest = torch.finfo(DTYPES[dtype]).max
    if case.padding is not None and rng.random() < 0.5:
        return name, "padding", rng.choice([float("nan"), float("inf"), float("-inf"), largest, -largest])
    return name, rng.randint(0, 1 << 30), rng.choice([float("nan"), float("nan"), float("inf"), float("-inf")])
