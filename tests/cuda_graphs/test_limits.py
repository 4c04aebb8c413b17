"""How many graphs there are, what they hold, and that a capture that fails costs no call its result, without a GPU."""

from __future__ import annotations

import warnings
from itertools import count

import pytest
import torch
from support.stand_in_graphs import ELSEWHERE, HERE, ON_ANOTHER_GPU, Doubling, StandIn, assert_equal, call, capture
from torch import Tensor

from moba_flex import operator, set_cuda_graphs
from moba_flex.cuda_graphs import buffers, cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS, MAX_GRAPHS, MAX_SHAPES, GraphCache

# Captures that fail


def test_a_capture_that_fails_warns_once_and_results_are_those_of_eager_calls():
    def no_capture(*_):
        raise RuntimeError("operation not permitted\nmore about it")

    store, function = GraphCache(no_capture), Doubling()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (3, 4):
            for _ in range(5):
                x = torch.randn(n, n)
                assert_equal(call(store, function, x), Doubling()(x))
    assert len(caught) == 1
    assert "set_cuda_graphs(False)" in str(caught[0].message)
    assert str(caught[0].message).endswith("RuntimeError: operation not permitted")
    assert function.runs == 2 * 5
    assert len(store) == 0


def test_an_interrupt_within_a_capture_is_the_callers_and_the_next_call_works():
    interrupts = count()

    def interrupted(*arguments):
        if next(interrupts) == 0:
            raise KeyboardInterrupt
        return StandIn(*arguments)

    store, function, x = GraphCache(interrupted), Doubling(), torch.randn(3, 4)
    for _ in range(EAGER_CALLS):
        call(store, function, x)
    with pytest.raises(KeyboardInterrupt):
        call(store, function, x)
    for _ in range(3):
        assert_equal(call(store, function, x), Doubling()(x))
    assert StandIn.living[0].replays == 2


def test_an_error_of_the_call_itself_is_raised_as_without_graphs():
    def fails(x):
        raise ValueError("as always")

    store = GraphCache(StandIn)
    for _ in range(5):
        with pytest.raises(ValueError, match="as always"):
            call(store, fails, torch.randn(2))
    assert len(store) == 0


def test_without_memory_for_a_second_set_of_inputs_a_call_is_eager(monkeypatch):
    def no_room(x):
        raise torch.OutOfMemoryError

    store, function = GraphCache(StandIn), Doubling()
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "buffer_like", no_room)
        for _ in range(2 * EAGER_CALLS + 1):
            x = torch.randn(3, 4)
            assert_equal(call(store, function, x), Doubling()(x))
    assert len(store) == 0
    for _ in range(2 * EAGER_CALLS):
        call(store, function, x)
    assert len(store) == 1


def test_without_memory_for_a_capture_a_call_is_eager_and_the_next_capture_comes_later():
    captures = count()

    def no_room_at_first(*arguments):
        if next(captures) == 0:
            raise torch.OutOfMemoryError
        return StandIn(*arguments)

    store, function = GraphCache(no_room_at_first), Doubling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EAGER_CALLS + 1 + 2 * EAGER_CALLS):
            x = torch.randn(3, 4)
            assert_equal(call(store, function, x), Doubling()(x))
            assert len(store) == 0
        call(store, function, x)
    assert len(store) == 1


# Numbers and bytes


