"""Which dtype to accumulate in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: what sums, log-sum-exps and the gate's scores are computed in."""
    return torch.promote_types(dtype, torch.float32)
