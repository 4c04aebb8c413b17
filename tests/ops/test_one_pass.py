"""The one-pass kernels give the specification's output and gradients, in Triton's interpreter, for any shape that they serve.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_one_pass.py

Tokens lie as a caller has them, or in block slots. Spare slots and padding hold NaN, and so does the memory of results beforehand.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex import attention
from moba_flex.backends import eager, flex
from moba_flex.backends import triton as triton_backend
from moba_flex.core.layout import BlockLayout, slots_per_block
from moba_flex.core.layout_builders import dense_layout, packed_layout, padded_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import gate, plain, routing
from moba_flex.ops import triton as kernels
from moba_flex.ops.routing import Routes
from moba_flex.ops.triton import backward, block_programs, dense_mask, forward
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
    in_place: bool  # tokens are not in slots
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
        r.random() < 0.6,
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


def placed(case: Case, layout: BlockLayout, per_query: list[Tensor], per_key: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors as they lie, or in block slots, NaN where no token is."""
    if case.in_place:
        no_query, no_key = paddings(layout)
        index_maps = torch.clone, torch.clone
    else:
        offset = torch.arange(layout.width)
        no_query = ~((offset >= layout.query_start[..., None]) & (offset < layout.query_stop[..., None])).flatten(1)
        no_key = (offset >= layout.block_keys[..., None]).flatten(1)
        index_maps = layout.query_slots, layout.key_slots
    moved = []
    for tensors, move, spare in ((per_query, index_maps[0], no_query), (per_key, index_maps[1], no_key)):
        filled = [move(x).clone() for x in tensors]
        for x in filled:
            x[spare[:, None].expand(x.shape[:3])] = torch.nan
        moved.append([x.to(case.dtype) if x.dim() == 4 else x.float() for x in filled])
    if case.transposed:
        moved = [[x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in tensors] for tensors in moved]
    return moved[0], moved[1]


def paddings(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """`[B, Nq]` and `[B, Nk]`: the queries and keys that are in no block."""
    rows, index_maps = layout.own.shape[0], layout.index_maps
    if index_maps is None:
        return torch.zeros(rows, layout.n_query, dtype=torch.bool), torch.zeros(rows, layout.n_key, dtype=torch.bool)
    return index_maps.slot_of_query < 0, index_maps.slot_of_key < 0


def in_tokens(case: Case, layout: BlockLayout, x: Tensor, of_keys: bool, fill: float = 0) -> Tensor:
    """The inverse of `placed`, `fill` at padding."""
    if not case.in_place:
        return layout.key_tokens(x) if of_keys else layout.query_tokens(x, fill)
    none = paddings(layout)[of_keys][:, None].expand(x.shape[:3])
    assert x[none].isnan().all(), "written at padding"
    return torch.where(none if x.dim() == 3 else none[..., None], fill, x)


def routes_of(case: Case, layout: BlockLayout, query: Tensor, key: Tensor) -> Routes | None:
    settings = case.settings
    chosen = gate.choose(layout.query_slots(query), layout.key_slots(key), layout, settings)
    pairs = case.batch * case.heads * layout.max_pairs(settings.n_routed, settings.causal)
    return routing.route(chosen, case.groups, layout.n_key_blocks, case.tile, pairs) if pairs else None


def interpreted_forward(case: Case, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """The kernels' output `[B, H, Nq, Dv]` and log-sum-exp `[B, H, Nq]`, float64."""
    (q,), (k, v) = placed(case, layout, [query], [key, value])
    places = layout if case.in_place else layout.in_slots()
    monkeypatch.setattr(block_programs, "_LEAST_WINDOW", case.window)
    monkeypatch.setattr(forward, "program", lambda *_: (forward.next_power_of_2(layout.width), case.queries, 4, 2))
    out, lse = torch.full((*q.shape[:3], case.value_width), torch.nan, dtype=case.dtype), torch.full(q.shape[:3], torch.nan)
    if not case.settings.causal:
        out, lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    routes = routes_of(case, layout, query, key)
    partial = forward.one_pass_forward(q, k, v, routes, places, case.settings, (out, lse))
    if partial is not None:
        into = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
        kernels.merge(out, lse, *partial, routes, places, into)
        out, lse = into
    return in_tokens(case, layout, out, False).double(), in_tokens(case, layout, lse, False, -torch.inf).double()


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
    (q, do, l, d), (k, v) = placed(case, layout, [query, grad, lse, delta], [key, value])
    places = layout if case.in_place else layout.in_slots()
    l = l.masked_fill(l.isnan(), -torch.inf)
    keys = min(case.keys, backward.next_power_of_2(case.slots))
    monkeypatch.setattr(block_programs, "_LEAST_WINDOW", case.window)
    monkeypatch.setattr(backward, "program", lambda *_: (keys, case.queries, 4, 2, case.seed % 2 == 1))
    into = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    routes = routes_of(case, layout, query, key)
    backward.one_pass_backward(q, k, v, do, l.contiguous(), d.contiguous(), routes, places, case.settings, into)
    found = [in_tokens(case, layout, x, of_keys) for x, of_keys in zip(into, (False, True, True))]
    return found[0], found[1], found[2]


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


@pytest.mark.parametrize("seed", range(3000, 3016))
def test_the_output_under_a_dense_mask_is_that_of_the_specification(seed: int):
    case, r = draw(seed), random.Random(seed)
    settings = replace(case.settings, block_size=r.choice([64, 64, 128]), causal=True)
    n_key = r.randint(1, 5 * settings.block_size)
    case = replace(case, settings=settings, n_key=n_key, n_query=r.randint(1, n_key) if "suffix" in case.kind else n_key)
    layout, told = layout_of(case)
    query, key, value, _ = operands(case)
    wanted, wanted_lse = reference_attention(query, key, value, settings, **told)
    chosen = gate.choose(layout.query_slots(query), layout.key_slots(key), layout, settings)
    assert torch.equal(kernels.block_bits(chosen, layout), plain.block_bits(chosen, layout))
    (q,), (k, v) = placed(case, layout, [query], [key, value])
    out, lse = kernels.dense_mask_forward(q, k, v, chosen, layout if case.in_place else layout.in_slots(), settings)
    if not case.in_place:
        out, lse = layout.query_tokens(out), layout.query_tokens(lse, -torch.inf)
    bound = 1e-5 if case.dtype == torch.float32 else 6e-3
    within = bound * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=within, msg=lambda m: f"{m} in {case}")
    torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=bound, atol=bound, msg=lambda m: f"log-sum-exp: {m} in {case}")


