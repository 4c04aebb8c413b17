"""Which blocks a query reads: `select_blocks`, against the specification and against a loop written by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, assert_same, attend, cases, examples, generator, operands, positions
from torch.nn.attention.flex_attention import flex_attention

from moba_flex import moba_attention, select_blocks
from moba_flex.backends import eager
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops.gate import best_blocks, first_of_equals, means_of, some_are_equal
from moba_flex.reference import reference_selection

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def select(case: Case, tensors: dict[str, torch.Tensor]):
    return select_blocks(tensors["query"], tensors["key"], **case.selection, padding_mask=case.padding_mask())


def specified(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    selected, _ = reference_selection(tensors["query"], tensors["key"], case.attention_settings(), padding_mask=case.padding_mask())
    return selected


def own_blocks(case: Case) -> torch.Tensor:
    """`[B, Nq]`: the block of each query, -1 for padding."""
    padding = case.padding or ((0, 0),) * case.batch
    position = torch.arange(case.n_key - case.n_query, case.n_key) - torch.tensor([left for left, _ in padding])[:, None]
    return torch.where(case.real_queries(), position.div(case.block_size, rounding_mode="floor"), -1)


def small_integers(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Queries and keys whose gate scores are exact and often equal, if blocks have at most 4 tokens."""
    source = generator(case.seed)
    query = torch.randint(-1, 2, (case.batch, case.heads, case.n_query, case.width), generator=source)
    key = torch.randint(-1, 2, (case.batch, case.groups, case.n_key, case.width), generator=source)
    return {"query": query.to(dtype), "key": (key * 12).to(dtype)}  # times 12, so that the mean of 3 is exact too


