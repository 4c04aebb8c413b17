"""Caches results that depend on the values of a tensor, for all calls with that tensor.

A padding mask or `cu_seqlens` is on the GPU. Checking its values synchronizes the host with the GPU, and computing the block layout takes
dozens of small launches. All layers of a model, and their backward passes, get the same tensor.

A result is cached until the tensor is freed or PyTorch's version counter, on which autograd relies too, reports a write. The counter misses
writes of custom kernels, of collectives (`dist.broadcast`), and of code compiled by torch.compile, which reuses one tensor for different
contents. Only tensors from outside compiled graphs are remembered, since compiled code does not write to a tensor that it has returned.
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
MOST = 16  # results cached per tensor: calls with different settings may share it


class _Entry:
    """Results cached for one version of a tensor."""

    def __init__(self, x: Tensor) -> None:
        number = id(x)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if (entry := _entries.get(number)) is not None and entry.tensor is reference:
                del _entries[number]

        self.tensor, self.version, self.known = weakref.ref(x, forget), version_of(x), dict[Hashable, Any]()


_entries: dict[int, _Entry] = {}  # by id: tensors compare elementwise, so they cannot be keys


def remember(x: Tensor) -> None:
    """Starts caching results for `x`. Does nothing while a graph is traced or captured."""
    if not torch.compiler.is_compiling() and may_be_remembered(x) and may_be_kept(x.device) and _entry(x) is None:
        _entries[id(x)] = _Entry(x)


def may_be_remembered(x: Tensor) -> bool:
    """Only CUDA tensors with a version: a CPU needs no synchronization, NumPy writes are not counted, inference tensors have no version."""
    return x.is_cuda and type(x) is Tensor and not x.is_inference()


def is_remembered(x: Tensor) -> bool:
    """Whether `memo` caches results for `x`."""
    return _entry(x) is not None and may_be_kept(x.device)


def memo(x: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """The result of `make`, which must depend on the values of `x` and on `name` only. Cached if `x` is remembered."""
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
    """The result of `make`, which must depend on the values of `x` and `y` and on `name` only.

    Cached for the last `y` used with this `x`, per stream: another stream would have to wait until the result is written.
    """
    if torch.compiler.is_compiling() or not (is_remembered(x) and is_remembered(y)):
        return make()
    last: dict[str, tuple[weakref.ref[Tensor], int, T]] = memo(x, (name, stream_of(x.device)), dict)
    found = last.get("last")
    if found is None or found[0]() is not y or found[1] != version_of(y):
        found = last["last"] = weakref.ref(y), version_of(y), allocate_persistent(make, x.device)
    return found[2]  # not from `last`, which another thread may have overwritten


def _entry(x: Tensor) -> _Entry | None:
    entry = _entries.get(id(x))
    return entry if entry is not None and entry.tensor() is x and entry.version == version_of(x) else None
