"""Few blocks: one dense call whose mask reads a bit for each (query, block), where that costs less than routing.

Routing works on the keys that are read and no others, but takes two attention calls and ten kernels around them. For a short prompt that
is more than to meet all its keys, and mask those of blocks that a query did not choose.

B rows, H query heads, N tokens (Nq queries, Nk keys), C key blocks, Q query blocks, P slots a block, S chosen blocks a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.chunking import MAX_HEADS
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings

MOST_BLOCKS = 32  # the bits of an int32
# Multiplications and additions of a dense forward pass that cost an H100 about what a routed one does. With 32 heads of width 128, 2,048
# tokens are half of it, where forward and backward take 1.6 ms masked and 1.3 routed (from CUDA graphs) or 2.8 and 4.3 (without); 4,096
# tokens are twice as many, where they take 4.2 and 1.8, or 4.1 and 3.7.
FEW_OPERATIONS = 1 << 36


def few_blocks(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSettings) -> bool:
    """Whether causal attention to tokens without padding is computed as one dense call; follows from shapes alone.

    It is where each query has a bit for every block, one launch serves all heads, offsets fit into 32 bits, and the dense call costs about
    what a routed one does.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    n_blocks = -(-n_key // spec.block_size)
    if not spec.causal or not spec.routed or not 1 < n_blocks <= MOST_BLOCKS:
        return False
    if query.shape[0] * query.shape[1] > MAX_HEADS:
        return False
    if max(x.numel() // x.shape[3] for x in (query, key)) * max(query.shape[3], value.shape[3]) >= 1 << 31:
        return False
    scores = query.shape[0] * query.shape[1] * n_query * (2 * n_key - n_query)  # twice those of the causal triangle
    return scores * (query.shape[3] + value.shape[3]) <= FEW_OPERATIONS


def block_bits(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, H, Q * P, S]`, -1 for none -> `[B, H, Nq]` int32: bit c of a query is set if it reads block c; its own block's always is."""
    own = layout.own.repeat_interleave(layout.width, 1)[:, None, :, None].expand(*chosen.shape[:3], 1)
    block = torch.cat([chosen, own], -1)
    bit = torch.ones_like(block) << block.clamp(min=0)
    return layout.query_tokens(bit.masked_fill_(block < 0, 0).sum(-1, dtype=torch.int32))
