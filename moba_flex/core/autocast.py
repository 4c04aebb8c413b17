"""Disables autocast, which would compute in half precision what the gate compares in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast on the device of `x`. It costs nothing if autocast is off, as in most calls."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # meta has no autocast
    return torch.autocast(kind, enabled=False) if on else nullcontext()
