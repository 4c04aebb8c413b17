"""Disables autocast, which would compute in half precision what the gate compares in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast on the device of `x`. It costs nothing if autocast is off, as in most calls."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x.device) else nullcontext()


def autocast_is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # meta has no autocast
