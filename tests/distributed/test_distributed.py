"""Several processes give what one gives: outputs and gradients, for data, sharded, tensor and context parallelism; and clear errors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import distributed_checks as checks
from support import generation_checks as generation
from support import stuck
from support.cases import Case
from support.processes import Processes, ProcessesFailed

from moba_flex import select_blocks
from moba_flex.distributed.placement import Placement

DEVICE = os.environ.get("MOBA_FLEX_DISTRIBUTED_TESTS", "cpu")  # "cuda": through NCCL, with a GPU for each process


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    """Four processes, shared by all checks."""
    with processes(4) as group:
        yield group


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as group:
        yield group


@pytest.fixture
def some(request: pytest.FixtureRequest) -> Processes:
    """Four processes, of which meshes make groups of two; on a host with two or three GPUs, two."""
    return request.getfixturevalue("four" if DEVICE == "cpu" or torch.cuda.device_count() >= 4 else "two")


@pytest.fixture
def enough(request: pytest.FixtureRequest, some: Processes) -> Processes:
    """`some`, where they are as many as the test's `size` asks for."""
    size = request.getfixturevalue("size")
    if some.size < size:
        pytest.skip(f"needs {size} GPUs")
    return some


def processes(size: int) -> Processes:
    if DEVICE == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    return Processes(size, device=DEVICE)


WHOLE = Case(batch=2, heads=4, groups=2, n_query=64, n_key=64, width=6, value_width=4, block_size=8, top_k=3)


@pytest.mark.parametrize(
    "case",
    [
        WHOLE,
        WHOLE.but(n_query=53, n_key=53, block_size=7),  # blocks cross the slices' borders, and nothing divides
        WHOLE.but(n_query=37, n_key=37, block_size=16, heads=8, sink_blocks=1, recent_blocks=1, top_k=4),
        WHOLE.but(n_query=50, n_key=50, block_size=50, top_k=1, softcap=2.0),  # all in one block
        WHOLE.but(n_query=41, n_key=41, block_size=3, groups=4, sinks=True, scale=0.3),
        WHOLE.but(n_query=43, n_key=43, block_size=5, groups=4, heads=8, share_selection=True),
        WHOLE.but(n_query=5, n_key=5, block_size=2, heads=4, groups=1, batch=1),  # the last process has padding only
    ],
)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_context_parallel_attention_is_that_of_one_process(enough: Processes, case: Case, size: int, exchange: str) -> None:
    enough.run(checks.operator_is_equal, case, size, exchange, "eager", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_context_parallel_attention_through_flexattention_is_that_of_one_process(enough: Processes, size: int, exchange: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("needs several GPUs, and MOBA_FLEX_DISTRIBUTED_TESTS=cuda to use them")
    enough.run(checks.flex_is_equal, size, exchange)


@pytest.mark.parametrize("exchange", ["keys", "heads"])
@pytest.mark.parametrize(("size", "n_tokens", "checkpointing"), [(2, 45, False), (4, 45, True), (4, 64, False)])
def test_a_model_in_slices_has_the_logits_loss_and_gradients_of_one_process(
    enough: Processes, size: int, n_tokens: int, checkpointing: bool, exchange: str
) -> None:
    enough.run(checks.model_in_slices_is_equal, size, exchange, n_tokens, checkpointing)


LENGTH_SCALED = pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 40,
            "short_factor": [1.05, 1.1],
            "long_factor": [2.0, 30.0],
        },
    ],
    ids=["dynamic", "longrope"],
)


@pytest.mark.parametrize("size", [2, 4])
@LENGTH_SCALED
def test_rotary_embeddings_that_depend_on_the_length_see_all_of_it(enough: Processes, size: int, rope: dict) -> None:
    enough.run(checks.length_scaled_is_equal, size, rope)


@pytest.mark.parametrize("group", ["two", "four"])
def test_data_parallel_has_the_gradients_of_one_process(request: pytest.FixtureRequest, group: str) -> None:
    request.getfixturevalue(group).run(checks.data_parallel_is_equal)


@pytest.mark.parametrize("group", ["two", "four"])
def test_sharded_parameters_have_the_gradients_of_one_process(request: pytest.FixtureRequest, group: str) -> None:
    request.getfixturevalue(group).run(checks.sharded_is_equal)


def test_a_convolution_of_keys_after_sharding_is_refused(two: Processes) -> None:
    two.run(checks.new_weights_after_sharding_are_refused)


def test_a_convolution_of_keys_under_tensor_parallelism_is_refused(two: Processes, tmp_path: Path) -> None:
    checks.moba_flex.patch(checks.LlamaForCausalLM(checks.tiny()), block_size=7, top_k=3, key_conv=3).save_pretrained(tmp_path)
    two.run(checks.tensor_parallel_with_convolutions_is_refused, str(tmp_path))


