"""Few blocks: one dense call whose mask reads a bit for each (query, block). `paths.dense_mask_obstacle` says when.

Routing works on the keys that are read and no others, but takes two attention calls and ten kernels around them. For a short prompt that
is more than to meet all its keys, and mask those of blocks that a query did not choose.

B rows, H query heads, N tokens (Nq queries, Nk keys), Q query blocks, P slots per block, S chosen blocks per query.
"""

from __future__ import annotations

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops import steps_for
from .block_masks import Mask, bits_mask
from .flex_calls import by_group, flex_backward, flex_forward


def forward(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """All of attention in one dense call, for few blocks: tokens `[B, H, Nq, D]` -> `[B, H, Nq, Dv]`, log-sum-exp `[B, H, Nq]`."""
    mask = _mask_of(chosen, layout, key.shape[1])
    groups = key.shape[1]
    out, lse = flex_forward(by_group(query, groups), by_group(key, groups), by_group(value, groups), mask, settings)
    return out.reshape(*query.shape[:3], -1), lse.view(query.shape[:3])


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    chosen: Tensor,
    layout: BlockLayout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through `masked`."""
    mask = _mask_of(chosen, layout, key.shape[1])
    q, k, v, g, l, d = (by_group(x, key.shape[1]) for x in (query, key, value, grad, lse, delta))
    dq, dk, dv = flex_backward(q, k, v, g, l, d, mask, settings)
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def _mask_of(chosen: Tensor, layout: BlockLayout, groups: int) -> Mask:
    return bits_mask(by_group(steps_for(chosen).block_bits(chosen, layout), groups), layout)
