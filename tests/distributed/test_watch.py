"""`watch_processes`: a process that is killed, hangs or is late is named by the others, which do not wait for it for ever."""

from __future__ import annotations

import pytest
from support import watch_checks as checks
from support.processes import Processes, ProcessesFailed

from moba_flex.distributed import watch_processes


def test_who_is_late_or_killed_is_named_by_those_that_wait_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    """And nobody is while all live, whether they are done or not."""

    def told() -> list[str]:
        return [line for line in capfd.readouterr().err.splitlines() if line.startswith("moba_flex: ")]

    with Processes(3) as group:
        assert group.run(checks.all_live_and_end) == [[], [], []]
        assert not told()

        said = group.run(checks.one_is_late)
        late, behind = "process 1 of 3 (pid ", ", at step 7) is missing for 0.5 seconds; process {} was at step 8"
        assert [line.startswith(f"moba_flex: {late}") for line in told_once(told(), behind)] == [True, True]
        for rank in (0, 2):
            assert f"on rank {rank} of 3: {late}" in said[rank]
            assert f", at step 7) has not come; process {rank} was at step 8 (" in said[rank]

        with pytest.raises(ProcessesFailed) as failure:
            group.run(checks.one_is_killed)
    assert "process 1: ended with exit code -9" in str(failure.value) and "process 2: ended" in str(failure.value)
    assert f"on rank 0 of 3: {late}" in str(failure.value)
    assert ", at step 3) ended without a word; process 0 was at step 3 (" in str(failure.value)
    (line,) = [line for line in told() if "process 2 was" in line]
    assert line.startswith(f"moba_flex: {late}")
    ending = ", at step 3) has not been heard of for 1.5 seconds: it was killed, or hangs; process 2 was at step 3; this process ends"
    assert line.endswith(ending)


def told_once(lines: list[str], ending: str) -> list[str]:
    """The lines of processes 0 and 2, one each."""
    return [line for rank in (0, 2) for line in lines if line.endswith(ending.format(rank))]


@pytest.mark.parametrize("name", ["silent", "late"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "30"])
def test_seconds_that_are_none_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, but is "):
        watch_processes(**{name: value})


def test_a_watch_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        watch_processes()
