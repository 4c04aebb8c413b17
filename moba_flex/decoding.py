"""The operator for decoding: a few new tokens score the means of all blocks, then read only the blocks that they choose.

`ops/decoding.py` explains the algorithm and the block means. Decoding with a paged cache is not an operator, since a server's batches are
neither differentiated nor compiled.

B batch, H query heads, G key heads, N tokens of cache capacity, n new tokens, C blocks, D and Dv head dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .core.autocast import without_autocast
from .core.chunking import launches
from .core.dtypes import accumulation_dtype
from .core.settings import AttentionSettings
from .core.validation import CUDA_IMPLEMENTATIONS
from .ops import kernels
from .ops import pages as plain
from .ops.decoding import decode_plain
from .ops.pages import Pages


def decode(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """`moba_attention` for the last tokens of a cache, which already holds their keys and values and the means of earlier complete blocks.

    Args:
        query: `[B, H, n, D]`, the last n tokens.
        key: `[B, G, N, D]`, the whole cache; entries after the last token are ignored.
        value: `[B, G, N, Dv]`.
        means: `[B, G, C, D]`; the means of blocks that the new tokens complete are written in place.
        length: 0-dimensional int64, the number of tokens including the new ones; None means N. It is never read on the host.
        start: `[B]` int64, each row's first real token; None means 0.
        settings: "flex" and "triton" run Triton kernels, other implementations plain PyTorch; both have the same semantics.

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
    """`decode` as a PyTorch operator, whose schema cannot contain a settings object."""
    settings = AttentionSettings.from_arguments(sizes, causal, share_selection, scale, softcap, implementation)
    with without_autocast(query), torch.cuda.device_of(query):
        if settings.implementation in CUDA_IMPLEMENTATIONS:
            return _launched_by_rows(query, key, value, means, length, start, settings)
        return decode_plain(query, key, value, means, length, start, settings)


@decode_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, means: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


def _launched_by_rows(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Launches the kernels on as many batch rows at a time as one launch supports."""
    some = launches(query.shape[0], query.shape[1] * query.shape[2])
    if len(some) == 1:
        return kernels.decode(query, key, value, means, length, start, settings)
    tensors = ((query[rows], key[rows], value[rows], means[rows]) for rows in some)
    starts = (None if start is None else start[rows] for rows in some)
    out, lse = zip(*(kernels.decode(*of_rows, length, first, settings) for of_rows, first in zip(tensors, starts)))
    return torch.cat(out), torch.cat(lse)


def decode_pages(query: Tensor, pages: Pages, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """`decode` with a paged cache, whose means are already written. The Triton kernels have no gradients.

    Args:
        query: `[B, H, n, D]`, the last n tokens of each row.
        pages: the keys, values and means of all rows.
        settings: "flex" and "triton" run Triton kernels, other implementations plain PyTorch; both have the same semantics.

    Returns:
        `[B, H, n, Dv]` in the query's dtype and the log-sum-exp `[B, H, n]`.
    """
    with without_autocast(query), torch.cuda.device_of(query):
        if settings.implementation not in CUDA_IMPLEMENTATIONS:
            return plain.decode_pages(query, pages, settings)
        some = launches(query.shape[0], query.shape[1] * query.shape[2])
        out, lse = zip(*(kernels.decode_pages(query[rows], pages.rows(rows), settings) for rows in some))
        return (out[0], lse[0]) if len(some) == 1 else (torch.cat(out), torch.cat(lse))
