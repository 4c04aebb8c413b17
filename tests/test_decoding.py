"""Decoding from block means: it is `moba_attention` of the last tokens, whatever the cache holds behind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, assert_same, attend, cases, examples, operands

from moba_flex import decoding
from moba_flex.core import chunking
from moba_flex.core.settings import AttentionSettings
from moba_flex.decoding import decode, decode_operator
from moba_flex.dispatch import attend_decoding
from moba_flex.ops import decoding as plain
from moba_flex.ops.decoding import decode_plain, means_for, write_means

ROOM = 7  # slots of the cache behind the last token


def left_padded(case: Case) -> Case:
    """Decoding knows padding on the left alone."""
    return case.but(padding=tuple((left, 0) for left, _ in case.padding) if case.padding else None)


def starts(case: Case) -> torch.Tensor | None:
    return torch.tensor([left for left, _ in case.padding]) if case.padding else None


def cached(x: torch.Tensor, rubbish: float = torch.nan) -> torch.Tensor:
    """A cache with more room than tokens."""
    return torch.cat([x, torch.full_like(x[:, :, :1], rubbish).expand(-1, -1, ROOM, -1)], 2)


def means_before(case: Case, key: torch.Tensor, n_new: int) -> torch.Tensor:
    """Those of a cache of `key` when the last `n_new` of the case's tokens have not come yet."""
    means = means_for(key, max(1, key.shape[2] // case.block_size))
    return write_means(means, key[:, :, : case.n_key - n_new], starts(case), case.block_size).nan_to_num(nan=1e9)


def decoded(
    case: Case, tensors: dict[str, torch.Tensor], means: torch.Tensor, length: torch.Tensor | None, implementation: str = "eager"
) -> tuple:
    operands_ = (tensors[name] for name in ("query", "key", "value"))
    return decode(*operands_, means, length, starts(case), case.attention_settings(implementation))


few = st.integers(1, 9)
at_once = st.sampled_from([1, 200, 1 << 24])


@examples(150)
@given(cases(causal=True, sinks=False), few, st.booleans(), at_once)
def test_decoding_is_moba_attention_of_the_last_tokens(case: Case, n_new: int, room: bool, numbers: int):
    case = left_padded(case.but(n_query=min(n_new, case.n_key)))
    tensors = operands(case)
    expected = attend(case, tensors, "naive")
    length = torch.tensor(case.n_key) if room else None
    if room:
        tensors = {name: x if name == "query" else cached(x) for name, x in tensors.items()}
    means = means_before(case, tensors["key"], case.n_query)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_ELEMENTS_AT_ONCE", numbers)
        actual = decoded(case, tensors, means, length)
    for x, y in zip(actual, expected):
        assert_same(x, y)


@examples(40)
@given(cases(causal=True, sinks=False), few, st.integers(1, 20))
def test_more_heads_than_one_launch_serves_are_decoded_some_rows_at_a_time(case: Case, n_new: int, most: int):
    case = left_padded(case.but(n_query=min(n_new, case.n_key)))
    tensors, length = operands(case), torch.tensor(case.n_key)
    means = means_before(case, tensors["key"], case.n_query)
    expected_means = means.clone()
    expected = decoded(case, tensors, expected_means, length)

    class Kernels:
        @staticmethod
        def decode(query, *args):
            assert query.shape[0] == 1 or query.shape[:3].numel() <= most
            return decode_plain(query, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "kernels", Kernels)
        patch.setattr(chunking, "MAX_HEADS", most)
        actual = decoded(case, tensors, means, length, "flex")
    for x, y in zip((*actual, means), (*expected, expected_means)):
        assert_same(x, y)


@examples(40)
@given(cases(causal=True, sinks=False, max_tokens=60), st.lists(few, min_size=1, max_size=8))
def test_new_tokens_keep_the_means_right(case: Case, sizes: list[int]):
    """However the tokens are cut into calls: the means of complete blocks are what computing all of them gives."""
    case = left_padded(case)
    tensors = operands(case.but(n_query=case.n_key))
    key, value = cached(tensors["key"]), cached(tensors["value"])
    means, seen = means_before(case, key, case.n_key), 0
    for size in sizes:
        size, seen = min(size, case.n_key - seen), min(seen + size, case.n_key)
        if not size:
            break
        part = {"query": tensors["query"][:, :, seen - size : seen], "key": key, "value": value}
        decoded(case, part, means, torch.tensor(seen))
        wanted = write_means(torch.zeros_like(means), key[:, :, :seen], starts(case), case.block_size)
        for row, (left, _) in enumerate(case.padding or ((0, 0),) * case.batch):
            complete = max(0, seen - left) // case.block_size
            assert_same(means[row, :, :complete], wanted[row, :, :complete], f"row {row} after {seen} tokens")


@examples(15)
@given(cases(causal=True, sinks=True, padding=None))
def test_decoding_takes_sinks(case: Case):
    case = case.but(n_query=1)
    tensors = operands(case)
    means = means_before(case, tensors["key"], 1)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    out = attend_decoding(query, key, value, means, None, None, case.attention_settings(), sinks=tensors["sinks"])
    assert_same(out, attend(case, tensors, "naive")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_of_low_precision_keys_are_float32(dtype: torch.dtype):
    key = torch.randn(2, 2, 40, 8).to(dtype)
    means = write_means(means_for(key, 5), key, None, 8)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, key.double().unflatten(2, (5, 8)).mean(3).float())


def test_means_of_padded_rows_are_written_in_parts(monkeypatch):
    monkeypatch.setattr(plain, "_TOKENS_AT_ONCE", 8)
    key, start = torch.randn(2, 2, 43, 3), torch.tensor([3, 11])
    means = write_means(means_for(key, 10), key, start, 4)
    for row, left in enumerate(start.tolist()):
        complete = (43 - left) // 4
        wanted = key[row, :, left : left + complete * 4].unflatten(1, (complete, 4)).mean(2)
        torch.testing.assert_close(means[row, :, :complete], wanted)


def test_the_operator_passes_opcheck():
    case = Case(2, 4, 2, 3, 21, 3, 5, block_size=4, top_k=3, padding=((0, 0), (5, 0)), share_selection=True)
    tensors = operands(case)
    means = means_before(case, tensors["key"], 3)
    given_ = (tensors["query"], tensors["key"], tensors["value"], means, torch.tensor(21), starts(case))
    settings = AttentionSettings(4, 3, 1, share_selection=True, scale=0.5)
    torch.library.opcheck(decode_operator, (*given_, *settings.to_arguments()))


@pytest.mark.parametrize("share_selection", [True, False])
def test_torch_compile_is_told_how_outputs_of_one_key_head_lie(share_selection: bool):
    """Heads that read together are together for each token while they are worked on."""
    case = Case(1, 4, 1, 3, 21, 3, 5, block_size=4, top_k=3, share_selection=share_selection)
    tensors = operands(case)
    given_ = tensors["query"], tensors["key"], tensors["value"], means_before(case, tensors["key"], 3), None, None
    settings = AttentionSettings(4, 3, share_selection=share_selection, scale=0.5)
    torch.library.opcheck(decode_operator, (*given_, *settings.to_arguments()))
    assert all(x.is_contiguous() for x in decode_operator(*given_, *settings.to_arguments()))


def test_a_cache_may_lie_in_memory_in_any_way():
    case = Case(2, 4, 2, 3, 50, 8, 6, block_size=4, top_k=3)
    tensors = operands(case)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    for x, y in zip(*(decoded(case, given_, means_before(case, given_["key"], 3), None) for given_ in (tensors, views))):
        assert_same(x, y)


def test_only_the_chosen_blocks_are_read():
    """Of a long cache, decoding reads its chosen blocks and nothing more: all other keys and values may be rubbish."""
    case = Case(1, 4, 2, 1, 4096, 8, 8, block_size=16, top_k=4)
    tensors = operands(case)
    means = means_before(case, tensors["key"], 1)
    expected = decoded(case, tensors, means, None)
    blocks = plain.blocks_to_read(tensors["query"].unflatten(1, (2, 2)), means, torch.tensor([[4095]]), case.attention_settings())
    unread = torch.ones(2, 256, dtype=torch.bool)
    unread.scatter_(1, blocks.flatten(1).view(2, -1), False)
    unread = unread.repeat_interleave(16, 1)[None, :, :, None]
    spoilt = {name: x if name == "query" else x.masked_fill(unread, torch.nan) for name, x in tensors.items()}
    for actual, wanted in zip(decoded(case, spoilt, means, None), expected):
        assert_same(actual, wanted)


@pytest.mark.parametrize("width", [1, 3, 8, 64, 128])
def test_equal_blocks_are_a_tie_that_the_earlier_ones_win(width: int):
    """Whoever wrote a mean, and however products are rounded: of equal blocks the queries read the first ones."""
    n_key, block_size, room = 85, 8, 24
    key = torch.randn(2, 2, 1, block_size, width).expand(-1, -1, 11, -1, -1).flatten(2, 3)[:, :, :n_key].contiguous()
    key = torch.nn.functional.pad(key, (0, 0, 0, room), value=torch.nan)
    settings, value = AttentionSettings(block_size, 4), torch.randn(2, 2, n_key + room, 5)
    means = write_means(means_for(key, (n_key + room) // block_size), key[:, :, :40], None, block_size)
    for length in range(41, n_key + 1):  # later means are written by decoding
        query = torch.randn(2, 4, 1, width)
        decode(query, key, value, means, torch.tensor(length), None, settings)
        blocks = plain.blocks_to_read(query.unflatten(1, (2, 2)), means, torch.full((2, 1), length - 1), settings)
        assert torch.equal(blocks[..., 1:].sort(-1).values, torch.arange(3).expand(2, 2, 2, 1, -1)), f"{length} tokens"


@pytest.mark.parametrize("size", [4.0, 182.5, 2.0**12, 2.0**30])
def test_weights_sum_to_1_however_large_the_scores(size: float):
    """All keys are equal, so that the output is the mean of the values that are read: `exp(score - lse)` would be off with `lse`."""
    key = torch.full((1, 1, 40, 16), size)
    value = torch.randn(1, 1, 40, 8)
    means = write_means(means_for(key, 5), key, None, 8)
    out, _ = decode(key[:, :, -1:], key, value, means, None, None, AttentionSettings(8, 5, scale=0.25))
    torch.testing.assert_close(out[0, 0, 0], value[0, 0].mean(0))


def test_nan_that_a_token_cannot_see_reaches_nothing():
    case = Case(2, 4, 2, 4, 30, 8, 6, block_size=7, top_k=2, padding=((3, 0), (0, 0)))
    tensors = operands(case)
    means = means_before(case, tensors["key"], 4)
    expected = decoded(case, tensors, means, None)
    for name in ("query", "key", "value"):
        for bad in (torch.nan, torch.inf):
            spoilt = {other: x.clone() for other, x in tensors.items()}
            spoilt[name][:, :, -1] = bad
            if name != "query":
                spoilt[name][0, :, :3] = bad  # padding
            before = means_before(case, spoilt["key"], 4)
            for actual, wanted in zip(decoded(case, spoilt, before, None), expected):
                assert_same(actual[:, :, :3], wanted[:, :, :3], f"{bad} in {name}")


def test_forward_mode_derivatives_are_refused():
    case = Case(1, 2, 1, 20, 20, block_size=4, top_k=3)
    tensors = operands(case)
    query, key, value = tensors["query"][:, :, -1:], tensors["key"], tensors["value"]

    def step(query: torch.Tensor) -> torch.Tensor:
        return attend_decoding(query, key, value, means_before(case, key, 1), None, None, case.attention_settings())

    with pytest.raises(NotImplementedError, match=r'forward-mode derivatives .* need decode="full"'):
        torch.func.jvp(step, (query,), (query,))
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(step(query), attend(case, tensors)[0][:, :, -1:])
