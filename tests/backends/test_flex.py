"""The FlexAttention path without a GPU: the same masks, lists and steps on PyTorch's uncompiled FlexAttention, against eager.

Uncompiled FlexAttention asks `mask_mod` alone and compiled kernels ask the lists first, so a test here holds the one against the
other.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import unchecked
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_flex import attention as attention_module
from moba_flex.backends import dense_mask, flex, paths
from moba_flex.backends.block_masks import block_at, decided_by_lists, local_mask, own_tile_rule, place_at, routed_mask
from moba_flex.core import chunking as chunks_module
from moba_flex.core.chunking import QUERY_TILE, chunks, max_elements
from moba_flex.core.layout import slots_per_block
from moba_flex.core.layout_builders import _persistent_layout, dense_layout, packed_layout, padded_layout, with_last_queries
from moba_flex.core.settings import AttentionSettings
from moba_flex.operator import attention
from moba_flex.ops import gate
from moba_flex.ops.routing import route


@pytest.fixture(autouse=True)
def plain_flex_attention(monkeypatch):
    """Uncompiled."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@st.composite
def cases(draw):
    groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_key = draw(st.integers(1, 100) | st.integers(100, 300))
    causal = draw(st.booleans())
    forced = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1)])) if causal else (0, 0)
    return {
        "rows": draw(st.integers(1, 2)),
        "heads": groups * repeats,
        "groups": groups,
        "n_query": draw(st.one_of(st.just(n_key), st.integers(1, n_key))),
        "n_key": n_key,
        "block_size": draw(st.sampled_from([7, 16, 40, 64, 100] if n_key <= 100 else [64, 100, 128, 160, 256])),
        "top_k": draw(st.integers(1 + sum(forced), 5)),
        "sink_blocks": forced[0],
        "recent_blocks": forced[1],
        "causal": causal,
        "padding": draw(st.sampled_from(["none", "left", "right", "packed", "packed, more keys"])),
        "share_selection": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "seed": draw(st.integers(0, 1000)),
    }


def visibility(case: dict, generator: torch.Generator):
    """A padding mask or bounds of packed sequences, or neither."""
    if "packed" in case["padding"]:
        cuts = torch.randint(0, case["n_key"] + 1, (2,), generator=generator).sort().values.tolist()
        bounds = torch.tensor([0, *cuts, case["n_key"]], dtype=torch.int32)
        if case["padding"] == "packed":
            return None, bounds
        kept = torch.randint(0, 4, (3,), generator=generator)  # no query, one, some, all
        some = torch.stack([torch.zeros(3), torch.ones(3), bounds.diff() * 0.6, bounds.diff()])[kept, torch.arange(3)].int()
        lengths = torch.minimum(some, bounds.diff()) if some.any() and bounds.diff()[some > 0].any() else bounds.diff()
        return None, torch.stack([torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), bounds])
    if case["padding"] == "none":
        return None, None
    length = torch.randint(0, case["n_key"] + 1, (case["rows"], 1), generator=generator)
    position = torch.arange(case["n_key"])
    return position < length if case["padding"] == "right" else position >= case["n_key"] - length, None


def queries_and_rows(case: dict) -> tuple[int, int]:
    if "packed" not in case["padding"]:
        return case["n_query"], case["rows"]
    bounds = visibility(case, torch.Generator().manual_seed(case["seed"]))[1]
    return int(bounds[..., -1].flatten()[0]), 1


