"""What the property tests draw: small attention problems whose numbers divide nothing, and how to run them.

A `Case` is a handful of plain numbers, so that a failure's print-out is all one needs to see it again:

    case = Case(batch=1, heads=4, ...)      # pasted from the failure
    out, lse = attend(case, operands(case))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from moba_flex import dispatch, moba_attention, moba_attention_varlen
from moba_flex.core.settings import AttentionSettings

IMPLEMENTATIONS = ("eager", "naive")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
HALF = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # relative errors that are a dtype's own rounding


@dataclass(frozen=True)
class Case:
    """One call of `moba_attention`, but for the numbers in its tensors, which follow from `seed`."""

    batch: int = 1
    heads: int = 1
    groups: int = 1
    n_query: int = 8
    n_key: int = 8
    width: int = 4
    value_width: int = 4
    block_size: int = 3
    top_k: int = 2
    sink_blocks: int = 0
    recent_blocks: int = 0
    causal: bool = True
    share_selection: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    padding: tuple[tuple[int, int], ...] | None = None  # tokens of padding on the left and on the right of each row
    seed: int = 0

    @property
    def selection(self) -> dict:
        """The arguments that decide which blocks are read."""
        names = ("block_size", "top_k", "sink_blocks", "recent_blocks", "causal", "share_selection")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict:
        return {**self.selection, "scale": self.scale, "softcap": self.softcap}

    @property
    def n_blocks(self) -> int:
        return -(-self.n_key // self.block_size)

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    @property
    def real_scale(self) -> float:
        return self.width**-0.5 if self.scale is None else self.scale

    def padding_mask(self) -> Tensor | None:
        """`[B, Nk]` bool."""
        if self.padding is None:
            return None
        token = torch.arange(self.n_key)
        return torch.stack([(token >= left) & (token < self.n_key - right) for left, right in self.padding])

    def real_queries(self) -> Tensor:
        """`[B, Nq]` bool: the queries that are no padding."""
        mask = self.padding_mask()
        return torch.ones(self.batch, self.n_query).bool() if mask is None else mask[:, self.n_key - self.n_query :]

    def attention_settings(self, implementation: str = "eager") -> AttentionSettings:
        return AttentionSettings(**self.selection, scale=self.real_scale, softcap=self.softcap, implementation=implementation)

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def bounds(*lengths: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """`cu_seqlens` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@dataclass(frozen=True)
class Packed:
    """One call of `moba_attention_varlen`: `case` with its tokens cut into sequences; with `keys` these have so many, of which
    their queries are the last `lengths`.
    """

    lengths: tuple[int, ...]
    case: Case
    keys: tuple[int, ...] | None = None

    def cu_seqlens(self) -> Tensor:
        return bounds(*self.lengths)

    def cu_seqlens_k(self) -> Tensor | None:
        return None if self.keys is None else bounds(*self.keys)

    def layout_bounds(self) -> Tensor:
        """As the operator has them: `[n + 1]`, or `[2, n + 1]`."""
        bounds, bounds_k = self.cu_seqlens(), self.cu_seqlens_k()
        return bounds if bounds_k is None else torch.stack((bounds, bounds_k))

    def sequences(self) -> Iterator[tuple[slice, slice, Case]]:
        """The queries and the keys of each sequence, and the case that it is alone."""
        query = key = 0
        for n_query, n_key in zip(self.lengths, self.keys or self.lengths):
            yield slice(query, query + n_query), slice(key, key + n_key), self.case.but(n_query=n_query, n_key=n_key)
            query, key = query + n_query, key + n_key


