"""Few blocks as one dense call: its mask and its steps on PyTorch's uncompiled FlexAttention, against the specification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, assert_same, cases, examples, generator, gradients, operands, unchecked
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_flex.backends import dense_mask, flex
from moba_flex.backends.block_masks import bits_mask
from moba_flex.backends.paths import MAX_MASK_BLOCKS, dense_mask_obstacle
from moba_flex.core.layout import BlockLayout, slots_per_block
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.operator import attention
from moba_flex.ops import gate
from moba_flex.ops.bits import block_bits
from moba_flex.reference import reference_selection


@pytest.fixture(autouse=True)
def plain_flex_attention(monkeypatch):
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def takes_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> bool:
    return dense_mask_obstacle(query, key, value, settings, dense_layout=True) is None


def layout_of(case: Case) -> BlockLayout:
    width = slots_per_block(case.block_size)
    return dense_layout(case.batch, case.n_query, case.n_key, case.block_size, width, torch.device("cpu"))


@st.composite
def few(draw, block_sizes=(16, 48, 100, 128), max_tokens: int = 300) -> Case:
    """Cases of two blocks or more that follow each other without padding and are read in part."""
    block_size = draw(st.sampled_from(block_sizes), label="block_size")
    n_key = draw(st.integers(block_size + 1, max(block_size + 1, max_tokens)), label="n_key")
    sink_blocks, recent_blocks = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1)]))
    top_k = draw(st.sampled_from([k for k in (2, 3, 4, 8) if k > sink_blocks + recent_blocks]))
    return draw(
        cases(
            n_key=n_key,
            n_query=draw(st.just(n_key) | st.just(1) | st.integers(1, n_key), label="n_query"),
            block_size=block_size,
            top_k=top_k,
            sink_blocks=sink_blocks,
            recent_blocks=recent_blocks,
            batch=draw(st.integers(1, 2)),
            causal=True,
            padding=None,
        )
    )


@examples(40)
@given(few())
def test_masked_equals_the_specification_values_and_gradients(case):
    results = []
    for implementation in ("naive", "flex"):
        tensors = operands(case, requires_grad=True)
        if implementation == "flex":
            query, key, value = (tensors[name] for name in ("query", "key", "value"))
            assert takes_mask(query, key, value, case.attention_settings("flex")), case
        out = unchecked(**tensors, **case.settings, return_lse=True, implementation=implementation)
        results.append((*out, *gradients(out, tensors).values()))
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv", "dsinks"), *results):
        assert_same(b, a, f"{name} of {case}", rtol=1e-5, atol=1e-5)


def test_few_blocks_are_one_call_and_many_are_routed(monkeypatch):
    calls = []
    steps = {"masked": (dense_mask, "forward"), "masked backward": (dense_mask, "backward")}
    steps |= {name: (flex, name) for name in ("local", "routed", "local_backward", "routed_backward")}
    for name, (module, function) in steps.items():
        step = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *given, name=name, step=step: calls.append(name) or step(*given))

    def called(n_tokens: int, padding_mask: torch.Tensor | None = None, **settings) -> list[str]:
        calls.clear()
        x = torch.randn(1, 1, n_tokens, 16, requires_grad=True)
        unchecked(x, x, x, block_size=16, padding_mask=padding_mask, implementation="flex", **settings).sum().backward()
        return list(calls)

    routed = ["local", "routed", "local_backward", "routed_backward"]
    assert called(16 * MAX_MASK_BLOCKS, top_k=3) == ["masked", "masked backward"]
    assert called(16 * MAX_MASK_BLOCKS + 1, top_k=3) == routed
    assert called(100, torch.ones(1, 100).bool(), top_k=3) == routed
    assert called(100, top_k=3, causal=False) == ["routed", "routed_backward"]
    assert called(16, top_k=3) == called(100, top_k=1) == ["local", "local_backward"]  # nothing to choose


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(4, 2, 90), (3, 3, 90), (1, 1, 40), (4, 1, 70)])
def test_what_a_model_projects_is_read_where_it_lies(batch, heads, groups, tokens):
    """And torch.compile is told truly how the output lies in memory."""
    source = generator(0)
    shapes = (tokens, heads, 16), (tokens, groups, 16), (tokens, groups, 24)
    turned = [torch.randn(batch, *shape, generator=source).transpose(1, 2) for shape in shapes]
    straight = [x.contiguous() for x in turned]
    settings = None, None, (16, 3, 0, 0, 1 << 30), True, False, 0.25, None, "flex"
    results = []
    for given_ in (turned, straight):
        results.append(attention(*given_, *settings))
        with FakeTensorMode() as mode:
            said = attention(*(mode.from_tensor(x) for x in given_), *settings)
        for real, fake in zip(results[-1], said, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            assert all(n == 1 or a == b for n, a, b in zip(real.shape, real.stride(), fake.stride()))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[1][0].is_contiguous()
    if batch == 1:
        assert results[0][0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("heads", "tokens", "masked"), [(32, 1 << 11, True), (32, 1 << 12, False), (4, 1 << 13, True), (8, 1 << 13, False)]
)
def test_long_prompts_of_few_large_blocks_are_routed(heads, tokens, masked):
    query, key = torch.empty(1, heads, tokens, 128, device="meta"), torch.empty(1, 1, tokens, 128, device="meta")
    assert takes_mask(query, key, key, AttentionSettings(512, 3, implementation="flex")) == masked


def test_more_heads_than_one_launch_serves_are_routed():
    for rows, masked in ((2047, True), (2048, False)):
        x = torch.empty(rows, 32, 60, 16, device="meta")
        assert takes_mask(x, x, x, AttentionSettings(40, 2, implementation="flex")) == masked


def test_what_needs_wider_offsets_is_routed():
    settings = AttentionSettings(1 << 15, 4, implementation="flex")
    for heads, masked in ((63, True), (64, False)):  # 64 x 2^18 x 128 elements: chunks keep below that, a dense call cannot
        key = torch.empty(1, heads, 1 << 18, 128, device="meta")
        assert takes_mask(key[:, :, :1], key, key, settings) == masked


@examples(40)
@given(few((3, 7, 16, 48), 90))
def test_the_bits_are_the_blocks_that_the_specification_reads(case):
    tensors = operands(case)
    layout, settings = layout_of(case), case.attention_settings()
    query, key = tensors["query"], tensors["key"]
    bits = block_bits(gate.choose(layout.query_slots(query), layout.key_slots(key), layout, settings), layout)
    wanted, _ = reference_selection(query, key, case.but(share_selection=False).attention_settings())
    read = bits[..., None] >> torch.arange(wanted.shape[-1], dtype=torch.int32) & 1
    assert bits.shape == query.shape[:3]
    assert torch.equal(read.bool(), wanted), case


def test_the_last_of_thirty_two_blocks_has_a_bit_too():
    layout = dense_layout(1, 64, 64, 2, 2, torch.device("cpu"))
    chosen = torch.full((1, 1, 64, 2), -1, dtype=torch.int32)
    chosen[0, 0, 62:, 0] = 30
    mask = bits_mask(block_bits(chosen, layout), layout)
    q, kv = torch.arange(64)[:, None], torch.arange(64)
    seen = mask.rule(torch.zeros((), dtype=torch.int), torch.zeros((), dtype=torch.int), q, kv, *mask.buffers)
    past = (q // 2 == 31) & (kv // 2 == 30)
    assert torch.equal(seen, ((q // 2 == kv // 2) | past) & (kv <= q))


@examples(60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([16, 48, 128, 500]), st.integers(0, 1000))
def test_the_lists_of_the_mask_hold_the_tiles_of_causal_pairs_and_no_others(n_query, n_key, block_size, seed):
    n_query, n_key = sorted((n_query, n_key))
    layout = dense_layout(2, n_query, n_key, block_size, slots_per_block(block_size), torch.device("cpu"))
    bits = torch.randint(-(2**31), 2**31, (2, 3, n_query), generator=generator(seed)).int()
    mask = bits_mask(bits, layout)
    tile = mask.tiles[0]
    assert mask.lists[2:4] == mask.lists[6:] == (None, None)
    assert mask.tiles == (tile, tile)

    pairs = torch.ones(n_query, n_key).tril(n_key - n_query)
    grid = torch.nn.functional.pad(pairs, (0, -n_key % tile, 0, -n_query % tile))
    wanted = grid.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).amax((1, 3)).bool()
    for lists, met in ((mask.lists[:2], wanted), (mask.lists[4:6], wanted.T)):
        assert lists[0].shape == lists[1].shape[:-1] == (1, 1, max(2, len(met)))
        assert lists[1].shape[-1] == 1  # the kernel steps through the rest of the run
        counts, firsts = lists[0][0, 0, : len(met)], lists[1][0, 0, : len(met), 0]
        column = torch.arange(met.shape[1])
        assert ((firsts >= 0) & (firsts < met.shape[1])).all()
        assert torch.equal((column >= firsts[:, None]) & (column < (firsts + counts)[:, None]), met)

    seen = mask.rule(
        torch.arange(2)[:, None, None, None],
        torch.arange(3)[:, None, None],
        torch.arange(n_query)[:, None],
        torch.arange(n_key),
        *mask.buffers,
    )
    assert not (seen & ~pairs.bool()).any()  # so no pair that may be read lies outside the lists, whatever the bits