def test_graphs_give_their_memory_back_to_a_call_that_has_too_little():
    store, x = GraphCache(StandIn), torch.randn(3, 4)
    for name in ("one", "other"):
        for _ in range(EAGER_CALLS + 2):
            call(store, Doubling(), x, key=name)
    assert len(StandIn.living) == len(store) == 2

    def needs_memory(y):
        if StandIn.living:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (y * 3,)

    assert torch.equal(call(store, needs_memory, x, key="large")[0], x * 3)
    assert not StandIn.living
    assert len(store) == 0
    assert torch.equal(call(store, Doubling(), x, key="one")[0], x * 2)

    def too_large(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        call(store, too_large, x, key="too large")


def test_of_too_many_graphs_the_one_used_last_long_ago_goes_and_waits_twice_as_long():
    store, function = GraphCache(StandIn), Doubling()
    shapes = [torch.randn(n, 2) for n in range(1, MAX_GRAPHS + 2)]
    for x in shapes[:-1]:
        capture(store, function, x)
    call(store, function, shapes[0])
    capture(store, function, shapes[-1])
    assert len(store) == len(StandIn.living) == MAX_GRAPHS
    assert [graph.inputs[0].shape[0] for graph in StandIn.living] == [1, *range(3, MAX_GRAPHS + 2)]
    for n in range(2 * EAGER_CALLS + 1):
        assert shapes[1].shape not in [graph.inputs[0].shape for graph in StandIn.living], n
        assert_equal(call(store, function, shapes[1]), Doubling()(shapes[1]))
    assert StandIn.living[-1].inputs[0].shape == shapes[1].shape


def test_all_graphs_together_keep_to_their_bytes(monkeypatch):
    monkeypatch.setattr(StandIn, "pool_bytes", 1000)  # a pool grows and does not shrink
    store, function = GraphCache(StandIn), Doubling()
    held = []
    for n in range(1, 20):
        capture(store, function, torch.randn(n, 10), most_bytes=5000)
        held.append(store.n_bytes)
    assert max(held) <= 5000
    assert max(held) > 2000
    assert len(store) == len(StandIn.living)


def test_each_gpu_has_a_number_of_graphs_and_bytes_of_its_own():
    store, function = GraphCache(StandIn), Doubling()
    shapes = [torch.randn(n, 2) for n in range(1, MAX_GRAPHS + 1)]
    for place in (HERE, ON_ANOTHER_GPU):
        for x in shapes:
            capture(store, function, x, place=place, most_bytes=sum(x.nbytes for x in shapes))
    assert len(store) == len(StandIn.living) == 2 * MAX_GRAPHS
    capture(store, function, torch.randn(1, 3), place=ELSEWHERE)  # another stream of the first
    assert len(store) == 2 * MAX_GRAPHS
    assert [graph.inputs[0].shape for graph in StandIn.living[:1]] == [shapes[1].shape]

    def no_memory(x: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        call(store, no_memory, torch.randn(3, 3), key="no memory", place=ON_ANOTHER_GPU)
    assert len(store) == len(StandIn.living) == MAX_GRAPHS


def test_a_graph_that_alone_is_too_large_is_tried_ever_more_rarely():
    store, function, x = GraphCache(StandIn), Doubling(), torch.randn(100)[None]
    runs = []
    for _ in range(100):
        before = function.runs
        assert_equal(call(store, function, x, most_bytes=100), Doubling()(x))
        runs.append(function.runs - before)
    assert [n for n, count in enumerate(runs) if count == 2] == [2, 7, 16, 33, 66]  # once for the result and once to capture
    assert store.n_bytes == len(StandIn.living) == 0


def test_ever_new_shapes_leave_a_bounded_number_of_counts():
    store, function = GraphCache(StandIn), Doubling()
    for n in range(2 * MAX_SHAPES):
        call(store, function, torch.empty(1, n))
    capture(store, function, torch.empty(3, 3))
    for n in range(MAX_SHAPES):
        call(store, function, torch.empty(2, n))
    assert len(store._shapes) == MAX_SHAPES
    assert len(store) == len(StandIn.living) == 0


# On and off


def test_turned_off_all_graphs_are_freed_and_nothing_is_captured():
    store, function, x = GraphCache(StandIn), Doubling(), torch.randn(3, 4)
    capture(store, function, x)
    assert store.n_bytes == x.nbytes
    assert store.enable(False) is True
    assert len(store) == store.n_bytes == len(StandIn.living) == 0
    capture(store, function, x)
    assert len(StandIn.living) == 0
    assert store.enable(True) is False
    capture(store, function, x)
    assert len(StandIn.living) == 1


@pytest.mark.parametrize("enabled", [None, 1, "off"], ids=repr)
def test_set_cuda_graphs_names_what_is_wrong_and_changes_nothing(enabled):
    before = set_cuda_graphs(True)
    with pytest.raises(ValueError, match=f"enabled must be True or False, but is {enabled!r}"):
        set_cuda_graphs(enabled)
    assert set_cuda_graphs(before) is True


def test_it_is_on_unless_turned_off():
    assert cache._graphs.enabled
    assert operator.cache is cache
