"""The chosen blocks of a query as bits, for a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import BlockLayout


def block_bits(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """`chosen [B, H, Q * P, S]` -> int32 `[B, H, Q * P]`: bit `c` says whether a query reads block `c`, a chosen one or its own.

    At most 32 blocks.
    """
    one = torch.ones((), dtype=torch.int32, device=chosen.device)
    bits = torch.where(chosen >= 0, one << chosen.clamp(min=0), 0).sum(-1, dtype=torch.int32)
    return bits | (one << layout.own).repeat_interleave(layout.width, 1)[:, None]
