"""The stand-ins of each test are its own. Imports are within: the process that hands tests out to others needs no PyTorch."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _none_left(monkeypatch):
    from support.stand_in_graphs import StandIn

    monkeypatch.setattr(StandIn, "living", [], raising=False)
    monkeypatch.setattr(StandIn, "pool_bytes", 0, raising=False)
