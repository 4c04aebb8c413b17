"""Autocast, and how it is kept out: what it would compute in half precision, the gate compares in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `x`; where there is none, as in most calls, it costs nothing."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # which meta tensors have none of
    return torch.autocast(kind, enabled=False) if on else nullcontext()
