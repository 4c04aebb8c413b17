"""Pieces of a call on a CPU: results in order, errors at once, PyTorch's threads as they were, and the same numbers as one call."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from hypothesis import given
from support.cases import attend, cases, examples, operands

from moba_flex import attention, moba_attention
from moba_flex.backends import eager
from moba_flex.core.parallel import parallel_map

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_items(n_threads):
    assert list(parallel_map(lambda x: x * x, range(50), CPU)) == [x * x for x in range(50)]
    assert list(parallel_map(lambda x: x, [], CPU)) == []


def test_pieces_compute_in_several_threads_with_their_share(n_threads):
    here, barrier = threading.get_ident(), threading.Barrier(n_threads)

    def piece(_) -> tuple[int, int]:
        barrier.wait(timeout=60)
        return threading.get_ident(), torch.get_num_threads()

    found = list(parallel_map(piece, range(2 * n_threads), CPU))
    if n_threads == 1:
        assert set(found) == {(here, 1)}
    else:
        assert here not in [ident for ident, _ in found] and {share for _, share in found} == {1}
        assert len({ident for ident, _ in found}) == n_threads


def test_more_threads_than_pieces_are_shared_among_these():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    assert list(parallel_map(lambda _: torch.get_num_threads(), range(2), CPU)) == [3, 3]
    assert torch.get_num_threads() == 6
    seen = []
    new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert seen == [6], "a thread that begins later has the share of a piece"
    torch.set_num_threads(before)


def test_an_error_ends_all_pieces(n_threads):
    started = []

    def piece(x: int) -> int:
        started.append(x)
        if x == 3:
            raise ValueError("the third")
        return x

    with pytest.raises(ValueError, match="the third"):
        list(parallel_map(piece, range(100), CPU))
    n = len(started)
    assert n < 3 + 4 * n_threads
    assert list(parallel_map(lambda x: x, range(5), CPU)) == list(range(5)) and len(started) == n


def test_results_that_nobody_takes_are_not_piled_up():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    started: list[int] = []
    found = parallel_map(lambda x: started.append(x), range(100), CPU)
    next(found)
    found.close()
    assert len(started) <= 5
    torch.set_num_threads(before)


def test_a_piece_may_cut_its_own_work_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = list(parallel_map(lambda x: list(parallel_map(lambda y: x + y, range(3), CPU)), range(6), CPU))
    assert found == [[x, x + 1, x + 2] for x in range(6)]
    torch.set_num_threads(before)


def test_inference_mode_reaches_the_pieces(n_threads):
    with torch.inference_mode():
        total = torch.zeros(8)

        def piece(i: int) -> bool:
            total[i] += 1
            return torch.is_inference_mode_enabled()

        assert all(parallel_map(piece, range(8), CPU)) and total.tolist() == [1.0] * 8
    assert not any(parallel_map(lambda _: torch.is_inference_mode_enabled(), range(4), CPU))


@pytest.mark.parametrize(
    ("n_query", "n_key", "top_k", "alone"),
    [
        (500, 500, 3, True),
        (500, 500, 500, True),
        (8200, 8200, 3, False),  # a query of 2**18 elements: its heads are computed side by side
        (20, 9000, 3, False),  # many keys
        (8000, 8000, 400, False),  # which all are read
    ],
)
def test_a_small_call_is_computed_by_one_thread(n_query: int, n_key: int, top_k: int, alone: bool, monkeypatch):
    """Else each of its many small operations waits for all threads, one of which may have lost its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = {"forward": 0, "backward": 0}

    def watched(name: str, step):
        def call(*args):
            seen[name] = torch.get_num_threads()
            return step(*args)

        return call

    monkeypatch.setattr(eager, "attend", watched("forward", eager.attend))
    monkeypatch.setattr(eager, "backward", watched("backward", eager.backward))
    query, key = torch.randn(1, 1, n_query, 32, requires_grad=True), torch.randn(1, 1, n_key, 32)
    out = moba_attention(query, key, key, block_size=20, top_k=top_k)
    assert torch.get_num_threads() == 3
    torch.autograd.grad(out.sum(), query)
    assert torch.get_num_threads() == 3
    assert seen == dict.fromkeys(seen, 1 if alone else 3)

    monkeypatch.setattr(eager, "attend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moba_attention(query, key, key, block_size=20, top_k=top_k)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    list(parallel_map(lambda x: x, range(4), CPU))
    child = os.fork()
    if child == 0:
        os._exit(0 if list(parallel_map(lambda x: x, range(4), CPU)) == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0
    torch.set_num_threads(before)


@pytest.mark.parametrize("padded", [False, True])
def test_head_by_head_is_the_whole_call(padded, monkeypatch):
    """Values, log-sum-exp and gradients, with one thread and with two, of which two runs have the same bits."""

    @examples(30)
    @given(case=cases(padded=padded))
    def check(case):
        whole = _results(case, monkeypatch, 1 << 60, 2)
        one, two, again = (_results(case, monkeypatch, 0, n) for n in (1, 2, 2))
        for name, x in whole.items():
            torch.testing.assert_close(one[name], x, msg=lambda said, name=name: f"{name}: {said}")
            torch.testing.assert_close(two[name], x, msg=lambda said, name=name: f"{name}: {said}")
            assert torch.equal(two[name], again[name]), name

    check()


def _results(case, monkeypatch, from_elements: int, n_threads: int) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    monkeypatch.setattr(attention, "HEAD_BY_HEAD_FROM", from_elements)
    torch.set_num_threads(n_threads)
    leaves = operands(copy.copy(case), requires_grad=True)
    out, lse = attend(case, leaves)
    torch.set_num_threads(n_threads)
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    torch.set_num_threads(before)
    return {"out": out.detach(), "lse": lse.detach(), **{f"gradient of {name}": x.grad for name, x in leaves.items()}}