def selection_by_hand(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[B, H, Nq, C]` bool, one query at a time."""
    query, key = tensors["query"].double(), tensors["key"].double()
    selected = torch.zeros(case.batch, case.heads, case.n_query, case.n_blocks, dtype=torch.bool)
    padding = case.padding or ((0, 0),) * case.batch
    for row, (left, right) in enumerate(padding):
        for head in range(case.heads):
            group = head // case.repeats
            together = range(group * case.repeats, (group + 1) * case.repeats) if case.share_selection else [head]
            keys = key[row, group, left : case.n_key - right]
            means = [part.mean(0) for part in keys.split(case.block_size)] if len(keys) else []
            for i in range(case.n_query):
                token = case.n_key - case.n_query + i
                if not left <= token < case.n_key - right:
                    continue
                own = (token - left) // case.block_size
                scores = [sum(float(query[row, h, i] @ mean) for h in together) for mean in means]
                best_first = sorted(range(len(means)), key=lambda block: (-scores[block], block))
                if case.causal:
                    places = [own, *range(case.sink_blocks), *range(own - case.recent_blocks, own)]
                    forced = {block for block in places if 0 <= block <= own}
                    free = [block for block in best_first if block < own and block not in forced]
                    read = forced | set(free[: case.top_k - 1 - case.sink_blocks - case.recent_blocks])
                else:
                    read = set(best_first[: case.top_k])
                selected[row, head, i, list(read)] = True
    return selected


@examples(60)
@given(cases(softcap=None, sinks=False, scale=None))
def test_the_selection_is_the_specification_s(case: Case):
    tensors = operands(case)
    assert torch.equal(select(case, tensors).to_dense(), specified(case, tensors))


@DTYPES
@examples(25)
@given(cases(max_tokens=24, softcap=None, sinks=False, scale=None), st.sampled_from([1, 2, 4]))
def test_equal_scores_go_to_the_earlier_block(dtype: torch.dtype, case: Case, block_size: int):
    case = case.but(block_size=block_size)
    tensors = small_integers(case, dtype)
    expected = selection_by_hand(case, tensors)
    assert torch.equal(select(case, tensors).to_dense(), expected)
    assert torch.equal(specified(case, tensors), expected), "the specification"


@DTYPES
def test_equal_keys_choose_the_earliest_blocks(dtype: torch.dtype):
    query, key = torch.ones(1, 2, 40, 4, dtype=dtype), torch.ones(1, 1, 40, 4, dtype=dtype)
    indices = select_blocks(query, key, block_size=5, top_k=4).indices
    for token in range(40):
        past = min(3, token // 5)
        assert indices[0, :, token].tolist() == [[*range(past), *[-1] * (3 - past)]] * 2


def test_nan_scores_as_infinity_and_the_two_zeros_are_equal():
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([-inf, 0.0, -0.0, 1e-40, -1.5, inf, -nan, 2.0, nan, -inf])
    rising = [5, 6, 8, 7, 3, 1, 2, 4, 0, 9]  # best first, among equals the earlier
    for count in range(1, 11):
        chosen = best_blocks(score.clone(), torch.ones(10, dtype=torch.bool), count, finite=False)
        assert sorted(chosen.tolist()) == sorted(rising[:count]), count


def test_only_candidates_are_chosen_whatever_their_scores():
    score, candidate = torch.tensor([-torch.inf, 3.0, torch.nan, 1.0]), torch.tensor([True, False, False, True])
    assert sorted(best_blocks(score, candidate, 3, finite=False).tolist()) == [-1, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_block_with_nan_is_chosen_by_all_later_queries(dtype: torch.dtype):
    case = Case(1, 2, 1, 40, 40, block_size=5, top_k=2, seed=4)
    tensors = operands(case, dtype)
    tensors["key"][:, :, 12] = torch.nan
    later = select(case, tensors).indices[:, :, 15:]
    assert (later == 2).all()
    assert torch.equal(select(case, tensors).to_dense(), specified(case, tensors))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 0), (2, 2, 0, 7)], ids=["no batch", "no token", "no query"])
def test_the_selection_of_nothing_is_empty(shape: tuple[int, ...]):
    batch, heads, n_query, n_key = shape
    selection = select_blocks(torch.zeros(batch, heads, n_query, 4), torch.zeros(batch, 1, n_key, 4), block_size=3, top_k=4)
    assert selection.indices.shape == (batch, heads, n_query, 3) and selection.indices.dtype == torch.int32
    assert selection.to_dense().shape == (batch, heads, n_query, -(-n_key // 3))


@examples(60)
@given(cases(causal=True, softcap=None, sinks=False, scale=None))
def test_the_selection_holds_the_own_block_and_never_a_future_one(case: Case):
    dense = select(case, operands(case)).to_dense()
    own, real = own_blocks(case), case.real_queries()
    assert dense.shape == (case.batch, case.heads, case.n_query, case.n_blocks) and dense.dtype == torch.bool
    for row, i in real.nonzero().tolist():
        assert dense[row, :, i, own[row, i]].all(), f"query {i} of row {row} does not read its own block"
        assert not dense[row, :, i, own[row, i] + 1 :].any(), f"query {i} of row {row} reads a future block"
    assert not dense.transpose(1, 2)[~real].any(), "a padded query reads something"


@examples(60)
@given(cases(softcap=None, sinks=False, scale=None))
def test_every_query_reads_top_k_blocks_or_all_there_are(case: Case):
    count = select(case, operands(case)).to_dense().sum(-1)
    padding = case.padding or ((0, 0),) * case.batch
    blocks = torch.tensor([-(-(case.n_key - left - right) // case.block_size) for left, right in padding])
    readable = own_blocks(case) + 1 if case.causal else blocks[:, None].expand(-1, case.n_query)
    expected = readable.clamp(max=case.top_k).masked_fill(~case.real_queries(), 0)
    assert torch.equal(count, expected[:, None].expand_as(count))


@examples(60)
@given(cases(causal=True, softcap=None, sinks=False, scale=None))
def test_sink_and_recent_blocks_are_always_among_the_selected(case: Case):
    dense = select(case, operands(case)).to_dense()
    own = own_blocks(case)[:, None, :, None]
    block = torch.arange(case.n_blocks)
    forced = (block < own) & ((block < case.sink_blocks) | (block >= own - case.recent_blocks))
    assert not (forced & ~dense).any()


@examples(60)
@given(cases(causal=True, softcap=None, sinks=False, scale=None))
def test_indices_are_the_past_blocks_in_rising_order(case: Case):
    selection = select(case, operands(case))
    indices, own = selection.indices, own_blocks(case)
    assert indices.dtype == torch.int32
    assert indices.shape == (case.batch, case.heads, case.n_query, case.top_k - 1)
    past = selection.to_dense() & (torch.arange(case.n_blocks) < own[:, None, :, None])
    for chosen, among in zip(indices.flatten(0, 2).tolist(), past.flatten(0, 2)):
        blocks = among.nonzero().flatten().tolist()
        assert chosen == blocks + [-1] * (case.top_k - 1 - len(blocks))


@examples(40)
@given(cases(softcap=None, sinks=False, scale=None, share_selection=True))
def test_heads_that_share_a_selection_read_the_same_blocks(case: Case):
    dense = select(case, operands(case)).to_dense().unflatten(1, (case.groups, case.repeats))
    assert torch.equal(dense, dense[:, :, :1].expand_as(dense))


def test_heads_choose_together_by_the_sum_of_their_scores():
    """Two heads that want block 0 a little, and one that wants block 1 much."""
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0], [0.0, 0.0]])[None, :, None].expand(1, 4, 12, 2)
    key = torch.zeros(1, 1, 12, 2)
    key[:, :, :4, 0], key[:, :, 4:8, 1] = 1, 1
    call = {"block_size": 4, "top_k": 2}
    assert select_blocks(query[:, :3], key, **call).indices[0, :, -1, 0].tolist() == [0, 0, 1]
    assert select_blocks(query[:, :3], key, **call, share_selection=True).indices[0, :, -1, 0].tolist() == [1, 1, 1]
    of_two_groups = select_blocks(query, key.expand(1, 2, 12, 2), **call, share_selection=True)
    assert of_two_groups.indices[0, :, -1, 0].tolist() == [0, 0, 1, 1]


# BlockMask


def visible_tokens(case: Case, dense: torch.Tensor) -> torch.Tensor:
    """`[B, H, Nq, Nk]` bool, from the selected blocks."""
    padding = case.padding or ((0, 0),) * case.batch
    position = torch.arange(case.n_key) - torch.tensor([left for left, _ in padding])[:, None]  # [B, Nk]
    block = position.clamp(min=0).div(case.block_size, rounding_mode="floor")
    visible = dense.gather(-1, block[:, None, None].expand(*dense.shape[:3], -1))
    if case.padding:
        visible = visible & case.padding_mask()[:, None, None]
    query, key = positions(case)
    return visible & (key <= query) if case.causal else visible


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@examples(20)
@given(cases(max_tokens=200, softcap=None, sinks=False))
def test_the_block_mask_in_flex_attention_is_moba_attention(case: Case):
    tensors = operands(case)
    mask = select(case, tensors).to_block_mask()
    query, key, value = tensors.values()
    actual = flex_attention(query, key, value, block_mask=mask, scale=case.real_scale, enable_gqa=True)
    expected, _ = attend(case, tensors)
    real = case.real_queries()[:, None, :, None]
    assert_same(actual.masked_fill(~real, 0), expected)


@examples(25)
@given(cases(max_tokens=300, softcap=None, sinks=False, scale=None))
def test_the_block_mask_covers_what_is_visible_and_its_mask_mod_is_exact(case: Case):
    selection = select(case, operands(case))
    mask = selection.to_block_mask()
    visible = visible_tokens(case, selection.to_dense())
    batch, head, query, key = torch.meshgrid(*(torch.arange(n) for n in visible.shape), indexing="ij")
    assert torch.equal(mask.mask_mod(batch, head, query, key), visible)
    rows, columns = mask.BLOCK_SIZE
    covered = mask.to_dense().bool().repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    covered = covered[:, :, : case.n_query, : case.n_key].expand_as(visible)
    assert not (visible & ~covered).any(), "a visible pair lies in a block that the mask leaves out"


def test_the_block_mask_leaves_out_what_nobody_reads():
    case = Case(1, 2, 1, 1024, 1024, block_size=128, top_k=2, sink_blocks=1, seed=0)  # nothing is left to choose
    dense = select(case, operands(case)).to_block_mask().to_dense().bool()[0, 0]
    rows, columns = dense.shape
    own = (torch.arange(rows) * 1024 // rows // 128)[:, None]
    block = (torch.arange(columns) * 1024 // columns // 128)[None]
    assert torch.equal(dense, (block == own) | (block == 0))


# Blocks with the same keys

WIDTHS = [1, 3, 8, 64, 128]


def _repeated_blocks(n: int, width: int, block_size: int, kinds: int, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[1, G, n, D]` keys in blocks of a few kinds, the kind of each block `[G, C]`, and the float64 mean of each kind `[G, kinds, D]`."""
    kind = torch.randint(kinds, (groups, -(-n // block_size)), generator=torch.Generator().manual_seed(n + width))
    blocks = torch.randn(groups, kinds, block_size, width, generator=torch.Generator().manual_seed(width))
    keys = torch.stack([of_group[of_block].flatten(0, 1)[:n] for of_group, of_block in zip(blocks, kind)])[None]
    return keys, kind, blocks.double().mean(2)


def _earliest_best(query: torch.Tensor, kind: torch.Tensor, mean: torch.Tensor, block_size: int, top_k: int) -> torch.Tensor:
    """`[1, H, N, top_k - 1]`: by float64 scores, among equals the earlier block."""
    n, n_blocks, repeats = query.shape[2], kind.shape[1], query.shape[1] // kind.shape[0]
    score = torch.einsum("bhnd,hkd->bhnk", query.double(), mean.repeat_interleave(repeats, 0))
    score = score.gather(-1, kind.repeat_interleave(repeats, 0)[None, :, None].expand(*score.shape[:3], -1))
    past = torch.arange(n_blocks) < torch.arange(n)[:, None] // block_size
    order = score.masked_fill(~past, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., : top_k - 1]
    order = torch.where(past.expand_as(score).gather(-1, order), order, n_blocks).sort(-1).values
    return torch.where(order == n_blocks, -1, order).int()


def _laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "width first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "sliced":
        return torch.cat([x, x], 3)[..., : x.shape[3]]
    return x


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("how", ["plain", "tokens first", "width first", "sliced"])
def test_equal_blocks_are_a_tie_however_products_are_rounded(how: str, width: int, kinds: int):
    """The score of one block is rounded otherwise in another column of a product, or among fewer queries."""
    block_size, top_k, n = 8, 4, 120
    key, kind, mean = _repeated_blocks(n, width, block_size, kinds)
    query = torch.randn(1, 4, n, width, generator=torch.Generator().manual_seed(kinds))
    expected = _earliest_best(query, kind, mean, block_size, top_k)
    settings = {"block_size": block_size, "top_k": top_k}
    q, k = _laid_out(query, how), _laid_out(key, how)
    assert torch.equal(select_blocks(q, k, **settings).indices, expected)
    for at in (40, 77, n):  # alone
        alone = select_blocks(q[:, :, at - 1 : at], k[:, :, :at], **settings).indices
        assert torch.equal(alone[:, :, 0], expected[:, :, at - 1]), f"query {at - 1} alone"
    padded = torch.nn.functional.pad(k, (0, 0, 3, 0))
    real = torch.arange(n + 3)[None] >= 3
    shifted = select_blocks(torch.nn.functional.pad(q, (0, 0, 3, 0)), padded, **settings, padding_mask=real)
    assert torch.equal(shifted.indices[:, :, 3:], expected), "behind padding"
    selected, _ = reference_selection(q, k, AttentionSettings(**settings))
    assert torch.equal(selected, select_blocks(q, k, **settings).to_dense()), "the specification"

    value = torch.randn(1, 2, n, 4)
    outputs = [moba_attention(q, k, value, **settings, implementation=name) for name in ("eager", "naive")]
    visible = selected.repeat_interleave(block_size, -1)[..., :n].tril()
    outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, value, attn_mask=visible, enable_gqa=True))
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_blocks_have_equal_means_on_any_number_of_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (1, 5, 37, 64, 100):
            blocks = torch.randn(1, 1, 1, 33, width).expand(2, 3, 40, -1, -1)
            mean = means_of(blocks, 33)
            assert torch.equal(first_of_equals(mean), torch.zeros(2, 3, 40, dtype=torch.int64))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_first_of_equal_means_is_found(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 3, 65):
        mean = torch.randint(-1, 2, (2, 3, 30, width), generator=generator).to(dtype)
        mean *= torch.where(torch.rand(mean.shape, generator=generator) < 0.5, -1.0, 1.0)  # zeros of both signs
        if width > 2:
            mean[..., :2] = 0  # what some_are_equal looks at
            mean[..., 3:] = 0.3
        first = (mean[:, :, :, None] == mean[:, :, None]).all(-1).int().argmax(-1)
        assert torch.equal(first_of_equals(mean), first)
        assert some_are_equal(mean, torch.ones(2, 30, dtype=torch.bool))
    distinct = torch.randn(2, 3, 30, 5, dtype=dtype)
    assert not some_are_equal(distinct, torch.ones(2, 30, dtype=torch.bool))
    distinct[:, :, 20:] = 0
    assert not some_are_equal(distinct, torch.arange(30).expand(2, -1) < 20), "empty blocks are no matter"
    assert torch.equal(first_of_equals(torch.full((1, 1, 3, 2), torch.nan, dtype=dtype))[0, 0], torch.arange(3)), "NaN equals nothing"


@pytest.mark.parametrize(("dtype", "of_bits"), [(torch.float32, torch.int32), (torch.float64, torch.int64)], ids=str)
def test_means_of_opposite_bits_do_not_hide_equal_ones(dtype: torch.dtype, of_bits: torch.dtype):
    """A hash that repeats the sign gives both the same number."""
    mean = torch.tensor([1.5, 1.5, 1.5], dtype=dtype)
    opposite = (~mean[:1].view(of_bits)).view(dtype)
    assert opposite.isfinite().all()
    assert first_of_equals(torch.cat([opposite, mean])[None, None, :, None]).tolist() == [[[0, 1, 1, 1]]]


def test_the_gate_is_given_tensors_whose_last_dimension_is_contiguous(monkeypatch):
    """Kernels take any other strides. Whole blocks need no copy otherwise, so that they once got the caller's strides."""
    seen, choose = [], eager.choose
    monkeypatch.setattr(eager, "choose", lambda query, key, *rest: seen.append((query, key)) or choose(query, key, *rest))
    for n in (48, 50):  # three whole blocks, and one more that is not
        query, key = (torch.randn(1, heads, 8, n).mT for heads in (4, 2))
        got = select_blocks(query, key, block_size=16, top_k=2)
        assert torch.equal(got.indices, select_blocks(query.contiguous(), key.contiguous(), block_size=16, top_k=2).indices)
    assert len(seen) == 4 and all(x.stride(-1) == 1 for tensors in seen for x in tensors)
