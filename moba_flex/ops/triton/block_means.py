"""Means of key blocks in one kernel, and their half-precision parts, which tensor cores multiply with half-precision queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import BlockLayout
from .sizes import next_power_of_2


@triton.constexpr_function
def rest_scale(dtype) -> float:
    """A power of 2 that scales what `high` and `low` leave of a mean into the range of `dtype`: float16 has few values below 1e-7."""
    return 2.0**23 if dtype == tl.float16 else 1.0


@triton.jit
def norm(x, axis: tl.constexpr, width: tl.constexpr):
    # An upper bound on the Euclidean norm: sums are rounded, and squares below 2^-126 may be 0.
    return tl.sqrt(1.001 * tl.sum(x * x, axis) + width * 1.2e-38)


@triton.jit
def _means_kernel(
    KEY,
    MEAN,
    HIGH,
    LOW,
    REST,
    ERROR,
    COUNT,
    TOKEN,
    stride_b,
    stride_g,
    stride_n,
    G,
    C,
    D: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    # One program: the mean of one block's keys.
    c, bg = tl.program_id(0), tl.program_id(1)
    b, g = bg // G, bg % G
    d, slot = tl.arange(0, DP), tl.arange(0, STEP)
    keys = tl.load(COUNT + b * C + c)
    first = tl.load(TOKEN + b * C + c).to(tl.int64)
    base = KEY + b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g + first * stride_n
    total = tl.zeros([STEP, DP], tl.float32)
    for start in range(0, keys, STEP):
        at = (start + slot).to(tl.int64)
        x = tl.load(base + at[:, None] * stride_n + d[None, :], mask=(at[:, None] < keys) & (d[None, :] < D), other=0.0)
        total += x.to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(keys, 1)
    block = bg.to(tl.int64) * C + c
    out, mask = block * D + d, d < D
    tl.store(MEAN + out, mean, mask=mask)
    if HIGH is not None:
        high = mean.to(HIGH.dtype.element_ty)
        rest = mean - high.to(tl.float32)
        low = rest.to(LOW.dtype.element_ty)
        rest -= low.to(tl.float32)
        tl.store(HIGH + out, high, mask=mask)
        tl.store(LOW + out, low, mask=mask)
        tl.store(REST + out, (rest * rest_scale(REST.dtype.element_ty)).to(REST.dtype.element_ty), mask=mask)
        error = norm(rest, 0, DP)
        tl.store(ERROR + block, tl.where(error < float("inf"), error, float("inf")))  # NaN is not a bound


@dataclass(frozen=True)
class BlockMeans:
    """The mean of each block's real keys, `[B, G, C, D]`, and its parts for half-precision queries; None for float32.

    `high`, `low` and `rest` are in the query's dtype and add up to `mean`; `rest` is multiplied by `rest_scale`. `error [B, G, C]` is an
    upper bound on the Euclidean norm of `mean - high - low`.
    """

    mean: Tensor
    high: Tensor | None = None
    low: Tensor | None = None
    rest: Tensor | None = None
    error: Tensor | None = None


def block_means(key: Tensor, layout: BlockLayout, dtype: torch.dtype) -> BlockMeans:
    """The means of keys `[B, G, Nk, D]`, for queries of `dtype`."""
    rows, groups, _, width = key.shape
    means = BlockMeans(key.new_empty(rows, groups, layout.n_key_blocks, width, dtype=torch.float32))
    if dtype != torch.float32:
        high, low, rest = (torch.empty_like(means.mean, dtype=dtype) for _ in range(3))
        means = BlockMeans(means.mean, high, low, rest, means.mean.new_empty(rows, groups, layout.n_key_blocks))
    padded = next_power_of_2(width)
    _means_kernel[(layout.n_key_blocks, rows * groups)](
        key,
        means.mean,
        means.high,
        means.low,
        means.rest,
        means.error,
        layout.block_keys,
        layout.key_token,
        *key.stride()[:3],
        groups,
        layout.n_key_blocks,
        width,
        padded,
        min(next_power_of_2(layout.block_size), 64, max(1, 16384 // padded)),  # more would not fit into registers
    )
    return means