def prepared(case: dict):
    """Layout, settings_ and the routes of random queries, as the operator makes them."""
    generator = torch.Generator().manual_seed(case["seed"])
    padding_mask, bounds = visibility(case, generator)
    n_query, rows = queries_and_rows(case)
    block_size, width = case["block_size"], slots_per_block(case["block_size"])
    if bounds is not None and bounds.dim() == 2:
        tile = flex.slots_per_query_tile(width, n_query, 3)
        layout = with_last_queries(packed_layout(bounds[1], case["n_key"], block_size, width), bounds, n_query, tile)
    elif bounds is not None:
        layout = packed_layout(bounds, case["n_key"], block_size, width)
    elif padding_mask is not None:
        layout = padded_layout(padding_mask, n_query, block_size, width)
    else:
        layout = dense_layout(rows, n_query, case["n_key"], block_size, width, torch.device("cpu"))
    names = ("block_size", "top_k", "sink_blocks", "recent_blocks", "causal")
    settings_ = AttentionSettings(**{name: case[name] for name in names}, scale=0.25)
    query = layout.query_slots(torch.randn(rows, case["heads"], n_query, 4, generator=generator))
    key = layout.key_slots(torch.randn(rows, case["groups"], case["n_key"], 4, generator=generator))
    pairs = rows * case["heads"] * layout.max_pairs(settings_.n_routed, settings_.causal)
    chosen = gate.choose(query, key, layout, settings_)
    routes = route(chosen, case["groups"], layout.n_key_blocks, QUERY_TILE, pairs) if pairs else None
    return layout, settings_, routes


def operands(case: dict) -> list[torch.Tensor]:
    n_query, rows = queries_and_rows(case)
    shapes = (rows, case["heads"], n_query, 8), (rows, case["groups"], case["n_key"], 8), (rows, case["groups"], case["n_key"], 6)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def settings_of(case: dict, implementation: str) -> tuple:
    sizes = [*(case[name] for name in ("block_size", "top_k", "sink_blocks", "recent_blocks")), 1 << 30]
    return sizes, case["causal"], case["share_selection"], 0.3, case["softcap"], implementation


def computed(case: dict, implementation: str) -> list[torch.Tensor]:
    """Output, finite log-sum-exp and gradients of a loss that uses both."""
    leaves = operands(case)
    padding_mask, bounds = visibility(case, torch.Generator().manual_seed(case["seed"]))
    out, lse, _ = attention(*leaves, padding_mask, bounds, *settings_of(case, implementation))
    lse = torch.where(lse == -torch.inf, 0, lse)
    loss = (out * torch.arange(out.numel()).view_as(out).sin()).sum() + lse.sin().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def assert_same(results: list[torch.Tensor], wanted: list[torch.Tensor], case: dict) -> None:
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), results, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name} of {case}: {text}")


@settings(max_examples=25)
@given(cases())
def test_flex_equals_eager_values_and_gradients(case):
    assert_same(computed(case, "flex"), computed(case, "eager"), case)


def takes_a_dense_mask(query, key, value, settings_, block_size, n_blocks, last_queries) -> str | None:
    """As on a GPU, but for device, dtype and the number of keys."""
    fits = settings_.causal and settings_.n_routed and not last_queries and n_blocks <= 32 and block_size > 32
    return None if fits and settings_.implementation == "flex" else "it does not fit"


@settings(max_examples=60)
@given(cases())
def test_a_dense_mask_equals_eager_values_and_gradients(case):
    wanted, calls, real = computed(case, "eager"), [], dense_mask.attend
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paths, "dense_mask_obstacle", takes_a_dense_mask)
        patched.setattr(dense_mask, "attend", lambda *args: calls.append(args) or real(*args))
        assert_same(computed(case, "flex"), wanted, case)
    if case["causal"] and case["top_k"] > 1 and case["block_size"] > 40 and case["padding"] in ("none", "left", "right", "packed"):
        assert calls


