"""What tests of CUDA graphs share. Imports are within: the process that hands tests out to others needs no PyTorch."""

from __future__ import annotations

import threading

import pytest


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The threads that replayed a graph, one entry for each time."""
    from moba_flex.cuda_graphs.capture import CudaGraph

    seen, real = [], CudaGraph.replay
    monkeypatch.setattr(CudaGraph, "replay", lambda graph: seen.append(threading.get_ident()) or real(graph))
    return seen
