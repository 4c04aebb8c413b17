"""A set of weak references that several threads add to while another one reads it all."""

from __future__ import annotations

import threading
import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedWeakSet(Generic[T]):
    """Objects that are alive. Iterating a `weakref.WeakSet` raises RuntimeError if another thread adds to it meanwhile."""

    def __init__(self) -> None:
        self._objects: weakref.WeakSet[T] = weakref.WeakSet()
        self._lock = threading.RLock()  # a garbage collection within `add` may run code that adds, too

    def add(self, x: T) -> None:
        with self._lock:
            self._objects.add(x)

    def all(self) -> list[T]:
        """The objects that are in the set now."""
        with self._lock:
            return list(self._objects)