def test_tokens_too_far_apart_for_the_dense_mask_are_copied():
    near, far = (torch.empty_strided((1, 2, 100, 16), (1, 16, step, 1), device="meta") for step in ((1 << 25) - 1, 1 << 25))
    assert dense_mask.within_reach(near) is near and dense_mask.within_reach(far).is_contiguous()


@pytest.mark.parametrize("seed", range(2000, 2010))
def test_both_passes_take_tokens_where_they_lie(seed: int, monkeypatch):
    """No query, key or value is copied to slots, in chunks of a key head too."""
    case = draw(seed)
    settings = replace(case.settings, implementation="triton", working_memory=1 if seed % 2 else 1 << 30)
    layout, told = layout_of(case)
    query, key, value, grad = operands(case)
    choice = gate.choose(layout.query_slots(query), layout.key_slots(key), layout, settings)
    for name in ("key_slots", "query_slots", "key_tokens", "query_tokens"):
        monkeypatch.delattr(BlockLayout, name)
    monkeypatch.setattr(triton_backend, "choose", lambda *_: choice)  # the interpreter takes long for a gate
    monkeypatch.setattr(flex.paths, "one_pass_backward_obstacle", lambda *_: None)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    wanted, wanted_lse = reference_attention(*leaves, settings, **told)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad)
    q, k, v, do = (x.to(case.dtype) for x in (query, key, value, grad))
    no_query, no_key = paddings(layout)
    for x, none in ((q, no_query), (k, no_key), (v, no_key), (do, no_query)):
        x[none[:, None].expand(x.shape[:3])] = torch.nan
    if case.transposed:
        q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do))
    out, lse, chosen = attention.forward(q, k, v, layout, settings)
    grads = attention.backward(do, None, q, k, v, out, lse, chosen, layout, settings)
    bound = 2e-5 if case.dtype == torch.float32 else 6e-3
    torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=bound, atol=bound, msg=lambda m: f"log-sum-exp: {m} in {case}")
    for name, x, y in zip(("output", "query", "key", "value"), (out, *grads), (wanted, *wanted_grads)):
        within = bound * max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y, rtol=0, atol=within, msg=lambda m, name=name: f"{name}: {m} in {case}")


@pytest.mark.parametrize("kind", ["suffix", "padded suffix", "packed"])
@pytest.mark.parametrize("block_size", [16, 20])
def test_the_gate_takes_tokens_where_they_lie(kind: str, block_size: int):
    case = replace(draw(0), kind=kind, n_key=90, n_query=90 if kind == "packed" else 50, batch=1 if kind == "packed" else 2, width=16)
    settings = AttentionSettings(block_size, 3, 1, scale=0.25)
    case = replace(case, settings=settings, dtype=torch.float32)
    layout, _ = layout_of(case)
    query, key = (x.float() for x in operands(case)[:2])
    wanted = kernels.choose(layout.query_slots(query), layout.key_slots(key), layout.in_slots(), settings)
    assert (wanted >= 0).any()
    for x, none in zip((query, key), paddings(layout)):
        x[none[:, None].expand(x.shape[:3])] = torch.nan
    assert torch.equal(kernels.choose(query, key, layout, settings), wanted)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_reach_no_block_that_cannot_see_them(name: str, bad: float, top_k: int, monkeypatch):
    """Of blocks of 20 tokens the fourth holds the last of them. What its own earlier tokens get is not promised: see docs/limits.md."""
    n, block_size, first = 100, 20, 60
    settings = AttentionSettings(block_size, top_k, scale=0.25)
    case = Case(7, "dense", settings, n, n, 2, 1, 2, 16, 16, torch.float32, True, False, False, 16, 1, 32, 16)
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
        # The spoilt token chooses other blocks, so that rows take other places in a tile. On some CPUs NumPy rounds these differently.
        for found, wanted in (x[0], results[0][what][0]), (x[1, :, :before], results[0][what][1, :, :before]):
            assert (found - wanted).norm() <= (1e-6 if top_k > 1 else 0) * wanted.norm(), what
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
