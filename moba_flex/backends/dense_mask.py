"""Few blocks: one call in which every query computes all past blocks, under a dense mask of the blocks that it chose.

Hidden keys take as much time as others. But no rows are ordered, copied and merged, which takes longer while there are few blocks:
`paths.dense_mask_obstacle` has the limit. `"flex"` is FlexAttention, whose `score_mod` hides blocks; `"triton"` is a kernel of our own,
`ops/triton/dense_mask.py`.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, D and Dv head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..core.chunking import MASK_TILE
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..core.strides import empty_with_strides_of, tokens_first
from ..ops import kernels, ops_for
from .block_masks import block_at, block_mask, own_tile_rule, place_at, tile_lists
from .compilation import any_length
from .flex_calls import compile_on_gpu, make_constants, softcap_score
from .flex_options import COMMON_OPTIONS

MAX_BLOCKS = {"flex": 32, "triton": 64}  # bits of a query


def attend(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Causal attention to the own and the chosen blocks: the output `[B, H, Q * P, Dv]` and its log-sum-exp `[B, H, Q * P]`.

    `query [B, H, Q * P, D]`, `key [B, G, C * P, D]`, `value [B, G, C * P, Dv]`; `chosen` int32 `[B, H, Q * P, S]`. `"triton"` reads tokens
    in place, if `layout` says where they are.
    """
    if settings.implementation == "triton":
        return kernels.dense_mask_forward(query, key, value, chosen, layout, settings)
    widths, strides = (query.shape[-1], value.shape[-1]), (query.stride(2), key.stride(2), value.stride(2))
    call = _call(layout.block_size, layout.width, widths, query.dtype, settings.scale, settings.softcap, strides, query.device)
    lists = layout.cached(("dense mask",), lambda: _lists(layout))
    bits = ops_for(query).block_bits(chosen, layout)
    out, lse = call(*any_length(query, key, value, bits, layout.own, *lists))
    if tokens_first(out) != tokens_first(query):
        out = empty_with_strides_of(query, *out.shape[2:]).copy_(out)
    return out, lse


def _lists(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The key tiles of each query tile, as counts and first indices: its own one partially, the earlier ones of its sequence fully.

    None for query blocks without queries.
    """
    per = layout.width // MASK_TILE
    step = torch.arange(per, device=layout.own.device, dtype=torch.int32)
    own = (layout.own[..., None] * per + step).flatten(1)
    first = (layout.first * per).repeat_interleave(per, 1)
    holds_queries = (layout.query_stop > layout.query_start).int().repeat_interleave(per, 1)
    return *tile_lists(holds_queries, own), *tile_lists(holds_queries * (own - first), first)


@cache
def _call(
    block_size: int,
    width: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    strides: tuple[int, ...],
    device: torch.device,
) -> Callable[..., tuple[Tensor, Tensor]]:
    is_cuda = device.type == "cuda"
    stages = kernels.dense_mask.pipeline_stages(widths, dtype.itemsize, device) if is_cuda else 0
    options = COMMON_OPTIONS | {"fwd_BLOCK_M": MASK_TILE, "fwd_BLOCK_N": MASK_TILE, "fwd_num_warps": 4, "fwd_num_stages": stages}
    cap = None if softcap is None else softcap_score(softcap)

    def moba_flex_dense_mask(query, key, value, bits, own, *lists):
        make_constants(strides, query, key, value)

        def score_mod(score, b, h, q, kv):
            score = score if cap is None else cap(score, b, h, q, kv)
            reads = (bits[b, h, q] & (1 << block_at(kv, width))) != 0  # shifts once per key; bits >> block would once per score
            if block_size < width:  # past blocks have empty slots
                reads = reads & (place_at(kv, width) < block_size)
            return torch.where(reads, score, -float("inf"))

        def complete(b, h, q, kv):
            return kv <= own[b, q // width] * width + q % width

        mask_mod = own_tile_rule(MASK_TILE) if is_cuda else complete  # on a GPU only the own tile is partial
        mask = block_mask((MASK_TILE, MASK_TILE), mask_mod, (*lists, None, None, None, None), query.shape[2], key.shape[2])
        operands = query, key, value, score_mod, mask, scale
        out, aux = flex_attention(*operands, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    key = block_size, width, widths, dtype, scale, softcap, strides, stages
    return compile_on_gpu(moba_flex_dense_mask, key, is_cuda)
