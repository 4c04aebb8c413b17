"""Decoding in plain PyTorch: a few new tokens score the means of all blocks, then read only the blocks that they choose.

The means are stored next to the key cache. A block's mean is computed from the cached keys whenever the block's last token is written, and
does not change otherwise. Cropping a cache therefore needs no update: means beyond the crop are recomputed before they can be chosen.
Means of incomplete blocks are undefined, and never read.

B batch rows, H query heads, G key heads, R = H / G, N tokens of cache capacity, n new tokens, C blocks, P tokens per block (`block_size`),
K blocks read, D and Dv head dimensions, F selections per group (R, or 1 if its heads choose together), L readers (see `attend_to_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.settings import AttentionSettings
from .gate import best_blocks, means_of, some_are_equal, with_ties

MAX_DECODE_TOKENS = 32  # maximum number of new tokens for decoding: more are faster as a prefill
_TOKENS_AT_ONCE = 1 << 16  # tokens whose keys are copied to compute means
_ELEMENTS_AT_ONCE = 1 << 24  # elements of keys and values that are gathered

Take = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows `[L, 1]`, key heads `[L, 1]`, tokens `[L, T]` -> a copy of their keys `[L, T, D]`


@dataclass(frozen=True)
class KeyValueReader:
    """Accessors to keys and values, independent of their storage."""

    take_key: Take
    take_value: Take
    n_tokens: int  # an upper bound on token indices
    width: int  # elements of a key and a value together

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> KeyValueReader:
        """`key [B, G, N, D]`, `value [B, G, N, Dv]`."""
        return cls(partial(_take, key), partial(_take, value), key.shape[2], key.shape[3] + value.shape[3])


def mean_dtype(key: Tensor) -> torch.dtype:
    """At least float32. Computed without `torch.promote_types`, which is an operator call."""
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def means_for(key: Tensor, n_blocks: int) -> Tensor:
    """A zeroed buffer for the means of `n_blocks` blocks of `key [B, G, N, D]`: `[B, G, n_blocks, D]` in at least float32."""
    return key.new_zeros(*key.shape[:2], n_blocks, key.shape[3], dtype=mean_dtype(key))


def write_means(means: Tensor, key: Tensor, start: Tensor | None, block_size: int, first: int = 0, stop: int | None = None) -> Tensor:
    """Write the means of the blocks from `first` to before `stop` of `key [B, G, N, D]` into `means [B, G, C, D]`, and return them.

    `start [B]` is each row's first real token, from which its blocks are counted; None: 0 for all rows.
    """
    stop = min(key.shape[2] // block_size, means.shape[2] if stop is None else stop)
    step = max(1, _TOKENS_AT_ONCE // block_size) if start is not None else max(1, stop - first)
    for c in range(first, stop, step):
        end = min(c + step, stop)
        if start is None:
            part = key[:, :, c * block_size : end * block_size]
        else:  # a row that starts late has fewer blocks: the means computed for the others are never chosen
            token = (start[:, None] + torch.arange(c * block_size, end * block_size, device=key.device)).clamp(max=key.shape[2] - 1)
            part = key.gather(2, token[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        means[:, :, c:end] = means_of(part.unflatten(2, (end - c, block_size)), block_size)
    return means


def decode_plain(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """`moba_flex.decoding.decode` in plain PyTorch."""
    new, device = query.shape[2], query.device
    start = torch.zeros(query.shape[0], 1, dtype=torch.int64, device=device) if start is None else start[:, None]
    token = torch.arange(new, device=device) + ((key.shape[2] if length is None else length) - new)
    _complete(means, key, token - start, start, settings.block_size)
    return decode_blocks(query, KeyValueReader.of(key, value), means, token, start, settings)


def decode_blocks(
    query: Tensor, stored: KeyValueReader, means: Tensor, token: Tensor, start: Tensor, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """`decode_plain` for keys in any storage, all of whose means `[B, G, C, D]` are written.

    `query [B, H, n, D]` is at positions `token [n]` or `[B, n]` of rows that begin at `start [B, 1]`. The blocks of all rows, heads and
    tokens are gathered at once, or as many as `_ELEMENTS_AT_ONCE` allows.
    """
    groups = means.shape[1]
    position = token - start  # [B, n], below 0 for padding
    by_group = query.unflatten(1, (groups, -1)).to(means.dtype)  # [B, G, R, n, D]
    blocks = blocks_to_read(by_group, means, position, settings)  # [B, G, F, n, K]
    out, lse = attend_to_blocks(by_group, stored, blocks, start, token, settings)
    return out.to(query.dtype), lse


def attend_to_blocks(
    query: Tensor, stored: KeyValueReader, blocks: Tensor, start: Tensor, token: Tensor, settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Causal attention of `query [B, G, R, n, D]` to the stored `blocks [B, G, F, n, K]`; -1 means no block.

    `start [B, 1]` is the token at which each row's blocks begin, `token [n]` or `[B, n]` that of each query. Returns `[B, H, n, Dv]` in
    the query's dtype, and the log-sum-exp `[B, H, n]`.
    """
    groups, device = query.shape[1], query.device
    token = token.expand(query.shape[0], -1)
    together = query.unflatten(2, (blocks.shape[2], -1)).movedim(3, 4)  # [B, G, F, n, R / F, D]

    # From here on, a reader is one token of the heads that read the same blocks: [B * G * F * n].
    shape, each = together.shape, torch.arange(blocks[..., 0].numel(), device=device)
    group = each // (shape[2] * shape[3])
    row, group, last = group // groups, group % groups, each % shape[3]
    at_once = max(1, _ELEMENTS_AT_ONCE // (blocks.shape[-1] * settings.block_size * stored.width))
    parts = zip(*(x.split(at_once) for x in (together.flatten(0, 3), blocks.flatten(0, 3), row, group, token[row, last])))
    out, lse = zip(*(_attend(q, stored, chosen, b, g, start[b], t, settings) for q, chosen, b, g, t in parts))
    # `flatten` may return a view that is not contiguous, for example with one key head.
    whole, total = (torch.cat(x).view(*shape[:-1], *x[0].shape[2:]).movedim(4, 3).flatten(1, 3).contiguous() for x in (out, lse))
    return whole, total


def _attend(
    query: Tensor,
    stored: KeyValueReader,
    blocks: Tensor,
    row: Tensor,
    group: Tensor,
    start: Tensor,
    token: Tensor,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor]:
    """Readers `[L, M, D]`, each of M heads at `token [L]`, attend to their `blocks [L, K]`: `[L, M, Dv]` and lse `[L, M]`."""
    offset = torch.arange(min(settings.block_size, stored.n_tokens), device=query.device)
    at = (start + blocks * settings.block_size)[..., None] + offset  # [L, K, P]
    seen = ((blocks >= 0)[..., None] & (at <= token[:, None, None])).flatten(1)  # [L, K * P]
    at = at.flatten(1).clamp(0, stored.n_tokens - 1)
    k, v = (take(row[:, None], group[:, None], at).to(query.dtype) for take in (stored.take_key, stored.take_value))
    score = settings.cap_(query @ k.mT * settings.scale).masked_fill_(~seen[:, None], -torch.inf)
    some = seen.any(-1)[:, None]
    score.masked_fill_(~some[..., None], 0)
    out = score.softmax(-1) @ v.masked_fill_(~seen[..., None], 0)  # `exp(score - lse)` has the rounding of `lse`, large for large scores
    return torch.where(some[..., None], out, 0), torch.where(some, score.logsumexp(-1), -torch.inf)


def _take(x: Tensor, row: Tensor, group: Tensor, at: Tensor) -> Tensor:
    """A copy of `x [B, G, N, D]` at tokens `[L, T]`: `[L, T, D]`."""
    if not x.is_contiguous():
        return x[row, group, at]
    return x.view(-1, x.shape[3]).index_select(0, ((row * x.shape[1] + group) * x.shape[2] + at).flatten()).view(*at.shape, -1)


def _complete(means: Tensor, key: Tensor, position: Tensor, start: Tensor, block_size: int) -> None:
    """Write the means of the blocks whose last token is among the new ones, at `position [B, n]` from their row's `start [B, 1]`."""
    row, last = ((position >= 0) & (position % block_size == block_size - 1)).nonzero(as_tuple=True)
    block = position[row, last] // block_size
    token = start[row] + block[:, None] * block_size + torch.arange(block_size, device=key.device)
    means[row, :, block] = means_of(key[row[:, None], :, token].transpose(1, 2), block_size)


def blocks_to_read(query: Tensor, means: Tensor, position: Tensor, settings: AttentionSettings) -> Tensor:
    """`[B, G, R, n, D]`, `[B, G, C, D]`, `[B, n]` -> the blocks to read `[B, G, F, n, K]` int64, padded with -1."""
    own = position.div(settings.block_size, rounding_mode="floor")[:, None, None, :, None]  # [B, 1, 1, n, 1]
    if settings.share_selection:  # the sum of scores is the score of the sum
        query = query.sum(2, keepdim=True)
    sink = torch.arange(settings.sink_blocks, device=own.device)
    recent = own - 1 - torch.arange(settings.recent_blocks, device=own.device)
    parts = [torch.where(sink < own, sink, -1), torch.where(recent >= settings.sink_blocks, recent, -1), own.clamp(min=-1)]
    parts = [x.expand(*query.shape[:4], -1) for x in parts]
    if free := min(settings.n_free, means.shape[2]):
        block = torch.arange(means.shape[2], device=own.device)
        candidate = (block >= settings.sink_blocks) & (block < own - settings.recent_blocks)
        score = query.flatten(2, 3) @ means.mT
        if some_are_equal(means, block < position.amax(1, keepdim=True) // settings.block_size):
            score = with_ties(score, means)
        score = score.view(*query.shape[:4], -1)
        parts.append(best_blocks(score, candidate, free, finite=False).long())
    return torch.cat(parts, -1)