@st.composite
def cases(draw, *, max_tokens: int = 40, padded: bool = False, **fixed) -> Case:
    """Any valid case; with `padded`, one that has a padding mask. What is given by name is not drawn."""

    def pick(name: str, strategy: st.SearchStrategy):
        return fixed[name] if name in fixed else draw(strategy, label=name)

    n_key = pick("n_key", st.integers(1, max_tokens))
    n_query = pick("n_query", st.just(n_key) | st.integers(1, n_key))
    block_size = pick("block_size", st.integers(1, 9) | st.sampled_from([16, 17, 64]))
    causal = pick("causal", st.sampled_from([True, True, True, False]))
    sink_blocks = pick("sink_blocks", st.integers(0, 2) if causal else st.just(0))
    recent_blocks = pick("recent_blocks", st.integers(0, 2) if causal else st.just(0))
    least = 1 + sink_blocks + recent_blocks if causal else 1
    top_k = pick("top_k", st.integers(least, least + 4) | st.just(max(least, -(-n_key // block_size) + 1)))
    groups = pick("groups", st.integers(1, 3))
    heads = pick("heads", st.sampled_from([groups, 2 * groups, 3 * groups]))
    batch = pick("batch", st.integers(1, 3))
    padding = pick("padding", st.tuples(*[paddings(n_key)] * batch) | (st.nothing() if padded else st.none()))
    return Case(
        batch,
        heads,
        groups,
        n_query,
        n_key,
        pick("width", st.integers(1, 7)),
        pick("value_width", st.integers(1, 7)),
        block_size,
        top_k,
        sink_blocks,
        recent_blocks,
        causal,
        pick("share_selection", st.booleans()),
        pick("scale", st.none() | st.sampled_from([0.1, 1.0, 2.5])),
        pick("softcap", st.none() | st.sampled_from([0.5, 2.0, 30.0])),
        pick("sinks", st.booleans()),
        padding,
        pick("seed", st.integers(0, 2**16)),
    )


def paddings(n_key: int) -> st.SearchStrategy[tuple[int, int]]:
    """Padding of one row: none, on the left, on the right, everywhere."""
    some = st.integers(0, n_key)
    return st.just((0, 0)) | st.tuples(some, st.just(0)) | st.tuples(st.just(0), some)


@st.composite
def packed_cases(draw, more_keys: bool | None = False, **fixed) -> Packed:
    """Sequences packed one after another, empty ones among them; with `more_keys` they may have more keys than queries (None: or not)."""
    lengths = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=5), label="lengths"))
    keys = None
    if draw(st.booleans(), label="more keys") if more_keys is None else more_keys:
        keys = tuple(draw(st.tuples(*[st.integers(n, n + 30) | st.just(n) for n in lengths]), label="keys"))
        if draw(st.booleans(), label="decoding"):
            lengths = tuple(draw(st.tuples(*[st.just(min(1, n)) | st.just(m) for n, m in zip(keys, lengths)]), label="few queries"))
    return Packed(lengths, draw(cases(batch=1, n_key=sum(keys or lengths), n_query=sum(lengths), padding=None, **fixed)), keys)


def examples(count: int) -> settings:
    """How many cases a test draws. The first ones compile and warm up, so there is no deadline."""
    return settings(max_examples=count, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def operands(case: Case, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> dict[str, Tensor]:
    """query, key, value and, if the case has them, sinks."""
    source = generator(case.seed)
    shapes = {
        "query": (case.batch, case.heads, case.n_query, case.width),
        "key": (case.batch, case.groups, case.n_key, case.width),
        "value": (case.batch, case.groups, case.n_key, case.value_width),
    }
    if case.sinks:
        shapes["sinks"] = (case.heads,)
    drawn = {name: torch.randn(*shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.to(dtype).requires_grad_(requires_grad) for name, x in drawn.items()}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "width first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        return torch.cat([x, x + 1], 3)[..., : x.shape[3]]
    if layout == "every other":
        return torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2]
    if layout == "expanded":  # the same heads, with strides of 0
        return x[:, :1].expand_as(x)
    return x


def attend(case: Case, tensors: dict[str, Tensor], implementation: str = "eager") -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    mask = case.padding_mask()
    return moba_attention(**tensors, **case.settings, padding_mask=mask, return_lse=True, implementation=implementation)


def unchecked(query: Tensor, key: Tensor, value: Tensor, *, implementation: str, return_lse: bool = False, **given):
    """`moba_attention` without its checks, so that "flex" runs uncompiled on a CPU."""
    tensors = {name: given.pop(name) for name in ("padding_mask", "sinks") if name in given}
    scale = given.pop("scale", None)
    settings = AttentionSettings(**given, scale=query.shape[-1] ** -0.5 if scale is None else scale, implementation=implementation)
    out, lse = dispatch.attend(query, key, value, settings, **tensors, return_lse=return_lse)
    return (out, lse) if return_lse else out


def attend_packed(packed: Packed, tensors: dict[str, Tensor], implementation: str = "eager") -> tuple[Tensor, Tensor]:
    """The same for packed sequences, with everything still `[1, H, T, ...]`."""
    tensors = {name: x if name == "sinks" else x[0].transpose(0, 1) for name, x in tensors.items()}
    bounds = {"cu_seqlens": packed.cu_seqlens(), "cu_seqlens_k": packed.cu_seqlens_k()}
    out, lse = moba_attention_varlen(**tensors, **bounds, **packed.case.settings, return_lse=True, implementation=implementation)
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]


def gradients(outputs: tuple[Tensor, ...], tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of the tensors for a random gradient of every output."""
    upstream = [random(*out.shape, seed=seed + i, dtype=out.dtype) for i, out in enumerate(outputs)]
    return dict(zip(tensors, torch.autograd.grad(outputs, list(tensors.values()), upstream)))


def softmax_attention(case: Case, tensors: dict[str, Tensor], visible: Tensor) -> tuple[Tensor, Tensor]:
    """Textbook attention in float64 to the `visible [B, 1 or H, Nq, Nk]` keys: output and log-sum-exp."""
    query, key, value = (tensors[name].double() for name in ("query", "key", "value"))
    key, value = key.repeat_interleave(case.repeats, 1), value.repeat_interleave(case.repeats, 1)
    score = torch.einsum("bhqd,bhkd->bhqk", query, key) * case.real_scale
    if case.softcap is not None:
        score = torch.tanh(score / case.softcap) * case.softcap
    score = score.masked_fill(~visible, -torch.inf)
    if case.sinks:  # one more key with this score and a value of zeros
        sink = tensors["sinks"].double()[None, :, None, None].expand(*score.shape[:3], 1)
        score, value = torch.cat([score, sink], -1), torch.nn.functional.pad(value, (0, 0, 0, 1))
    return score.softmax(-1) @ value, score.logsumexp(-1)


def positions(case: Case) -> tuple[Tensor, Tensor]:
    """`[Nq, 1]` and `[1, Nk]`: the positions of queries and keys in an unpadded row."""
    key = torch.arange(case.n_key)[None]
    return key.T[case.n_key - case.n_query :], key


def assert_same(actual, expected, what: str = "", rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Equal to float64's rounding; `what` heads the message."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False, msg=lambda m: f"{what}: {m}" if what else m)
