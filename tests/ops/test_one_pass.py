"""The one-pass kernels give the specification's output and gradients, in Triton's interpreter, for any shape that they serve.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_one_pass.py

Spare slots hold NaN, and so does the memory of results beforehand.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex.backends import eager
from moba_flex.backends import triton as triton_backend
from moba_flex.core.layout import BlockLayout, slots_per_block
from moba_flex.core.layout_builders import dense_layout, packed_layout, padded_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import gate, routing, rows
from moba_flex.ops.routing import Routes
from moba_flex.ops.triton import backward, block_programs, forward
from moba_flex.reference import reference_attention


@dataclass(frozen=True)
class Case:
    """One call, and the tiles that its kernels work with."""

    seed: int
    kind: str
    settings: AttentionSettings
    n_key: int
    n_query: int
    batch: int
    groups: int
    repeats: int
    width: int
    value_width: int
    dtype: torch.dtype
    transposed: bool  # strides
    skewed: bool  # all queries like the first block
    tile: int
    window: int
    keys: int
    queries: int

    @property
    def heads(self) -> int:
        return self.groups * self.repeats

    @property
    def slots(self) -> int:
        return slots_per_block(self.settings.block_size)


def draw(seed: int) -> Case:
    r = random.Random(seed)
    kind = r.choice(["dense", "dense", "suffix", "padded", "padded suffix", "packed"])
    block_size = r.choice([5, 16, 16, 20, 32, 48, 64, 100, 128])
    n_key = r.randint(1, 5 * block_size)
    causal = r.random() < 0.75 or "packed" in kind
    top_k = r.randint(1, 4)
    sinks = r.randint(0, 1) if causal and top_k > 2 else 0
    recent = r.randint(0, 1) if causal and top_k - sinks > 2 else 0
    width, softcap = r.choice([16, 16, 24, 32]), r.choice([None, None, 1.5])
    return Case(
        seed,
        kind,
        AttentionSettings(block_size, top_k, sinks, recent, causal=causal, scale=width**-0.5, softcap=softcap),
        n_key,
        r.randint(1, n_key) if "suffix" in kind else n_key,
        1 if kind == "packed" else r.randint(1, 2),
        r.randint(1, 2),
        r.choice([1, 1, 2, 3]),
        width,
        r.choice([16, 16, 20, 32]),
        r.choice([torch.float32, torch.float32, torch.float16]),
        r.random() < 0.4,
        r.random() < 0.3,
        r.choice([16, 32, 128]),
        r.choice([1, 2, 16]),
        r.choice([16, 32, 128]),
        r.choice([16, 32, 64]),
    )


def layout_of(case: Case) -> tuple[BlockLayout, dict[str, Tensor]]:
    """The layout of a case, and what tells the specification of it."""
    block_size, r = case.settings.block_size, random.Random(case.seed)
    if case.kind == "packed":
        cuts = sorted(r.sample(range(case.n_key + 1), min(2, case.n_key)))
        bounds = torch.tensor([0, *cuts, case.n_key], dtype=torch.int32)
        return packed_layout(bounds, case.n_key, block_size, case.slots), {"cu_seqlens": bounds}
    if "padded" in case.kind:
        mask = torch.zeros(case.batch, case.n_key, dtype=torch.bool)
        for row in mask:
            start = r.randint(0, case.n_key - 1)
            row[start : r.randint(start + 1, case.n_key)] = True
        return padded_layout(mask, case.n_query, block_size, case.slots), {"padding_mask": mask}
    return dense_layout(case.batch, case.n_query, case.n_key, block_size, case.slots, torch.device("cpu")), {}


def operands(case: Case) -> list[Tensor]:
    """Query, key, value and a gradient of the output: float64 of numbers that the case's dtype holds."""
    torch.manual_seed(case.seed)
    sizes = (case.heads, case.n_query, case.width), (case.groups, case.n_key, case.width)
    sizes += (case.groups, case.n_key, case.value_width), (case.heads, case.n_query, case.value_width)
    query, key, value, grad = (torch.randn(case.batch, *size) for size in sizes)
    if case.skewed:
        key[:, :, : case.settings.block_size] += 0.5
        query += 0.5
    return [x.to(case.dtype).double() for x in (query, key, value, grad)]


