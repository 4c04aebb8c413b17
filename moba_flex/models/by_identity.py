"""A mapping keyed by the identity of configurations, which are not hashable. Entries disappear with their configurations."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from transformers import PreTrainedConfig

V = TypeVar("V")


class ByIdentity(Generic[V]):
    """A value per configuration object, kept while the object lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[PreTrainedConfig], V]] = {}

    def get(self, config: PreTrainedConfig) -> V | None:
        known = self._known.get(id(config))
        return known[1] if known is not None and known[0]() is config else None

    def put(self, config: PreTrainedConfig, value: V) -> None:
        key = id(config)
        self._known[key] = weakref.ref(config, lambda _: self._known.pop(key, None)), value

    def clear(self) -> None:
        self._known.clear()