@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_sharded_parameters_and_sequences_in_slices_together_have_the_gradients_of_one_process(four: Processes, exchange: str) -> None:
    four.run(checks.sharded_in_slices_is_equal, exchange)


@pytest.mark.parametrize("group", ["two", "four"])
def test_tensor_parallel_has_the_logits_and_gradients_of_one_process(request: pytest.FixtureRequest, tmp_path: Path, group: str) -> None:
    checks.save_tiny_model(tmp_path)
    request.getfixturevalue(group).run(checks.tensor_parallel_is_equal, str(tmp_path))


@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_accelerate_shards_parameters_and_sequences_and_has_the_gradients_of_one_process(four: Processes, exchange: str) -> None:
    four.run(checks.accelerate_is_equal, exchange)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4), (8, 1)])
def test_bytes_sent_are_those_of_the_formulas(enough: Processes, size: int, heads: int, groups: int) -> None:
    """docs/scaling.md gives them for a token; here for one process, L tokens, D = Dv."""
    length, width, e = 12, 8, 4
    keys = (size - 1) * length * groups * 2 * width * e
    for forward, backward in enough.run(checks.bytes_sent, "keys", size, length, heads, groups, width):
        assert forward == {"gather": keys, "reduce-scatter": 0, "all-to-all": 0}
        assert backward == {"gather": 0, "reduce-scatter": keys, "all-to-all": 0}
    exchanged = (size - 1) * length // size * (heads + max(groups, size)) * 2 * width * e
    for forward, backward in enough.run(checks.bytes_sent, "heads", size, length, heads, groups, width):
        assert forward == backward == {"gather": 0, "reduce-scatter": 0, "all-to-all": exchanged}


def test_contiguous_slices_have_equal_work_but_for_the_first() -> None:
    """Pairs of a query and a past block that it reads; docs/scaling.md uses the closed form at lengths that no test can count."""
    block_size, top_k, n_tokens, size = 8, 4, 512, 4
    query, key = torch.randn(1, 2, n_tokens, 4), torch.randn(1, 1, n_tokens, 4)
    chosen = select_blocks(query, key, block_size=block_size, top_k=top_k).indices >= 0
    counted = chosen.unflatten(2, (size, -1)).sum((0, 1, 3, 4)).tolist()
    assert counted == [2 * n for n in pairs_of_slices(n_tokens, size, block_size, top_k)]
    assert counted[1] == counted[2] == counted[3] > counted[0]

    work = pairs_of_slices(1 << 20, 8, 4096, 12)
    assert max(work) / (sum(work) / 8) < 1.03  # of dense attention the last slice has 1.875 times the mean
    work = pairs_of_slices(10 * (1 << 20), 1024, 4096, 12)
    assert max(work) / (sum(work) / 1024) < 1.003