def in_slots(case: Case, layout: BlockLayout, per_query: list[Tensor], per_key: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors in block slots, NaN where no token is."""
    offset = torch.arange(layout.width)
    no_query = ~((offset >= layout.query_start[..., None]) & (offset < layout.query_stop[..., None])).flatten(1)
    no_key = (offset >= layout.block_keys[..., None]).flatten(1)
    moved = []
    for tensors, move, spare in ((per_query, layout.query_slots, no_query), (per_key, layout.key_slots, no_key)):
        filled = [move(x).clone() for x in tensors]
        for x in filled:
            x[spare[:, None].expand(x.shape[:3])] = torch.nan
        moved.append([x.to(case.dtype) if x.dim() == 4 else x.float() for x in filled])
    if case.transposed:
        moved = [[x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in tensors] for tensors in moved]
    return moved[0], moved[1]


def routes_of(case: Case, layout: BlockLayout, query: Tensor, key: Tensor) -> Routes | None:
    settings = case.settings
    chosen = gate.choose(layout.query_slots(query), layout.key_slots(key), layout, settings)
    pairs = case.batch * case.heads * layout.max_pairs(settings.n_routed, settings.causal)
    return routing.route(chosen, case.groups, layout.n_key_blocks, case.tile, pairs) if pairs else None


def interpreted_forward(case: Case, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """The kernels' output `[B, H, Nq, Dv]` and log-sum-exp `[B, H, Nq]`, float64."""
    (q,), (k, v) = in_slots(case, layout, [query], [key, value])
    monkeypatch.setattr(block_programs, "_LEAST_WINDOW", case.window)
    monkeypatch.setattr(forward, "program", lambda *_: (forward.next_power_of_2(layout.width), case.queries, 4, 2))
    out, lse = torch.zeros(*q.shape[:3], case.value_width, dtype=case.dtype), torch.full(q.shape[:3], -torch.inf)
    routes = routes_of(case, layout, query, key)
    partial = forward.one_pass_forward(q, k, v, routes, layout, case.settings, (out, lse))
    if partial is not None:
        into = torch.empty_like(out), torch.empty_like(lse)
        rows.merge(out, lse, *partial, routes, into)
        out, lse = into
    return layout.query_tokens(out).double(), layout.query_tokens(lse, fill=-torch.inf).double()


def interpreted_backward(
    case: Case,
    layout: BlockLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    monkeypatch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' gradients of query, key and value, in the case's dtype."""
    delta = (out * grad).sum(-1)
    (q, do, l, d), (k, v) = in_slots(case, layout, [query, grad, lse, delta], [key, value])
    l = l.masked_fill(l.isnan(), -torch.inf)
    keys = min(case.keys, backward.next_power_of_2(case.slots))
    monkeypatch.setattr(block_programs, "_LEAST_WINDOW", case.window)
    monkeypatch.setattr(backward, "program", lambda *_: (keys, case.queries, 4, 2, case.seed % 2 == 1))
    into = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    routes = routes_of(case, layout, query, key)
    backward.one_pass_backward(q, k, v, do, l.contiguous(), d.contiguous(), routes, layout, case.settings, into)
    return layout.query_tokens(into[0]), layout.key_tokens(into[1]), layout.key_tokens(into[2])


@pytest.mark.parametrize("seed", range(25))
def test_gradients_are_those_of_the_specification(seed: int, monkeypatch):
    case = draw(seed)
    layout, told = layout_of(case)
    query, key, value, grad = operands(case)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    out, lse = reference_attention(*leaves, case.settings, **told)
    wanted = torch.autograd.grad(out, leaves, grad)

    found = interpreted_backward(case, layout, query, key, value, grad, out.detach(), lse.detach(), monkeypatch)
    for name, x, y in zip(("query", "key", "value"), found, wanted):
        bound = (2e-5 if case.dtype == torch.float32 else 6e-3) * max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y, rtol=0, atol=bound, msg=lambda m, name=name: f"gradient of {name}: {m} in {case}")


@pytest.mark.parametrize("seed", range(1000, 1025))
def test_the_output_is_that_of_the_specification(seed: int, monkeypatch):
    case = draw(seed)
    layout, told = layout_of(case)
    query, key, value, _ = operands(case)
    wanted, wanted_lse = reference_attention(query, key, value, case.settings, **told)
    found, found_lse = interpreted_forward(case, layout, query, key, value, monkeypatch)
    bound = 1e-5 if case.dtype == torch.float32 else 6e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound * max(1.0, float(wanted.abs().max())), msg=lambda m: f"{m} in {case}")
    torch.testing.assert_close(found_lse, wanted_lse.double(), rtol=bound, atol=bound, msg=lambda m: f"log-sum-exp: {m} in {case}")


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_reach_no_block_that_cannot_see_them(name: str, bad: float, top_k: int, monkeypatch):
    """Of blocks of 20 tokens the fourth holds the last of them. What its own earlier tokens get is not promised: see docs/limits.md."""
    n, block_size, first = 100, 20, 60
    settings = AttentionSettings(block_size, top_k, scale=0.25)
    case = Case(7, "dense", settings, n, n, 2, 1, 2, 16, 16, torch.float32, False, False, 16, 1, 32, 16)
    layout, _ = layout_of(case)
    tensors = dict(zip(("query", "key", "value", "grad"), operands(case)))
    spoilt = {other: x.clone() for other, x in tensors.items()}
    spoilt[name][1, :, 79] = bad
    results = []
    for x in (tensors, spoilt):
        out, lse = reference_attention(x["query"], x["key"], x["value"], settings)
        found, found_lse = interpreted_forward(case, layout, x["query"], x["key"], x["value"], monkeypatch)
        grads = interpreted_backward(case, layout, *x.values(), out, lse, monkeypatch)
        results.append({"out": found, "lse": found_lse, **dict(zip(("query", "key", "value"), grads))})
    assert not results[1]["out"][1, :, 79].isfinite().all(), "not seen by its own token"
    for what, x in results[1].items():
        seen_by_spoilt = what in ("key", "value") and top_k > 1  # keys of earlier blocks too
        before = 0 if seen_by_spoilt else first
        for part in (x[0], results[0][what][0]), (x[1, :, :before], results[0][what][1, :, :before]):
            torch.testing.assert_close(*part, rtol=0, atol=0, msg=lambda m, what=what: f"{what}: {m}")
        if top_k == 1:
            torch.testing.assert_close(x[1, :, 80:], results[0][what][1, :, 80:], rtol=0, atol=0, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("causal", [True, False])
def test_the_backend_attends_as_eager_does(causal: bool):
    torch.manual_seed(0)
    settings = AttentionSettings(16, 3, causal=causal, scale=0.25, implementation="triton")
    layout = dense_layout(1, 100, 100, 16, 16, torch.device("cpu"))
    query = layout.query_slots(torch.randn(1, 4, 100, 16))
    key, value = (layout.key_slots(torch.randn(1, 2, 100, 16)) for _ in range(2))
    chosen, pairs = gate.choose(query, key, layout, settings), 4 * layout.max_pairs(settings.n_routed, causal)
    results = []
    for backend, routes in (
        (triton_backend, routing.route(chosen, 2, layout.n_key_blocks, 128, pairs)),
        (eager, eager.route(chosen, 2, layout.n_key_blocks, pairs)),
    ):
        into = torch.empty_like(query), torch.empty(query.shape[:3])
        backend.attend(query, key, value, routes, layout, settings, into)
        results.append([layout.query_tokens(x) for x in into])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_drawn_cases_cut_blocks_into_parts_and_sub_blocks():
    drawn = [draw(seed) for seed in range(25)]
    assert any(case.keys < case.slots for case in drawn)
    tiles = [routes.tiles_of_block.max() for case in drawn if (routes := routes_of(case, layout_of(case)[0], *operands(case)[:2]))]
    assert any(most > case.window for most, case in zip(tiles, drawn))
