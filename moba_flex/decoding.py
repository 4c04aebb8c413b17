"""Decoding: a few new tokens read the means of all blocks, and then only the blocks that they choose.

The means are kept beside the key cache. A block's mean is computed when its last token is written, from the keys that the cache then
holds, and never changed by anything but another token written into the block. So cutting a cache back needs no care: what lies beyond
the cut is computed again before it can be chosen. Means of blocks that are not complete are not defined, and never read.

B rows, H query heads, G key heads, R = H / G, N tokens the cache has room for, n new tokens, C blocks, P tokens a block (`block_size`),
K blocks read, D width. F: how many heads of a group choose for themselves, R, or 1 if they choose together. L readers: see `decode_plain`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .core.autocast import without_autocast
from .core.chunking import launches
from .core.settings import AttentionSettings
from .ops.gate import best_blocks

try:
    from .ops import triton as kernels
except ImportError:  # no Triton, so no CUDA either
    kernels = None

FEW = 32  # new tokens that are decoding: more of them are faster as a prefill
_TOKENS_AT_ONCE = 1 << 16  # whose keys are copied to compute means
_NUMBERS_AT_ONCE = 1 << 24  # of keys and values that are copied to be read


def mean_dtype(key: Tensor) -> torch.dtype:
    """float32 at least. That is not asked of PyTorch, to which it is a call of an operator."""
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def means_for(key: Tensor, n_blocks: int) -> Tensor:
    """A place for the means of `n_blocks` blocks of `key [B, G, N, D]`: `[B, G, n_blocks, D]` in float32 at least."""
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
        else:  # a row that starts late has fewer blocks: what is read in place of the others is never chosen
            token = (start[:, None] + torch.arange(c * block_size, end * block_size, device=key.device)).clamp(max=key.shape[2] - 1)
            part = key.gather(2, token[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        means[:, :, c:end] = part.unflatten(2, (end - c, block_size)).mean(3, dtype=means.dtype)
    return means


@torch.library.custom_op("moba_flex::decode", mutates_args=("means",))
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    length: Tensor | None,
    start: Tensor | None,
    block_size: int,
    top_k: int,
    sink_blocks: int,
    recent_blocks: int,
    share_selection: bool,
    scale: float,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """`moba_attention` of the last tokens of a cache, whose keys and values are written, and whose means want no more than theirs.

    Args:
        query: `[B, H, n, D]`, the last n of the tokens.
        key: `[B, G, N, D]`, all tokens, and behind them whatever the cache has room for.
        value: `[B, G, N, Dv]`.
        means: `[B, G, C, D]`; those of the blocks that the new tokens complete are written.
        length: int64 of no dimension, how many tokens there are with the new ones; None: N. Never read by the host.
        start: `[B]` int64, each row's first real token; None: 0.
        implementation: "flex" stands for Triton kernels, "eager" for plain PyTorch; they mean the same.

    Returns:
        `[B, H, n, Dv]` in the query's dtype and the log-sum-exp `[B, H, n]`; 0 and -inf for a query before its row's start.
    """
    spec = AttentionSettings(block_size, top_k, sink_blocks, recent_blocks, True, scale, softcap, share_selection)
    with without_autocast(query), torch.cuda.device_of(query):
        if implementation == "flex":
            return _by_rows(query, key, value, means, length, start, spec)
        return decode_plain(query, key, value, means, length, start, spec)


@decode.register_fake
def _(query, key, value, means, *_):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3], dtype=wide)


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, spec: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """The kernels, on as many rows at a time as one launch serves."""
    some = launches(query.shape[0], query.shape[1] * query.shape[2])
    if len(some) == 1:
        return kernels.decode(query, key, value, means, length, start, spec)
    tensors = ([x[rows] for x in (query, key, value, means)] for rows in some)
    starts = (None if start is None else start[rows] for rows in some)
    out, lse = zip(*(kernels.decode(*of_rows, length, first, spec) for of_rows, first in zip(tensors, starts)))
    return torch.cat(out), torch.cat(lse)


def decode_plain(
    query: Tensor, key: Tensor, value: Tensor, means: Tensor, length: Tensor | None, start: Tensor | None, spec: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """`decode` in plain PyTorch. The blocks of all rows, heads and tokens are gathered at once, or as many as `_NUMBERS_AT_ONCE` allows."""
    groups, new, device = key.shape[1], query.shape[2], query.device
    start = torch.zeros(query.shape[0], 1, dtype=torch.int64, device=device) if start is None else start[:, None]
    token = torch.arange(new, device=device) + ((key.shape[2] if length is None else length) - new)
    position = token - start  # [B, n], below 0 for padding
    _complete(means, key, position, start, spec.block_size)
    by_group = query.unflatten(1, (groups, -1)).to(means.dtype)  # [B, G, R, n, D]
    blocks = _blocks_to_read(by_group, means, position, spec)  # [B, G, F, n, K]
    together = by_group.unflatten(2, (blocks.shape[2], -1)).movedim(3, 4)  # [B, G, F, n, R / F, D]

    # From here on a reader is a token of heads that read together, [B * G * F * n], wherever it belongs.
    shape, each = together.shape, torch.arange(blocks[..., 0].numel(), device=device)
    group = each // (shape[2] * shape[3])
    row, group, last = group // groups, group % groups, each % shape[3]
    at_once = max(1, _NUMBERS_AT_ONCE // (blocks.shape[-1] * spec.block_size * (key.shape[-1] + value.shape[-1])))
    parts = zip(*(x.split(at_once) for x in (together.flatten(0, 3), blocks.flatten(0, 3), row, group, token[last])))
    out, lse = zip(*(_attend(q, key, value, chosen, b, g, start[b], t, spec) for q, chosen, b, g, t in parts))
    out = torch.cat(out).view(*shape[:-1], -1).movedim(4, 3).flatten(1, 3)
    return out.to(query.dtype), torch.cat(lse).view(shape[:-1]).movedim(4, 3).flatten(1, 3)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    row: Tensor,
    group: Tensor,
    start: Tensor,
    token: Tensor,
    spec: AttentionSettings,
) -> tuple[Tensor, Tensor]:
    """Readers `[L, M, D]`, each of M heads at `token [L]`, attend to their `blocks [L, K]`: `[L, M, Dv]` and `[L, M]`."""
    offset = torch.arange(min(spec.block_size, key.shape[2]), device=key.device)
    at = (start + blocks * spec.block_size)[..., None] + offset  # [L, K, P]
    seen = ((blocks >= 0)[..., None] & (at <= token[:, None, None])).flatten(1)  # [L, K * P]
    at = at.flatten(1).clamp(0, key.shape[2] - 1)
    k, v = (_take(x, row[:, None], group[:, None], at).to(query.dtype) for x in (key, value))
    score = query @ k.mT * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    score = score.masked_fill(~seen[:, None], -torch.inf)
    some = seen.any(-1)[:, None]
    lse = score.masked_fill(~some[..., None], 0).logsumexp(-1)
    out = torch.exp(score - lse[..., None]) @ v.masked_fill_(~seen[..., None], 0)
    return torch.where(some[..., None], out, 0), torch.where(some, lse, -torch.inf)


def _take(x: Tensor, row: Tensor, group: Tensor, at: Tensor) -> Tensor:
    """A copy of `x [B, G, N, D]` at tokens `[L, T]`: `[L, T, D]`."""
    if not x.is_contiguous():
        return x[row, group, at]
    return x.view(-1, x.shape[3]).index_select(0, ((row * x.shape[1] + group) * x.shape[2] + at).flatten()).view(*at.shape, -1)


def _complete(means: Tensor, key: Tensor, position: Tensor, start: Tensor, block_size: int) -> None:
    """Write the means of the blocks whose last token is among the new ones, at `position [B, n]` in rows from `start [B, 1]`."""
    row, last = ((position >= 0) & (position % block_size == block_size - 1)).nonzero(as_tuple=True)
    block = position[row, last] // block_size
    token = start[row] + block[:, None] * block_size + torch.arange(block_size, device=key.device)
    means[row, :, block] = key[row[:, None], :, token].mean(1, dtype=means.dtype)


def _blocks_to_read(query: Tensor, means: Tensor, position: Tensor, spec: AttentionSettings) -> Tensor:
    """`[B, G, R, n, D]`, `[B, G, C, D]`, `[B, n]` -> `[B, G, F, n, K]` int64, -1 where there are fewer."""
    own = position.div(spec.block_size, rounding_mode="floor")[:, None, None, :, None]  # [B, 1, 1, n, 1]
    if spec.share_selection:  # the sum of scores is the score of the sum
        query = query.sum(2, keepdim=True)
    sink = torch.arange(spec.sink_blocks, device=own.device)
    recent = own - 1 - torch.arange(spec.recent_blocks, device=own.device)
    parts = [torch.where(sink < own, sink, -1), torch.where(recent >= spec.sink_blocks, recent, -1), own.clamp(min=-1)]
    parts = [x.expand(*query.shape[:4], -1) for x in parts]
    if free := min(spec.routed - spec.sink_blocks - spec.recent_blocks, means.shape[2]):
        block = torch.arange(means.shape[2], device=own.device)
        candidate = (block >= spec.sink_blocks) & (block < own - spec.recent_blocks)
        score = (query.flatten(2, 3) @ means.mT).view(*query.shape[:4], -1)
        parts.append(best_blocks(score, candidate, free, finite=False).long())
    return torch.cat(parts, -1)
