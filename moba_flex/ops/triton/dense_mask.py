"""The forward pass of few blocks in one kernel, without routing: every query computes all past blocks, and hides those it did not choose.

Hidden keys take as much time as others. But no row is gathered, written and merged, which takes longer while there are few blocks. The
loop over keys is that of FlashAttention-2. Bit `c` of a query says whether it reads block `c`. A tile of keys is part of one block, so
that a query reads all of it or nothing: instead of its scores, only the maximum that is subtracted from them depends on the bit.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, M queries per program
and keys per iteration, D and Dv head dimensions; Nq queries and Nk keys, tokens or slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.chunking import MASK_TILE
from ...core.layout import BlockLayout
from ...core.settings import AttentionSettings
from ...core.strides import empty_with_strides_of
from .backward import dot_precision
from .block_programs import base2_scores, columns
from .sizes import cdiv, gpu_memory, padded_width

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tokens(pointer, step, first, m, real, d, D: tl.constexpr, DP: tl.constexpr):
    # The tokens `first + m`, [M, DP]: all of them if `real` is None. Offsets within a tile are 32-bit: 64-bit ones spill registers.
    pointers = (pointer + tl.cast(first, tl.int64) * step) + ((m * step)[:, None] + d[None, :])
    if real is not None:
        return tl.load(pointers, mask=columns(real, d, D, DP), other=0.0)
    elif D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _add(weight, v, most, new, total, out, PRECISION: tl.constexpr):
    # The sums of weights and of weighted values, whose maximum score was `most` and is `new`.
    fade = tl.exp2(most - new)
    total = total * fade + tl.sum(weight, 1)
    return total, tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)


@triton.jit(do_not_specialize=["N_TOKENS", "C", "Q"])
def _dense_mask_kernel(
    QUERY, KEY, VALUE, CHOSEN, OWN, FIRST, QUERY_START, QUERY_STOP, QUERY_TOKEN, KEY_TOKEN, OUT, LSE,
    query_b, query_h, query_n, key_b, key_g, key_n, value_b, value_g, value_n, out_b, out_h, out_n,
    scale, softcap, H, C, Q, N_TOKENS,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, REPEATS: tl.constexpr, S: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    # One program: M queries of one head. Programs with many keys start first.
    bh, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = bh // H, bh % H
    place = b * Q + tile * M // P
    begin = tile * M % P
    start, stop, own = tl.load(QUERY_START + place), tl.load(QUERY_STOP + place), tl.load(OWN + place)
    if (begin >= stop) | (begin + M <= start) | (start >= stop):
        return
    m, d, dv = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP)
    slot = begin + m
    real = (slot >= start) & (slot < stop)
    chosen = CHOSEN + (bh.to(tl.int64) * Q * P + tile * M + m) * S
    reads = tl.zeros([M], tl.int64)
    for s in tl.static_range(S):
        block = tl.load(chosen + s, mask=real, other=-1)
        reads |= tl.where(block >= 0, tl.full([M], 1, tl.int64) << tl.maximum(block, 0), 0)

    token = tl.load(QUERY_TOKEN + place)
    q = QUERY + b.to(tl.int64) * query_b + h.to(tl.int64) * query_h
    q = _tokens(q, query_n, token + begin, m, real, d, D, DP)
    g, key = (h // REPEATS).to(tl.int64), tl.load(KEY_TOKEN + b * C + own).to(tl.int64)
    keys = KEY + b.to(tl.int64) * key_b + g * key_g + key * key_n
    values = VALUE + b.to(tl.int64) * value_b + g * value_g + key * value_n

    most, total, out = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DVP], tl.float32)
    for i in tl.range(0, begin + M, M, num_stages=STAGES):  # keys of the own block
        j = i + m
        k, v = _tokens(keys, key_n, i, m, j < stop, d, D, DP), _tokens(values, value_n, i, m, j < stop, dv, DV, DVP)
        score = tl.where(j[None, :] <= slot[:, None], base2_scores(q, k, scale, softcap, CAPPED, PRECISION), float("-inf"))
        new = tl.maximum(most, tl.max(score, 1))
        new = tl.where(new == float("-inf"), 0.0, new)  # all scores are -inf
        total, out = _add(tl.exp2(score - new[:, None]), v, most, new, total, out, PRECISION)
        most = new
    # The past blocks of a sequence are complete, and precede its own block.
    first = tl.load(FIRST + place)
    keys -= ((own - first) * P).to(tl.int64) * key_n
    values -= ((own - first) * P).to(tl.int64) * value_n
    for i in tl.range(0, (own - first) * P, M, num_stages=STAGES):
        k = _tokens(keys, key_n, i, m, None, d, D, DP)
        score = base2_scores(q, k, scale, softcap, CAPPED, PRECISION)
        here = ((reads >> (first + i // P)) & 1) > 0
        new = tl.where(here, tl.maximum(most, tl.max(score, 1)), most)
        weight = tl.exp2(score - tl.where(here, new, float("inf"))[:, None])
        v = _tokens(values, value_n, i, m, None, dv, DV, DVP)
        total, out = _add(weight, v, most, new, total, out, PRECISION)
        most = new

    n = (token + slot).to(tl.int64)
    to = OUT + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h + n * out_n
    out *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    tl.store(to[:, None] + dv[None, :], out.to(OUT.dtype.element_ty), mask=columns(real, dv, DV, DVP))
    tl.store(LSE + bh.to(tl.int64) * N_TOKENS + n, (most + tl.log2(total)) * _LN2, mask=real)


def dense_mask_forward(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, layout: BlockLayout, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Causal attention to the own and the chosen blocks: output `[B, H, Nq, Dv]` and log-sum-exp, float32 `[B, H, Nq]`.

    `query [B, H, Nq, D]`, `key [B, G, Nk, D]`, `value [B, G, Nk, Dv]`: any strides, last dimension contiguous. `chosen` is int32
    `[B, H, Q * P, S]`. Blocks are multiples of `MASK_TILE` tokens, at most 64 per row. Memory between the tokens of `layout` is not read.
    """
    (rows, heads, n_tokens, width), value_width = query.shape, value.shape[-1]
    query, key, value = (within_reach(x) for x in (query, key, value))
    out, lse = empty_with_strides_of(query, n_tokens, value_width), query.new_empty(query.shape[:3], dtype=torch.float32)
    if not layout.covers:
        out.zero_()
        lse.fill_(-torch.inf)
    padded, value_padded = padded_width(width), padded_width(value_width)
    stages = pipeline_stages((width, value_width), query.element_size(), query.device)
    strides = [s for x in (query, key, value, out) for s in x.stride()[:3]]
    _dense_mask_kernel[(rows * heads, layout.n_query_blocks * layout.width // MASK_TILE)](
        query, key, value, chosen, layout.own, layout.first, layout.query_start, layout.query_stop, layout.query_token, layout.key_token,
        out, lse, *strides, settings.scale, settings.softcap or 0.0, heads, layout.n_key_blocks, layout.n_query_blocks, n_tokens,
        CAPPED=settings.softcap is not None, PRECISION=dot_precision(query.dtype), REPEATS=heads // key.shape[1], S=chosen.shape[-1],
        P=layout.width, M=MASK_TILE, STAGES=stages, D=width, DP=padded, DV=value_width, DVP=value_padded, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["N", "Q"])
def _block_bits_kernel(CHOSEN, OWN, BITS, N, H, Q, P: tl.constexpr, S: tl.constexpr, M: tl.constexpr):
    # One program: M query slots.
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here, one = i < N, tl.full([M], 1, tl.int32)
    bits = one << tl.load(OWN + i // P // Q // H * Q + i // P % Q, mask=here, other=0)
    for s in tl.static_range(S):
        block = tl.load(CHOSEN + i * S + s, mask=here, other=-1)
        bits |= tl.where(block >= 0, one << tl.maximum(block, 0), 0)
    tl.store(BITS + i, bits, mask=here)


def block_bits(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """See `moba_flex.ops.dense_mask.block_bits`."""
    bits, step = chosen.new_empty(chosen.shape[:3]), 256
    shape = chosen.shape[1], layout.n_query_blocks, layout.width, chosen.shape[3]
    _block_bits_kernel[(cdiv(bits.numel(), step),)](chosen, layout.own, bits, bits.numel(), *shape, step, num_warps=4)
    return bits


def within_reach(x: Tensor) -> Tensor:
    """`x [B, H, N, D]`, copied if the offsets of a tile's tokens need more than 32 bits."""
    return x if x.stride(2) * MASK_TILE < 1 << 31 else x.contiguous()


def pipeline_stages(widths: tuple[int, int], size: int, device: torch.device) -> int:
    """Pipeline stages of a program with tiles of `MASK_TILE`, for head dimensions `widths` and elements of `size` bytes.

    With three stages, two programs share a multiprocessor of a Hopper GPU (head dimension 128), and with two, one of an A100.
    """
    width, value_width = map(padded_width, widths)
    shared = MASK_TILE * size * (width + 3 * (width + value_width))
    return 3 if 2 * shared <= gpu_memory(device)[0] else 2
