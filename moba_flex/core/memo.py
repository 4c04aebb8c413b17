"""What follows from the values of a tensor, worked out once for all calls that are given that tensor.

Padding and packed sequences come as a tensor on the GPU. To check its values the host waits for the GPU, and the layout of blocks that
follows from them is dozens of small launches. But all layers of a model, and their backward passes, are given the same tensor.

What is kept lives as long as the tensor, and until PyTorch's version counter tells of a write: what autograd relies on too. The counter
does not see what a kernel of the user's own writes or an exchange between processes (`dist.broadcast`), nor code that torch.compile made,
which gives one tensor several contents. So only those are remembered that come from outside of compiled graphs, where code of that kind
writes no tensor that it has handed out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .allocation import allocate_persistent, may_be_kept, stream_of
from .upstream import version_of

T = TypeVar("T")
MOST = 16  # things that are kept for one tensor: calls of many settings may share it


class _Entry:
    """What is known of one tensor as of one of its versions."""

    def __init__(self, x: Tensor) -> None:
        number = id(x)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if (entry := _entries.get(number)) is not None and entry.tensor is reference:
                del _entries[number]

        self.tensor, self.version, self.known = weakref.ref(x, forget), version_of(x), dict[Hashable, Any]()


_entries: dict[int, _Entry] = {}  # by id: tensors compare element by element, so that they are no keys


def remember(x: Tensor) -> None:
    """From now on keep what follows from the values of `x`. Within a graph that is traced or captured nothing happens."""
    if not torch.compiler.is_compiling() and may_be_remembered(x) and may_be_kept(x.device) and _entry(x) is None:
        _entries[id(x)] = _Entry(x)


def may_be_remembered(x: Tensor) -> bool:
    """On a CPU there is nothing to wait for, and NumPy may write unseen. What inference mode makes has no version."""
    return x.is_cuda and type(x) is Tensor and not x.is_inference()


def is_remembered(x: Tensor) -> bool:
    """Whether `memo` keeps what follows from `x`."""
    return _entry(x) is not None and may_be_kept(x.device)


def memo(x: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, which must follow from the values of `x` and `name` alone. Kept with `x` if that is remembered."""
    entry = _entry(x)
    if entry is None or not may_be_kept(x.device):
        return make()
    if name not in entry.known:
        made = make()
        if len(entry.known) >= MOST:
            entry.known.clear()
        entry.known[name] = made
    return entry.known[name]


def memo_of_both(x: Tensor, y: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, which must follow from the values of both and `name` alone.

    Kept for the `y` that came last with this `x`, and for one stream: another would have to wait until it is written.
    """
    if torch.compiler.is_compiling() or not (is_remembered(x) and is_remembered(y)):
        return make()
    last: dict[str, tuple[weakref.ref[Tensor], int, T]] = memo(x, (name, stream_of(x.device)), dict)
    found = last.get("last")
    if found is None or found[0]() is not y or found[1] != version_of(y):
        found = last["last"] = weakref.ref(y), version_of(y), allocate_persistent(make, x.device)
    return found[2]  # not of `last`, where another thread may have put its own


def _entry(x: Tensor) -> _Entry | None:
    entry = _entries.get(id(x))
    return entry if entry is not None and entry.tensor() is x and entry.version == version_of(x) else None
