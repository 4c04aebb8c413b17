"""The chosen blocks of a query as the bits of one number."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from .sizes import cdiv


@triton.jit(do_not_specialize=["N", "N_SLOTS", "SKIPPED"])
def _bits_kernel(CHOSEN, OUT, N, N_SLOTS, SKIPPED, BLOCK: tl.constexpr, P: tl.constexpr, S: tl.constexpr, M: tl.constexpr):
    # One program: M queries of one head.
    head, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * M + tl.arange(0, M)
    here, own = n < N, (n + SKIPPED) // BLOCK
    chosen = CHOSEN + (head * N_SLOTS + (own - SKIPPED // BLOCK) * P + (n + SKIPPED) % BLOCK) * S
    one = tl.full([M], 1, tl.int32)
    bits = one << own
    for s in tl.static_range(S):
        block = tl.load(chosen + s, mask=here, other=-1)
        bits |= tl.where(block >= 0, one << tl.maximum(block, 0), 0)
    tl.store(OUT + head * N + n, bits, mask=here)


def block_bits(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """`[B, H, Q * P, S]` -> `[B, H, Nq]` int32, for a layout without padding: see `moba_flex.backends.dense_mask.block_bits`."""
    rows, heads, slots, count = chosen.shape
    bits, tile, skipped = chosen.new_empty(rows, heads, layout.n_query), 256, layout.n_key - layout.n_query
    _bits_kernel[(cdiv(layout.n_query, tile), rows * heads)](
        chosen, bits, layout.n_query, slots, skipped, layout.block_size, layout.width, count, tile, num_warps=4
    )
    return bits
