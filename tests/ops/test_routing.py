"""Where tokens and routed rows go: block layouts and `route`."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import Case, Packed, cases, examples, generator, operands, packed_cases, random

from moba_flex.backends import eager, flex
from moba_flex.core.chunking import chunks, max_elements
from moba_flex.core.layout import BlockLayout, slots_per_block
from moba_flex.core.layout_builders import dense_layout, packed_layout, padded_layout, with_last_queries
from moba_flex.ops import gate
from moba_flex.ops.routing import Routes, route, tiles_needed


def layout_of(case: Case, wide: bool = False) -> BlockLayout:
    """The layout of a case; `wide` with the slots a GPU tile needs."""
    width = slots_per_block(case.block_size) if wide else case.block_size
    if case.padding is not None:
        return padded_layout(case.padding_mask(), case.n_query, case.block_size, width)
    return dense_layout(case.batch, case.n_query, case.n_key, case.block_size, width, torch.device("cpu"))


def packed_layout_of(packed: Packed, wide: bool = False) -> BlockLayout:
    width = slots_per_block(packed.case.block_size) if wide else packed.case.block_size
    if packed.keys is None:
        return packed_layout(packed.cu_seqlens(), sum(packed.lengths), packed.case.block_size, width)
    n_query, backend = sum(packed.lengths), flex if wide else eager
    layout = packed_layout(packed.cu_seqlens_k(), sum(packed.keys), packed.case.block_size, width)
    tile = backend.slots_per_query_tile(width, n_query, len(packed.lengths))
    return with_last_queries(layout, packed.layout_bounds(), n_query, tile)


# Routing


@dataclass(frozen=True)
class Choice:
    """What the gate might have chosen, and how it is routed."""

    batch: int
    heads: int
    groups: int
    slots: int
    count: int
    n_blocks: int
    tile: int
    spare: int
    fewer: bool
    seed: int

    def chosen(self) -> torch.Tensor:
        """`[B, H, N, S]`: different blocks for each query, some of them none."""
        source, shape = generator(self.seed), (self.batch, self.heads, self.slots, self.n_blocks)
        chosen = torch.rand(*shape, generator=source).argsort(-1)[..., : self.count].int()
        if self.fewer:
            chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=source) < 0.5, -1)
        return chosen


@st.composite
def choices(draw) -> Choice:
    groups = draw(st.integers(1, 3))
    n_blocks = draw(st.integers(1, 6))
    return Choice(
        batch=draw(st.integers(1, 3)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        slots=draw(st.integers(1, 12)),
        count=draw(st.integers(1, n_blocks)),
        n_blocks=n_blocks,
        tile=draw(st.sampled_from([1, 2, 3, 8])),
        spare=draw(st.sampled_from([0, 1, 10])),
        fewer=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def query_of_row(routes: Routes) -> torch.Tensor:
    """`[R]`: the flat query of each row, -1 for spare rows."""
    pairs = routes.row_of_pair.flatten(0, 2)
    query, choice = (pairs >= 0).nonzero(as_tuple=True)
    rows = torch.full((routes.n_rows,), -1)
    rows[pairs[query, choice].long()] = query
    return rows


@examples(100)
@given(choices())
def test_routing_holds_every_chosen_pair_exactly_once(choice: Choice):
    chosen = choice.chosen()
    pairs = int((chosen >= 0).sum())
    routes = route(chosen, choice.groups, choice.n_blocks, choice.tile, max(1, pairs + choice.spare))
    taken = []
    for query, (row_of_choice, blocks) in enumerate(zip(routes.row_of_pair.flatten(0, 2).tolist(), chosen.flatten(0, 2).tolist())):
        batch, head = divmod(query // choice.slots, choice.heads)
        group = batch * choice.groups + head // (choice.heads // choice.groups)
        for row, block in zip(row_of_choice, blocks):
            if block < 0:
                assert row == -1
                continue
            taken.append(row)
            assert routes.block_of_tile[row // choice.tile] == group * choice.n_blocks + block
            assert routes.tile_in_use[row // choice.tile] == 1
    assert len(set(taken)) == len(taken) == pairs
    assert all(0 <= row < routes.n_rows for row in taken)


@examples(100)
@given(choices())
def test_rows_of_a_block_are_contiguous_in_order_and_padded_to_whole_tiles(choice: Choice):
    chosen = choice.chosen()
    total = choice.batch * choice.groups * choice.n_blocks
    most = max(1, int((chosen >= 0).sum()) + choice.spare)
    routes = route(chosen, choice.groups, choice.n_blocks, choice.tile, most)

    n_tiles, of_row = routes.block_of_tile.numel(), query_of_row(routes)
    n_used = int(routes.tiles_of_block.sum())
    assert routes.n_blocks == routes.tiles_of_block.numel() == routes.rows_of_block.numel() == total
    assert routes.tile == choice.tile and routes.n_rows == n_tiles * choice.tile
    assert n_used <= n_tiles <= most // choice.tile + 1 + total, "too few tiles, or more than can be needed"
    assert torch.equal(routes.tile_in_use.bool(), torch.arange(n_tiles) < n_used)
    assert ((routes.block_of_tile >= 0) & (routes.block_of_tile < total)).all()
    assert ((routes.first_tile >= 0) & (routes.first_tile < n_tiles)).all()
    assert (of_row[n_used * choice.tile :] == -1).all()
    for block, (first, tiles, rows) in enumerate(
        zip(*(x.tolist() for x in (routes.first_tile, routes.tiles_of_block, routes.rows_of_block)))
    ):
        assert (routes.block_of_tile[first : first + tiles] == block).all()
        held = of_row[first * choice.tile : (first + tiles) * choice.tile].tolist()
        queries = [query for query in held if query >= 0]
        assert len(queries) == rows
        assert tiles == -(-rows // choice.tile), "tiles that hold no row"
        assert held[: len(queries)] == queries, "spare rows stand before real ones"
        assert queries == sorted(queries), "not in the order of the queries"


@examples(20)
@given(choices())
def test_every_index_of_routing_is_int32(choice: Choice):
    routes = route(choice.chosen(), choice.groups, choice.n_blocks, choice.tile, choice.slots * 100)
    indices = [value for value in vars(routes).values() if isinstance(value, torch.Tensor)]
    assert len(indices) == 6
    assert {x.dtype for x in indices} == {torch.int32}


# The bounds that are known before the data is


def pairs_of_each_row_and_head(case: Case, layout: BlockLayout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[B, H]`: how many (query, block) pairs the gate routes."""
    query, key = layout.query_slots(tensors["query"]), layout.key_slots(tensors["key"])
    return (eager.choose(query, key, layout, case.attention_settings()) >= 0).sum((2, 3))


