"""Which dtype to accumulate in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and gate scores: `dtype`, but at least float32."""
    return torch.promote_types(dtype, torch.float32)
