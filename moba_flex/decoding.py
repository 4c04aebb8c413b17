"""The operator for decoding: a few new tokens read the means of all blocks, and then only the blocks that they choose.

`ops/decoding.py` says how it works, and what block means are. Keys that a server keeps in pages have no operator, as its batches are
neither differentiated nor compiled.

B rows, H query heads, G key heads, N tokens the cache has room for, n new tokens, C blocks, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .core.autocast import without_autocast
from .core.chunking import launches
from .core.dtypes import wide
from .core.settings import AttentionSettings
from .core.validation import CUDA_IMPLEMENTATIONS
from .ops import kernels
from .ops import pages as plain
from .ops.decoding import decode_plain
from .ops.pages import Pages


def decode(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """`moba_attention` of the last tokens of a cache: keys and values are written, and the means of all blocks but those that end in them.

    Args:
        query: `[B, H, n, D]`, the last n of the tokens.
        key: `[B, G, N, D]`, all tokens, and behind them whatever the cache has room for.
        value: `[B, G, N, Dv]`.
        means: `[B, G, C, D]`; those of the blocks that the new tokens complete are written.
        length: int64 of no dimension, how many tokens there are with the new ones; None: N. Never read by the host.
        start: `[B]` int64, each row's first real token; None: 0.
        settings: "flex" stands for Triton kernels, "eager" for plain PyTorch; they mean the same.

    Returns:
        `[B, H, n, Dv]` in the query's dtype and the log-sum-exp `[B, H, n]`; 0 and -inf for a query before its row's start.
    """
    return decode_operator(query, key, value, means, length, start, *settings.to_arguments())


@torch.library.custom_op("moba_flex::decode", mutates_args=("means",))
def decode_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    length: Tensor | None,
    start: Tensor | None,
    sizes: Sequence[int],
    causal: bool,
    share_selection: bool,
    scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """`decode` for PyTorch, which knows no settings objects."""
    settings = AttentionSettings.from_arguments(sizes, causal, share_selection, scale, softcap, implementation)
    with without_autocast(query), torch.cuda.device_of(query):
        if settings.implementation in CUDA_IMPLEMENTATIONS:
            return _launched_by_rows(query, key, value, means, length, start, settings)
        return decode_plain(query, key, value, means, length, start, settings)


@decode_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, means: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3], dtype=wide(query.dtype))


def _launched_by_rows(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """The kernels, on as many rows at a time as one launch serves."""
    some = launches(query.shape[0], query.shape[1] * query.shape[2])
    if len(some) == 1:
        return kernels.decode(query, key, value, means, length, start, settings)
    tensors = ((query[rows], key[rows], value[rows], means[rows]) for rows in some)
    starts = (None if start is None else start[rows] for rows in some)
    out, lse = zip(*(kernels.decode(*of_rows, length, first, settings) for of_rows, first in zip(tensors, starts)))
    return torch.cat(out), torch.cat(lse)


def decode_pages(query: Tensor, pages: Pages, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`decode` of keys in pages, whose means are written already. The Triton kernels give no gradients.

    Args:
        query: `[B, H, n, D]`, the last n tokens of each row.
        pages: the keys, values and means of all rows.
        settings: "flex" stands for Triton kernels, "eager" for plain PyTorch; they mean the same.

    Returns:
        `[B, H, n, Dv]` in the query's dtype and the log-sum-exp `[B, H, n]`.
    """
    with without_autocast(query), torch.cuda.device_of(query):
        if settings.implementation not in CUDA_IMPLEMENTATIONS:
            return plain.decode_pages(query, pages, settings)
        some = launches(query.shape[0], query.shape[1] * query.shape[2])
        out, lse = zip(*(kernels.decode_pages(query[rows], pages.rows(rows), settings) for rows in some))
        return (out[0], lse[0]) if len(some) == 1 else (torch.cat(out), torch.cat(lse))