def pairs_of_slices(n_tokens: int, size: int, block_size: int, top_k: int) -> list[int]:
    length = n_tokens // size
    return [sum(min(top_k - 1, n // block_size) for n in range(r * length, (r + 1) * length)) for r in range(size)]


def test_bad_input_is_refused_on_every_process(four: Processes) -> None:
    four.run(checks.bad_input_is_refused)


def test_a_process_that_ends_is_named_and_the_others_say_what_they_waited_for() -> None:
    before = set(multiprocessing.active_children())
    with Processes(2) as group:
        with pytest.raises(ProcessesFailed) as failure:
            group.run(checks.one_ends)
        said = str(failure.value)
        assert "process 1: ended with exit code 7" in said
        assert "on rank 0 of 2: another process has ended or hangs" in said
        assert not set(multiprocessing.active_children()) - before


def test_a_process_that_hangs_is_shown_and_the_next_check_runs() -> None:
    with Processes(2) as group:
        assert group.run(stuck.here) == [torch.device("cpu")] * 2  # imports what the check needs, which may take longer than the limit
        group.time_limit = 1
        with pytest.raises(ProcessesFailed, match="one_hangs: no answer after 1 seconds") as failure:
            group.run(stuck.one_hangs)
        assert "in one_hangs" in str(failure.value)
        group.time_limit = 120
        assert group.run(dist.get_rank) == [0, 1]


def test_keys_travel_while_attention_works_on_other_heads(some: Processes) -> None:
    for forward, backward in some.run(checks.order_of_events):
        assert forward == [
            "start gather 0",
            *("start gather 1", "wait for gather 0", "attention 0"),
            *("start gather 2", "wait for gather 1", "attention 1"),
            *("wait for gather 2", "attention 2"),
        ]
        assert backward.index("start sum 0") < backward.index("attention's backward 0")
        assert backward[-3:] == ["wait for sum 0", "wait for sum 1", "wait for sum 2"]


def test_two_messages_are_held_at_a_time(some: Processes) -> None:
    assert some.run(checks.most_messages_held) == [2] * some.size


@given(size=st.integers(1, 5), block_size=st.integers(1, 6), prompt=st.integers(1, 70), more=st.integers(0, 60))
def test_each_token_is_held_by_one_process_and_none_moves(size: int, block_size: int, prompt: int, more: int) -> None:
    """A process holds its tokens in order, whole blocks of them, and as many of those behind the prompt as others, but for one block."""
    token = torch.arange(prompt + more)
    places = [Placement(rank, size, block_size, prompt) for rank in range(size)]
    mine = torch.stack([place.is_mine(token // block_size) for place in places])
    assert (mine.sum(0) == 1).all()
    for place, held in zip(places, mine):
        begin, length = place.rank * place.slice_length, place.slice_length
        assert held[:prompt].nonzero()[:, 0].tolist() == list(range(begin, max(begin, min(begin + length, prompt))))
        assert place.held(token).tolist() == [int(held[:n].sum()) for n in range(prompt + more)]
        blocks = token[::block_size] // block_size
        local = place.local(blocks)
        assert local[local >= 0].tolist() == list(range(int((local >= 0).sum()))) and (local >= 0).equal(held[::block_size])
    new = mine[:, -(-prompt // block_size) * block_size :].sum(1)
    assert new.max() - new.min() <= block_size
    assert size * places[0].slice_length >= prompt and places[0].slice_length <= min(prompt, -(-prompt // size) + block_size)


@pytest.mark.parametrize("exchange", ["keys", "heads"])
@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize(("size", "n_tokens"), [(2, 45), (4, 83), (4, 1)])
def test_generation_across_processes_gives_the_tokens_of_one(
    enough: Processes, size: int, n_tokens: int, decode: str, exchange: str
) -> None:
    held = enough.run(generation.tokens_are_equal, size, exchange, decode, n_tokens)
    assert sum(held[:size]) == n_tokens + generation.NEW - 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("one_then_many", [False, True])
def test_turns_cuts_and_moved_rows_of_a_shared_cache_have_the_logits_of_one_process(
    enough: Processes, size: int, decode: str, one_then_many: bool
) -> None:
    enough.run(generation.every_way_to_cut_is_equal, size, decode, one_then_many)


LAST = Case(batch=2, heads=4, groups=2, n_query=3, n_key=50, width=6, value_width=4, block_size=4, top_k=3)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("reads_all", [False, True])
@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        (LAST, 33),
        (LAST.but(sink_blocks=1, top_k=4, softcap=1.5, n_key=29, block_size=3), 28),
        (LAST.but(groups=4, sinks=True, scale=0.3, n_query=9), 41),
        (LAST.but(share_selection=True, recent_blocks=1), 7),
        (LAST.but(groups=1, block_size=64, n_key=20), 18),
        (LAST.but(block_size=1, top_k=5, n_query=20), 30),
    ],
)
def test_attention_to_shared_keys_is_the_specification(enough: Processes, case: Case, prompt: int, size: int, reads_all: bool) -> None:
    enough.run(generation.drawn_attention_is_equal, case, size, prompt, reads_all)


@pytest.mark.parametrize("reads_all", [False, True])
@pytest.mark.parametrize("case", [LAST.but(n_query=7), LAST.but(n_query=7, groups=1, softcap=1.5, block_size=64)])
def test_what_later_new_tokens_hold_reaches_no_earlier_ones(two: Processes, case: Case, reads_all: bool) -> None:
    two.run(generation.later_tokens_reach_no_earlier_ones, case, 2, 41, reads_all)


def test_only_holders_of_chosen_blocks_read(four: Processes) -> None:
    """With one block per query, its own: that is held by one process, and the others have nothing to say."""
    case = LAST.but(n_query=1, top_k=1, n_key=49)
    read = four.run(generation.drawn_attention_is_equal, case, 4, 48, False)
    assert [n for n, _ in read] == [case.batch * case.heads, 0, 0, 0]  # block 12, the first behind the prompt, is dealt to process 0
    assert [held for _, held in read] == [13, 12, 12, 12]


@LENGTH_SCALED
def test_generation_with_rotary_embeddings_that_depend_on_the_length(some: Processes, rope: dict) -> None:
    some.run(generation.length_scaled_generation_is_equal, 2, rope)


def test_all_processes_draw_the_same_tokens_and_search_the_same_beams(some: Processes) -> None:
    drawn = some.run(generation.other_ways_to_generate_are_equal, 2)
    assert all(x == drawn[0] for x in drawn)


def test_a_sharded_model_generates_across_processes(four: Processes) -> None:
    four.run(generation.sharded_model_is_equal)


def test_generation_that_cannot_be_shared_out_is_refused_on_every_process(four: Processes) -> None:
    four.run(generation.what_cannot_be_shared_out_is_refused)
