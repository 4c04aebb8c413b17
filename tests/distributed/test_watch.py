"""`watch_processes`: a process that is killed, hangs or is late is named by the others, which do not wait for it for ever."""

from __future__ import annotations

import pytest
from support import watch_checks as checks
from support.processes import Processes, ProcessesFailed

from moba_flex.distributed import watch_processes

MISSING = "process 1 of 3 (pid "


def told(errors: str) -> list[str]:
    """The sentences that watches have printed."""
    return [line for line in errors.splitlines() if line.startswith("moba_flex: ")]


def of(rank: int, lines: list[str], ending: str) -> str:
    """The one line of a process that ends so."""
    (line,) = [line for line in lines if line.endswith(ending.format(rank))]
    return line


def test_who_is_late_is_named_by_those_that_wait_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    """And nobody is while all live, whether they are done or not."""
    with Processes(3) as group:
        assert group.run(checks.all_live_and_end) == [[], [], []]
        assert not told(capfd.readouterr().err)

        said = group.run(checks.one_is_late)
        lines = told(capfd.readouterr().err)
    for rank in (0, 2):
        behind = ", last at step 7) is missing for 0.5 seconds; process {} was at step 8"
        assert of(rank, lines, behind).startswith(f"moba_flex: {MISSING}")
        assert f"on rank {rank} of 3: {MISSING}" in said[rank]
        assert f", last at step 7) has not come; process {rank} was at step 8 (" in said[rank]


@pytest.mark.parametrize("connections_stay", [False, True])
def test_who_is_killed_is_named_by_all_others_which_end(capfd: pytest.CaptureFixture[str], connections_stay: bool) -> None:
    """By its exchange, if that fails while the process is not yet silent for too long; by the watch otherwise."""
    with Processes(3, time_limit=30) as group, pytest.raises(ProcessesFailed) as failure:
        group.run(checks.one_is_killed, connections_stay)
    said, errors = str(failure.value), capfd.readouterr().err
    assert "process 1: ended with exit code -9" in said and "process 2: ended" in said
    ending = ", last at step 3) has not been heard of for 1.5 seconds: it was killed, or hangs; process {} was at step 3; this process ends"
    assert of(2, told(errors), ending).startswith(f"moba_flex: {MISSING}")
    if checks.EXCHANGE_FAILED in errors:
        assert not connections_stay, "nothing has told the exchange"
        assert f"on rank 0 of 3: {MISSING}" in said
        assert ", last at step 3) ended without a word; process 0 was at step 3 (" in said
    else:  # the kernel took its time, which it may
        assert of(0, told(errors), ending).startswith(f"moba_flex: {MISSING}") and "process 0: ended" in said


@pytest.mark.parametrize("name", ["silent", "late"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "30"])
def test_seconds_that_are_none_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, but is "):
        watch_processes(**{name: value})


def test_a_watch_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        watch_processes()