@settings(max_examples=50)
@given(cases())
def test_the_lists_of_the_dense_mask_hold_what_a_query_may_read(case):
    """Compiled kernels read these tiles alone."""
    case |= {"causal": True, "sink_blocks": 0, "recent_blocks": 0, "top_k": max(2, case["top_k"])}
    case |= {"block_size": max(64, case["block_size"]), "padding": case["padding"].removesuffix(", more keys")}
    layout, _, _ = prepared(case)
    tile, per = dense_mask.MASK_TILE, layout.width // dense_mask.MASK_TILE
    by_query = listed(dense_mask._lists(layout), layout.n_query_blocks * per, layout.n_key_blocks * per)
    in_block = torch.arange(layout.width)
    block, slot = (x.flatten(1) for x in (layout.own[..., None] + 0 * in_block, 0 * layout.own[..., None] + in_block))
    first = layout.first.repeat_interleave(layout.width, 1)
    key_block, key_slot = torch.arange(layout.n_key_blocks).repeat_interleave(layout.width), in_block.repeat(layout.n_key_blocks)
    same = (key_block == block[..., None]) & (key_slot <= slot[..., None])
    past = (key_block < block[..., None]) & (key_block >= first[..., None])
    may_read = (same | past).unflatten(1, (-1, tile)).unflatten(3, (-1, tile))
    wanted = may_read.any(4).any(2).int() + may_read.all(4).all(2).int()
    holds_queries = (layout.query_stop > layout.query_start).repeat_interleave(per, 1)
    assert torch.equal(by_query[holds_queries], wanted[holds_queries]) and not by_query[~holds_queries].any()
    left_open = own_tile_rule(tile)(None, None, torch.arange(tile)[:, None], torch.arange(tile))  # decides in the partial tiles
    assert (may_read.transpose(2, 3)[by_query == 1] == left_open).all()


@settings(max_examples=25)
@given(cases(), st.booleans())
def test_a_key_head_beyond_the_reach_of_a_kernel_is_worked_through_in_parts(case, whole_heads):
    def short(query, key, value, layout, settings_, *_):
        width, blocks = max(query.shape[-1], value.shape[-1]), layout.n_query_blocks if whole_heads else 1
        return chunks(query, key, value, layout, settings_, max_elements(1, blocks, width, layout, settings_), 3 * width)

    wanted = computed(case, "eager")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention_module, "chunks", short)
        for implementation in ("eager", "flex"):
            assert_same(computed(case, implementation), wanted, case)


@settings(max_examples=25)
@given(cases(), st.integers(1, 6))
def test_no_step_has_more_heads_than_one_launch_serves(case, most):
    """The gate has one row at least, and all other steps the query heads of one key head."""
    repeats = case["heads"] // case["groups"]
    allowed = {"choose": case["heads"], "local": repeats, "route": repeats, "local_backward": repeats}
    wanted, seen = computed(case, "flex"), set()

    def watched(name: str):
        step = getattr(flex, name)

        def call(x, *args):
            assert x.shape[0] * x.shape[1] <= max(most, allowed[name])
            seen.add(name)
            return step(x, *args)

        return call

    _persistent_layout.cache_clear()  # with the chunks of calls before
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks_module, "MAX_HEADS", most)
        for name in allowed:
            patched.setattr(flex, name, watched(name))
        assert_same(computed(case, "flex"), wanted, case)
    _persistent_layout.cache_clear()
    assert seen


@settings(max_examples=50)
@given(cases(), st.sampled_from([(), (0,), (0, 1, 2), (0, 1, 3), (1, 2)]))
def test_outputs_and_gradients_lie_as_what_they_belong_to(case, which):
    """Heads together for each token, as a model's projections make them, of all or some; and torch.compile is told truly.

    3: the values are part of a fused projection.
    """
    told = visibility(case, torch.Generator().manual_seed(case["seed"]))
    straight = operands(case)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) if i in which else x.detach() for i, x in enumerate(straight)]
    if 3 in which:
        turned[2] = torch.nn.functional.pad(turned[2].transpose(1, 2), (0, 5))[..., :-5].transpose(1, 2)
    turned = [x.requires_grad_() for x in turned]

    def both(leaves, told):
        out, lse, _ = attention(*leaves, *told, *settings_of(case, "flex"))
        return out, lse, *torch.autograd.grad((out.sin().sum() + torch.where(lse == -torch.inf, 0, lse).sum()), leaves)

    wanted, got = both(straight, told), both(turned, told)
    assert_same(got, wanted, case)
    for x, like in zip((got[0], *got[2:]), (turned[0], *turned)):
        heads_first = like.is_contiguous() or not like.transpose(1, 2).is_contiguous()
        assert x.is_contiguous() if heads_first else x.transpose(1, 2).is_contiguous()
    with FakeTensorMode() as mode:
        fake = both([mode.from_tensor(x) for x in turned], [None if x is None else mode.from_tensor(x) for x in told])
    for real, said in zip(got, fake, strict=True):
        assert real.shape == said.shape and all(n == 1 or a == b for n, a, b in zip(real.shape, real.stride(), said.stride()))


