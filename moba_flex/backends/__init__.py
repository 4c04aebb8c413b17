"""Implementations of the steps in `moba_flex/attention.py`: `eager` for any device, `flex` and `triton` for CUDA.

`protocol.py` defines their common interface.
"""

from __future__ import annotations

from ..core.settings import AttentionSettings
from . import eager, flex, triton
from .protocol import Backend

BACKENDS: dict[str, Backend] = {"eager": eager, "flex": flex, "triton": triton}


def backend_of(settings: AttentionSettings) -> Backend:
    """The backend that a call's `implementation` names."""
    return BACKENDS[settings.implementation]
