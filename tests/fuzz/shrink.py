"""A failing draw made smaller while it fails, and written as a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .draws import Draw

Check = Callable[[Draw], "str | None"]
SECONDS = 20.0
_PLAIN = {
    "values": "normal",
    "layout": "contiguous",
    "memory": None,
    "threads": 1,
    "spoilt": (),
    "sinks": False,
    "share_selection": False,
    "scale": None,
    "softcap": None,
    "padding": None,
    "sink_blocks": 0,
    "recent_blocks": 0,
}


def shrunk(draw: Draw, what: str, check: Check, seconds: float = SECONDS) -> tuple[Draw, str]:
    """The smallest failing draw that is found in so many seconds, and what is wrong with it."""
    until = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < until:
        again = False
        for smaller in _smaller(draw):
            if time.monotonic() > until:
                break
            try:
                found = check(smaller)
            except Exception:  # no valid call
                continue
            if found is not None and _kind(found) == _kind(what):
                draw, what, again = smaller, found, True
                break
    return draw, what


def _kind(what: str) -> str:
    """The words before the numbers: another fault must not take the place of this one."""
    return what.split(" (")[0].split(":")[0] + what.partition(": ")[2].split(" ")[0]


def _smaller(draw: Draw) -> Iterator[Draw]:
    case = draw.case
    for name, value in _PLAIN.items():
        if (getattr(draw, name) if hasattr(draw, name) else getattr(case, name)) != value:
            yield draw.but(**{name: value})
    for i in range(len(draw.spoilt)):
        yield draw.but(spoilt=draw.spoilt[:i] + draw.spoilt[i + 1 :])
    if draw.lengths is not None:
        if draw.keys is not None:
            yield draw.but(keys=None, n_key=sum(draw.lengths))
        for i in range(len(draw.lengths)):
            lengths, keys = (None if n is None else n[:i] + n[i + 1 :] for n in (draw.lengths, draw.keys))
            if sum(lengths):
                yield draw.but(lengths=lengths, keys=keys, n_key=sum(keys or lengths), n_query=sum(lengths))
    elif case.padding is None and case.n_key > 1:
        for n_key in (case.n_key // 2, case.n_key - 1):
            yield draw.but(n_key=n_key, n_query=min(case.n_query, n_key))
    if draw.lengths is None and case.n_query > 1:
        for n_query in (1, case.n_query // 2):
            yield draw.but(n_query=n_query)
    if case.batch > 1 and case.padding is None:
        yield draw.but(batch=1)
    if case.groups > 1:
        yield draw.but(groups=1, heads=case.repeats)
    if case.repeats > 1:
        yield draw.but(heads=case.groups)
    for name in ("width", "value_width", "block_size", "top_k"):
        least = 1 + case.sink_blocks + case.recent_blocks if name == "top_k" else 1
        for value in (least, getattr(case, name) // 2, getattr(case, name) - 1):
            if least <= value < getattr(case, name):
                yield draw.but(**{name: value})


def as_test(draw: Draw, name: str, device: str = "cpu") -> str:
    """A test to paste into `tests/`."""
    return f"""from math import inf, nan

from fuzz.check import check
from fuzz.draws import Draw
from support.cases import Case


def test_{name}():
    draw = {draw!r}
    assert check(draw, {device!r}) is None
"""