@settings(max_examples=25)
@given(cases())
def test_rows_whose_tokens_lie_together_are_not_copied_for_the_local_call(case):
    """They are one behind the other, and so is what they see."""
    case |= {"padding": "none", "rows": 3, "n_query": case["n_key"], "causal": True}
    seen, real = [], flex.flex_forward

    def watched(query, key, value, mask, settings_):
        seen.append((query, mask))
        return real(query, key, value, mask, settings_)

    layout, settings_, _ = prepared(case)
    query, key, value = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in operands(case))
    query, key, value = layout.query_slots(query, True), *(layout.key_slots(x, True) for x in (key, value))
    wanted = flex.local(*(x.contiguous() for x in (query, key, value)), layout, settings_)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flex, "flex_forward", watched)
        got = flex.local(query, key, value, layout, settings_)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[1].is_contiguous()
    ((operand, mask),) = seen
    if layout.index_maps is None and case["heads"] > 1:  # else slots are filled, heads one after another, and one head lies in either way
        assert operand.data_ptr() == query.data_ptr() and operand.shape[0] == case["groups"] and operand.shape[2] == 3 * query.shape[2]
        by_query, by_key = tile_maps(mask, operand.shape[2], operand.shape[2])
        assert torch.equal(by_query, by_key)


@pytest.mark.parametrize("rows", [1, 2])
def test_keys_that_lie_further_apart_than_a_kernel_reaches_are_copied(rows, monkeypatch):
    """FlexAttention multiplies the number of a key by the distance between keys in 32 bits."""
    case = {"rows": rows, "heads": 4, "groups": 4, "n_query": 64, "n_key": 64, "block_size": 16, "top_k": 2, "padding": "none", "seed": 0}
    layout, settings_, _ = prepared(case | {"sink_blocks": 0, "recent_blocks": 0, "causal": True})
    query, key, value = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in operands(case))
    wanted, spans, real = flex.local(query, key, value, layout, settings_), [], flex.flex_forward

    def watched(query, key, value, *args):
        spans.extend(x.shape[2] * x.stride(2) for x in (key, value))
        return real(query, key, value, *args)

    monkeypatch.setattr(flex, "flex_forward", watched)
    flex.local(query, key, value, layout, settings_)
    assert min(spans) > 64 * 8  # one head is 64 * 8 numbers
    monkeypatch.setattr(flex, "MAX_TENSOR_ELEMENTS", 64 * 8)
    spans.clear()
    for a, b in zip(flex.local(query, key, value, layout, settings_), wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert max(spans) <= 64 * 8


def tile_maps(mask, n_query: int, n_key: int):
    """What the lists say: `[b, query tiles, key tiles]`, 0 nothing, 1 partial, 2 full, read by queries and by keys."""
    q_tiles, kv_tiles = n_query // mask.tiles[0], n_key // mask.tiles[1]
    return listed(mask.lists[:4], q_tiles, kv_tiles), listed(mask.lists[4:], kv_tiles, q_tiles).mT


def listed(lists, n_tiles: int, n_others: int) -> torch.Tensor:
    """`[b, tiles, tiles that they read]`: 0 nothing, 1 partial, 2 full."""
    rows = lists[0].shape[0]
    into = torch.zeros(rows, n_tiles, n_others, dtype=torch.int)
    for kind, counts, indices in ((1, lists[0], lists[1]), (2, lists[2], lists[3])):
        assert indices.shape[-1] == 1  # the kernel steps through the rest of the run
        for b in range(rows):
            for tile, (count, first) in enumerate(zip(counts[b, 0].tolist(), indices[b, 0, :, 0].tolist())):
                assert 0 <= first < n_others, "an index is loaded even where the count is 0"
                into[b, tile, first : first + count] = kind
    return into


def evaluated(mask, rows: int, n_query: int, n_key: int) -> torch.Tensor:
    """What the rule says of each pair of slots."""
    b, q, kv = torch.arange(rows)[:, None, None], torch.arange(n_query)[:, None], torch.arange(n_key)
    seen = mask.rule(b, torch.zeros((), dtype=torch.int), q, kv, *mask.buffers)
    return seen.expand(rows, n_query, n_key)


@settings(max_examples=50)
@given(cases(), st.booleans())
def test_the_lists_of_the_local_mask_say_what_its_rule_says(case, batch_merged):
    layout, _, _ = prepared(case | {"causal": True, "sink_blocks": 0, "recent_blocks": 0, "top_k": max(2, case["top_k"])})
    batch_merged = batch_merged and layout.tile is None
    mask = local_mask(layout, case["heads"], case["groups"], batch_merged)
    line, rows = (layout.own.shape[0], case["groups"]) if batch_merged else (1, layout.own.shape[0] * case["groups"])
    n_query, n_key = line * layout.n_query_blocks * layout.query_width, line * layout.n_key_blocks * layout.width
    by_query, by_key = tile_maps(mask, n_query, n_key)
    seen = evaluated(mask, rows, n_query, n_key).unflatten(1, (-1, mask.tiles[0])).unflatten(3, (-1, mask.tiles[1]))
    wanted = seen.any(4).any(2).int() + seen.all(4).all(2).int()
    holds_queries = (layout.query_stop > layout.query_start).view(rows // case["groups"], -1).repeat_interleave(case["groups"], 0)
    tiles = holds_queries.repeat_interleave(layout.query_width // mask.tiles[0], 1)
    on_gpu = decided_by_lists(mask, case["heads"] // case["groups"])  # is evaluated on partial tiles alone
    left_open = evaluated(on_gpu, rows, n_query, n_key).unflatten(1, (-1, mask.tiles[0])).unflatten(3, (-1, mask.tiles[1]))
    for name, lists in (("queries", by_query), ("keys", by_key)):
        listed = lists.clone()
        # A tile whose rule holds everywhere may stand among the partial ones.
        same = (listed == wanted) | ((listed == 1) & (wanted == 2))
        assert same[tiles].all(), (name, case)
        partial = (listed == 1) & tiles[..., None]
        assert torch.equal(left_open.transpose(2, 3)[partial], seen.transpose(2, 3)[partial]), (name, case)


@settings(max_examples=50)
@given(cases())
def test_the_lists_of_the_routed_mask_say_what_its_rule_says(case):
    layout, settings_, routes = prepared(case)
    if routes is None:
        assert settings_.n_routed == 0 or layout.max_pairs(settings_.n_routed, settings_.causal) == 0
        return
    mask = routed_mask(routes, layout, case["groups"], settings_.causal)
    n_query, n_key = routes.n_rows, layout.own.shape[0] * case["groups"] * layout.n_key_blocks * layout.width
    by_query, by_key = tile_maps(mask, n_query, n_key)
    used = routes.tile_in_use.bool()
    assert torch.equal(by_query, by_key), case
    assert (by_query[0, ~used] == 0).all()
    seen = evaluated(mask, 1, n_query, n_key).unflatten(1, (-1, mask.tiles[0])).unflatten(3, (-1, mask.tiles[1]))
    some, every = seen.any(4).any(2)[0, used], seen.all(4).all(2)[0, used]
    listed = by_query[0, used]
    assert torch.equal(listed > 0, some), case
    assert (every | (listed < 2)).all(), case  # nothing that the rule hides is listed as full
    if settings_.causal and layout.whole:
        assert (listed[some] == 2).all(), case  # no mask is evaluated for a past block


@pytest.mark.parametrize("width", [16, 64, 128, 192, 1024, 1088])
def test_a_rule_finds_the_block_and_the_place_of_a_slot(width):
    slot = torch.arange(5 * width, dtype=torch.int32)
    assert torch.equal(block_at(slot, width), slot // width)
    assert torch.equal(place_at(slot, width), slot % width)


def test_heads_narrower_than_a_tile_are_widened_with_zeros():
    leaves = [torch.randn(1, heads, 90, width, requires_grad=True) for heads, width in ((4, 8), (2, 8), (2, 5))]
    results = []
    for implementation in ("eager", "flex"):
        out = unchecked(*leaves, block_size=16, top_k=3, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
