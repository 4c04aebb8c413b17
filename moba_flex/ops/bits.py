"""The chosen blocks of a query as the bits of one number, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import BlockLayout


def block_bits(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, H, Q * P, S]`, -1 for none -> `[B, H, Nq]` int32: bit c of a query is set if it reads block c; its own block's always is."""
    own = layout.own.repeat_interleave(layout.width, 1)[:, None, :, None].expand(*chosen.shape[:3], 1)
    block = torch.cat([chosen, own], -1)
    bit = torch.ones_like(block) << block.clamp(min=0)
    return layout.query_tokens(bit.masked_fill_(block < 0, 0).sum(-1, dtype=torch.int32))