@examples(80)
@given(cases(padding=None), st.booleans())
def test_the_number_of_pairs_is_known_exactly_without_padding(case: Case, wide: bool):
    layout = layout_of(case, wide)
    most = layout.max_pairs(case.attention_settings().n_routed, case.causal)
    assert (pairs_of_each_row_and_head(case, layout, operands(case)) == most).all()


@examples(60)
@given(cases(padded=True), st.booleans())
def test_the_number_of_pairs_is_bounded_with_padding(case: Case, wide: bool):
    layout = layout_of(case, wide)
    most = layout.max_pairs(case.attention_settings().n_routed, case.causal)
    assert (pairs_of_each_row_and_head(case, layout, operands(case)) <= most).all()


@examples(60)
@given(packed_cases(more_keys=None), st.booleans())
def test_the_number_of_pairs_is_bounded_for_packed_sequences(packed: Packed, wide: bool):
    assume(sum(packed.lengths) or packed.keys is None)
    layout = packed_layout_of(packed, wide)
    most = layout.max_pairs(packed.case.attention_settings().n_routed, packed.case.causal)
    assert (pairs_of_each_row_and_head(packed.case, layout, operands(packed.case)) <= most).all()


@examples(60)
@given(packed_cases(more_keys=True), st.booleans())
def test_tiles_hold_the_last_tokens_of_packed_sequences_each_once(packed: Packed, wide: bool):
    assume(sum(packed.lengths))
    layout, size, held = packed_layout_of(packed, wide), packed.case.block_size, {}
    every = torch.ones(1, sum(packed.lengths)).bool()
    check_round_trip(layout, torch.ones(1, sum(packed.keys)).bool(), every)
    tokens = layout.index_maps.token_of_query_slot.view(-1, layout.query_width).tolist()
    for q, tile in enumerate(tokens):
        start, stop = int(layout.query_start[0, q]), int(layout.query_stop[0, q])
        assert [token >= 0 for token in tile] == [start <= slot < stop for slot in range(layout.query_width)]
        held |= {token: (q, slot) for slot, token in enumerate(tile) if token >= 0}
    first = 0
    for queries, keys, _ in packed.sequences():
        for i, token in enumerate(range(queries.start, queries.stop)):
            q, slot = held.pop(token)
            block, place = divmod(keys.stop - keys.start - (queries.stop - queries.start) + i, size)
            assert layout.own[0, q] == first + block and layout.offset[0, q] + slot == place
            assert layout.first[0, q] == first and layout.end[0, q] == first + -(-(keys.stop - keys.start) // size)
        first += -(-(keys.stop - keys.start) // size)
    assert not held


@examples(60)
@given(cases())
def test_the_own_block_of_every_query_block_stays_within_its_bound(case: Case):
    layout = layout_of(case)
    used = layout.query_stop > layout.query_start
    bound = torch.tensor([layout.last_own(block) for block in range(layout.n_query_blocks)])
    assert (layout.own <= bound)[used].all()


@examples(40)
@given(cases(), st.integers(1, 10_000))
def test_chunks_cover_every_head_once_and_have_one_shape(case: Case, budget: int):
    tensors = operands(case)
    layout = layout_of(case)
    query, key, value = layout.query_slots(tensors["query"]), layout.key_slots(tensors["key"]), tensors["value"]
    covered, shapes = Counter(), set()
    settings, numbers = replace(case.attention_settings(), working_memory=budget), query.shape[-1] + 2 * value.shape[-1]
    for rows, groups, parts in chunks(query, key, value, layout, settings, sys.maxsize, numbers):
        heads = slice(groups.start * case.repeats, groups.stop * case.repeats)
        assert parts == [(heads, slice(0, layout.n_query_blocks))]
        covered.update((row, head) for row in range(rows.start, rows.stop) for head in range(heads.start, heads.stop))
        shapes.add((rows.stop - rows.start, heads.stop - heads.start))
    assert covered == Counter((row, head) for row in range(case.batch) for head in range(case.heads))
    assert len(shapes) == 1
    if budget == 1 and case.attention_settings().n_routed:
        assert shapes == {(1, case.repeats)}


@examples(80)
@given(cases(), st.booleans(), st.integers(1, 3), st.integers(1, 20))
def test_no_part_of_a_chunk_exceeds_the_reach_of_a_kernel(case: Case, wide: bool, some_heads: int, some_blocks: int):
    tensors, layout, settings = operands(case), layout_of(case, wide), case.attention_settings()
    query, key, value = (x.contiguous() for x in (layout.query_slots(tensors["query"]), layout.key_slots(tensors["key"]), tensors["value"]))
    width, blocks_of_head = max(query.shape[-1], value.shape[-1]), layout.n_query_blocks
    reach = max_elements(min(some_heads, case.repeats), min(some_blocks, blocks_of_head), width, layout, settings)
    covered = Counter()
    for rows, groups, parts in chunks(query, key, value, layout, settings, reach, 3 * width):
        n_rows, n_groups = rows.stop - rows.start, groups.stop - groups.start
        for heads, blocks in parts:
            part = query[rows, heads, layout.slots(blocks)]
            assert part.is_contiguous()  # kernels write their results into such slices
            pairs = n_rows * part.shape[1] * layout.max_pairs(settings.n_routed, settings.causal, blocks)
            n_blocks = n_rows * n_groups * layout.n_key_blocks
            rows_needed = tiles_needed(pairs, n_blocks, 128) * 128
            assert max(rows_needed, n_blocks * layout.width, part.numel() // part.shape[-1]) * width <= reach
            covered.update(itertools.product(*(range(x.start, x.stop) for x in (rows, heads, blocks))))
    assert covered == Counter(itertools.product(range(case.batch), range(case.heads), range(blocks_of_head)))
    with pytest.raises(ValueError, match=f"at most {layout.width * width - 1} elements"):
        list(chunks(query, key, value, layout, settings, layout.width * width - 1, 3 * width))


@examples(60)
@given(cases(), st.booleans(), st.integers(1, 5))
def test_the_pairs_of_some_query_blocks_are_bounded_and_add_up(case: Case, wide: bool, step: int):
    layout, settings = layout_of(case, wide), case.attention_settings()
    chosen = gate.choose(layout.query_slots(operands(case)["query"]), layout.key_slots(operands(case)["key"]), layout, settings)
    bounds = []
    for start in range(0, layout.n_query_blocks, step):
        blocks = slice(start, min(start + step, layout.n_query_blocks))
        bounds.append(layout.max_pairs(settings.n_routed, settings.causal, blocks))
        assert ((chosen[:, :, layout.slots(blocks)] >= 0).sum((2, 3)) <= bounds[-1]).all()
    if layout.dense:
        assert sum(bounds) == layout.max_pairs(settings.n_routed, settings.causal)


# Layouts


def check_slots(layout: BlockLayout, row: int, blocks: list[list[int]], queries_from: int) -> None:
    """`blocks`: the tokens of each key block of a row; of them, those from `queries_from` on are queries too."""
    tokens = torch.arange(1, layout.n_key + 1).view(1, 1, -1).expand(layout.own.shape[0], 1, -1)
    held = layout.key_slots(tokens)[row, 0].view(layout.n_key_blocks, layout.width).tolist()
    for c in range(layout.n_key_blocks):
        expected = blocks[c] if c < len(blocks) else []
        assert layout.block_keys[row, c] == len(expected), f"keys of block {c}"
        assert held[c] == [t + 1 for t in expected] + [0] * (layout.width - len(expected)), f"tokens of block {c}"

    tokens = torch.arange(1, layout.n_query + 1).view(1, 1, -1).expand(layout.own.shape[0], 1, -1)
    held = layout.query_slots(tokens)[row, 0].view(layout.n_query_blocks, layout.width).tolist()
    seen = []
    for q in range(layout.n_query_blocks):
        start, stop = int(layout.query_start[row, q]), int(layout.query_stop[row, q])
        own = blocks[layout.own[row, q]] if layout.own[row, q] < len(blocks) else []
        expected = [token - queries_from + 1 if start <= slot < stop else 0 for slot, token in enumerate(own)]
        assert held[q] == expected + [0] * (layout.width - len(expected)), f"tokens of query block {q}"
        seen += [token for token in expected if token]
    real = [token - queries_from + 1 for block in blocks for token in block if token >= queries_from]
    assert seen == real, "queries in slots"


def check_round_trip(layout: BlockLayout, real_keys: torch.Tensor, real_queries: torch.Tensor) -> None:
    """`real_keys [B, Nk]` and `real_queries [B, Nq]` come back as they were, the others as the filling."""
    rows = real_keys.shape[0]
    keys, queries = random(rows, 2, layout.n_key, 3, seed=0), random(rows, 2, layout.n_query, 3, seed=1)
    slots = layout.key_slots(keys)
    assert slots.shape == (rows, 2, layout.n_key_blocks * layout.width, 3)
    assert torch.equal(layout.key_tokens(slots), keys.masked_fill(~real_keys[:, None, :, None], 0))
    slots = layout.query_slots(queries)
    assert slots.shape == (rows, 2, layout.n_query_blocks * layout.query_width, 3)
    assert torch.equal(layout.query_tokens(slots), queries.masked_fill(~real_queries[:, None, :, None], 0))
    fewer = layout.query_slots(queries[..., 0])  # what has no width, as the log-sum-exp
    filled = queries[..., 0].masked_fill(~real_queries[:, None], -torch.inf)
    assert torch.equal(layout.query_tokens(fewer, fill=-torch.inf), filled)


@examples(100)
@given(cases(), st.booleans())
def test_slots_hold_the_tokens_of_their_block_and_give_them_back(case: Case, wide: bool):
    layout = layout_of(case, wide)
    mask = case.padding_mask()
    real = torch.ones(case.batch, case.n_key).bool() if mask is None else mask
    check_round_trip(layout, real, case.real_queries())
    for row in range(case.batch):
        tokens = real[row].nonzero().flatten().tolist()
        blocks = [tokens[start : start + case.block_size] for start in range(0, len(tokens), case.block_size)]
        check_slots(layout, row, blocks, case.n_key - case.n_query)
        used = layout.query_stop[row] > layout.query_start[row]
        assert (layout.first[row][used] == 0).all() and (layout.end[row][used] == len(blocks)).all()


@examples(60)
@given(cases(), st.booleans())
def test_slots_of_queries_may_lie_as_the_queries_do(case: Case, wide: bool):
    layout = layout_of(case.but(padding=None), wide)
    tokens, keys = (random(case.batch, n, 2, 3, seed=case.seed).transpose(1, 2) for n in (case.n_query, case.n_key))
    slots = layout.query_slots(tokens, like_tokens=True)
    assert torch.equal(slots, layout.query_slots(tokens.contiguous()))
    assert torch.equal(layout.key_slots(keys, like_tokens=True), layout.key_slots(keys.contiguous()))
    back = layout.query_tokens(slots, like=tokens)
    assert torch.equal(back, tokens)
    assert back.transpose(1, 2).is_contiguous()
    in_either_way = case.n_query == 1  # one token
    assert in_either_way or not layout.whole or slots.transpose(1, 2).is_contiguous()


@examples(60)
@given(packed_cases(), st.booleans())
def test_slots_hold_the_tokens_of_packed_sequences_each_from_a_block_of_its_own(packed: Packed, wide: bool):
    layout, total, size = packed_layout_of(packed, wide), sum(packed.lengths), packed.case.block_size
    every = torch.ones(1, total).bool()
    check_round_trip(layout, every, every)
    blocks, bounds, token = [], [], 0
    for length in packed.lengths:
        tokens = list(range(token, token + length))
        parts = [tokens[start : start + size] for start in range(0, length, size)]
        bounds += [(len(blocks), len(blocks) + len(parts))] * len(parts)
        blocks, token = blocks + parts, token + length
    check_slots(layout, 0, blocks, 0)
    assert list(zip(layout.first[0].tolist(), layout.end[0].tolist()))[: len(blocks)] == bounds


@examples(30)
@given(cases())
def test_some_rows_of_a_layout_are_the_layout_of_those_rows(case: Case):
    layout = layout_of(case)
    for row in range(case.batch):
        alone = case.but(batch=1, padding=None if case.padding is None else case.padding[row : row + 1])
        expected, actual = layout_of(alone), layout.part(slice(row, row + 1), slice(0, layout.n_query_blocks))
        for name in ("own", "first", "end", "query_start", "query_stop", "block_keys"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_tokens_that_lie_in_blocks_already_are_not_copied():
    layout = dense_layout(2, 24, 24, 8, 8, torch.device("cpu"))
    x = random(2, 1, 24, 3, seed=0)
    for move in (layout.key_slots, layout.query_slots, layout.key_tokens, layout.query_tokens):
        assert move(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("block_size", "width"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (129, 192), (4096, 4096)])
def test_a_block_s_width_can_be_cut_into_tiles(block_size: int, width: int):
    assert slots_per_block(block_size) == width
