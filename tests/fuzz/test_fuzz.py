"""The fuzzer finds a planted fault, prints a test of it, and goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case
from support.processes import fork_server

from fuzz.check import check
from fuzz.choices import Wrong, check_selection
from fuzz.draws import LAYOUTS, VALUES, Draw, draw
from fuzz.run import State, chunks, main, try_cases
from moba_flex.backends import eager, eager_softmax
from moba_flex.core import hidden
from moba_flex.ops import decoding, gate

FEW = 150


def test_a_sound_package_passes():
    assert try_cases(0, 0, FEW, "cpu") == (FEW, [])


def test_every_kind_of_case_is_drawn_and_the_same_in_every_run():
    draws = [draw(0, number) for number in range(1000)]
    again, others = ([repr(draw(seed, number)) for number in range(1000)] for seed in (0, 1))
    assert [repr(one) for one in draws] == again != others  # by what they print, since NaN equals nothing
    assert {one.layout for one in draws} == set(LAYOUTS) and {one.values for one in draws} == set(VALUES)
    assert {one.dtype for one in draws} == {"float64", "float32", "bfloat16", "float16"}
    assert {one.threads for one in draws} == {1, 2, 3} and {one.return_lse for one in draws} == {True, False}
    scales = [abs(one.case.scale) for one in draws if one.case.scale is not None]
    assert min(scales) < 1e-30 and max(scales) > 1e30
    spoilt = [place for one in draws for place in one.spoilt]
    assert {name for name, _, _ in spoilt} == {"query", "key", "value"} and any(at == "padding" for _, at, _ in spoilt)
    assert any(one.lengths and not one.keys for one in draws) and any(one.case.padding for one in draws)
    assert any(one.keys and 1 < max(one.lengths) < max(one.keys) and 1 in one.lengths for one in draws)


def test_calls_that_a_gpu_computes_by_dense_attention_are_drawn():
    draws = [draw(74, number, "cuda") for number in range(0, 3200, 10)]
    plain = [one for one in draws if one.case.causal and not (one.return_lse or one.case.sinks or one.case.softcap or one.case.padding)]
    half = [one for one in plain if one.dtype in ("bfloat16", "float16") and one.case.width == one.case.value_width]
    dense = [
        one for one in half if one.case.width % 8 == 0 and max(one.keys or one.lengths or (one.case.n_key,)) <= 70 * one.case.block_size
    ]
    of_rows, packed = [one for one in dense if one.lengths is None], [one for one in dense if one.lengths is not None]
    assert sum(one.case.n_query == one.case.n_key and one.case.top_k == 70 for one in of_rows) > 20
    assert any(sum(one.lengths) >= 32 * len(one.lengths) and one.case.top_k == 70 for one in packed)


def _plant(monkeypatch, fault: str) -> None:
    if fault == "a later key is seen":
        monkeypatch.setattr(
            eager_softmax, "_later", lambda width, device: torch.ones(width, width, dtype=torch.bool, device=device).triu(2)
        )
    elif fault == "weights of a rounded log-sum-exp":
        monkeypatch.setattr(eager, "_ROUNDED", 1e9)
        monkeypatch.setattr(eager_softmax, "_SAFE", 1e300)
    elif fault == "NaN is not hidden":
        monkeypatch.setattr(eager_softmax, "visible_product", lambda weight, visible, x: weight @ x)
    elif fault == "equal blocks are rounded apart":
        means = gate.block_means  # by the last bit, which is what rounding may do to scores of equal blocks
        monkeypatch.setattr(gate, "block_means", lambda *args: _odd_ones_are_a_bit_larger(means(*args)))
    elif fault == "the worst blocks":
        best = gate.best_blocks
        monkeypatch.setattr(gate, "best_blocks", lambda score, *args: best(score.neg_(), *args))
    elif fault == "the gradient of keys is doubled":
        plain = eager.softmax_backward
        monkeypatch.setattr(eager, "softmax_backward", lambda *args: [x * n for x, n in zip(plain(*args), (1, 2, 1))])
    elif fault == "decoding forgets the last token":
        seen = decoding._attend
        monkeypatch.setattr(decoding, "_attend", lambda *args: seen(*args[:-2], args[-2] - 1, args[-1]))
    elif fault == "the specification drops a value":
        monkeypatch.setattr(hidden.torch.Tensor, "softmax", lambda self, dim: torch.softmax(self, dim) * 0.99)


def _odd_ones_are_a_bit_larger(mean: torch.Tensor) -> torch.Tensor:
    odd = torch.arange(mean.shape[2])[:, None] % 2 == 1
    return torch.where(odd & mean.isfinite(), torch.nextafter(mean, mean * 2), mean)


FAULTS = {
    "a later key is seen": 20,
    "NaN is not hidden": 150,
    "equal blocks are rounded apart": 200,
    "the worst blocks": 40,
    "the gradient of keys is doubled": 40,
    "decoding forgets the last token": 60,
    "the specification drops a value": 20,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_printed_as_a_test(fault: str, monkeypatch):
    with monkeypatch.context() as patch:
        _plant(patch, fault)
        for number in range(FAULTS[fault]):
            if check(draw(3, number)) is not None:
                break
        else:
            pytest.fail(f"not found in {FAULTS[fault]} cases")
        _, ((found, what, text),) = try_cases(3, number, number + 1, "cpu")
        assert found == number and what
        names: dict = {}
        exec(compile(text, "pasted", "exec"), names)
        with pytest.raises(AssertionError):
            names[f"test_seed_3_case_{number}"]()
    names[f"test_seed_3_case_{number}"]()  # without the fault


def _run(state, *more: str) -> int:
    return main(["--state", str(state), "--chunk", "10", "--processes", "1", *more])


@pytest.mark.parametrize(("read", "certain"), [((0, 1), False), ((0, 4), False), ((0, 2), None)])
def test_a_partial_block_of_equal_keys_ties_or_not_by_rounding_and_whole_ones_always_do(read, certain):
    """Four blocks of six equal keys and one of three: which place the last one takes follows from how a mean is rounded."""
    case = Case(heads=1, n_query=1, n_key=27, width=8, value_width=8, block_size=6, top_k=2, causal=False)
    one = Draw(case, dtype="float64", values="equal keys")
    tensors = {"query": torch.ones(1, 1, 1, 8).double(), "key": torch.full((1, 1, 27, 8), 0.1).double()}
    selected = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    selected[..., list(read)] = True
    of_key = torch.arange(27)[None] // 6
    if certain is None:
        with pytest.raises(Wrong, match="leaves out an earlier one with the same keys"):
            check_selection(one, tensors, selected, of_key, "eager")
    else:
        assert check_selection(one, tensors, selected, of_key, "eager") is certain


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path, capsys):
    state = tmp_path / "state.json"
    assert _run(state, "--cases", "20") == 0
    assert json.loads(state.read_text()) == {"seed": 0, "device": "cpu", "tried": [[0, 20]], "failed": []}
    assert "20 of 20 cases are left" in capsys.readouterr().out
    assert _run(state, "--cases", "40") == 0
    assert "20 of 40 cases are left" in capsys.readouterr().out
    assert _run(state, "--cases", "45", "--first", "42") == 0
    assert json.loads(state.read_text())["tried"] == [[0, 40], [42, 45]]
    assert _run(state, "--cases", "45") == 0
    assert json.loads(state.read_text())["tried"] == [[0, 45]]
    with pytest.raises(ValueError, match="of seed 0 on cpu"):
        State.load(state, 1, "cpu")


def test_processes_share_the_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fuzz.run.get_context", lambda _: fork_server())  # which spares their imports
    state = tmp_path / "state.json"
    assert _run(state, "--cases", "30", "--processes", "2", "--minutes", "0") == 0
    assert "0 cases of seed 0 on cpu have been tried" in capsys.readouterr().out
    assert _run(state, "--cases", "30", "--processes", "2") == 0
    assert json.loads(state.read_text())["tried"] == [[0, 30]]
    assert "failed: none" in capsys.readouterr().out


def test_what_was_tried_when_the_time_was_over_counts(tmp_path, monkeypatch):
    clock = SimpleNamespace(time=itertools.count().__next__, monotonic=time.monotonic)  # a second each time that somebody looks
    monkeypatch.setattr("fuzz.run.time", clock)
    state = tmp_path / "state.json"
    assert _run(state, "--cases", "1000", "--minutes", "0.3") == 0
    (tried,) = json.loads(state.read_text())["tried"]
    assert tried[0] == 0 and 10 < tried[1] < 18


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6), st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_each_case_is_tried_once(tmp_path_factory, runs: list[tuple[int, int]], first: int, more: int, size: int):
    state = State(tmp_path_factory.getbasetemp() / "runs.json", 0, "cpu", [], [])
    done = {number for start, n in runs for number in range(start, start + n)}
    for start, n in runs:
        if n:
            state.add(start, start + n, [])
    assert state.count == len(done)
    parts = list(chunks(state.left(first, first + more), size))
    tried = [number for start, stop in parts for number in range(start, stop)]
    assert tried == [number for number in range(first, first + more) if number not in done]
    assert all(start // size == (stop - 1) // size for start, stop in parts)


def test_failures_are_kept_printed_and_end_a_run_that_has_enough(tmp_path, capsys, monkeypatch):
    _plant(monkeypatch, "the gradient of keys is doubled")
    monkeypatch.setattr("fuzz.run.SECONDS", 0.1)
    state = tmp_path / "state.json"
    assert _run(state, "--cases", "1000", "--most-failures", "1") == 1
    kept, printed = json.loads(state.read_text()), capsys.readouterr().out
    assert kept["failed"] and kept["tried"][-1][1] < 1000
    assert re.search(rf"^case {kept['failed'][0]}: eager: gradient of key", printed, re.MULTILINE)
    assert f"def test_seed_0_case_{kept['failed'][0]}():" in printed
