"""The functions of other MoBA implementations, so that one import line changes.

    from moba_flex.compat import moba_attn_varlen, moba_attn_varlen_naive   # MoonshotAI/MoBA, the report's own
    from moba_flex.compat import flash_moba_varlen_func                     # FlashMoBA, mit-han-lab/flash-moba

Names, order, defaults and layouts of the arguments are theirs, and so is what they mean. They take what theirs do not: any device, float32,
grouped heads, widths that differ, any block size, empty sequences. What still differs is the choice among blocks whose scores are equal,
or equal but for rounding: see docs/how-to/migrate.md.

T tokens of all sequences one after another, H query heads, G key heads, D width, Dv width of the values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import validation
from .core.autocast import without_autocast
from .core.memo import memo_of_both
from .functional import moba_attention, moba_attention_varlen


def moba_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """MoonshotAI/MoBA's efficient function: causal MoBA of packed sequences.

    Args:
        q: `[T, H, D]`.
        k: `[T, G, D]`; H a multiple of G.
        v: `[T, G, Dv]`.
        cu_seqlens: `[n + 1]` int32, rising from 0 to T.
        max_seqlen: the longest sequence's length. It is not needed, and not looked at.
        moba_chunk_size: tokens per block.
        moba_topk: how many blocks a query reads, its own one included. With 1, a query reads every key up to itself, not its own block
            alone: the original leaves MoBA out when there is nothing to choose. `moba_attn_varlen_naive` does not.

    Returns:
        `[T, H, Dv]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: the arguments do not fit; the message says which, what it was and what it must be.

    >>> import torch
    >>> from moba_flex.compat import moba_attn_varlen
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 50], dtype=torch.int32)
    >>> moba_attn_varlen(x, x, x, bounds, 30, moba_chunk_size=8, moba_topk=2).shape
    torch.Size([50, 2, 16])
    """
    _check_blocks(moba_chunk_size, moba_topk)
    if moba_topk > 1:
        return _out(moba_attention_varlen(q, k, v, cu_seqlens, block_size=moba_chunk_size, top_k=moba_topk))
    validation.check_packed(q, k, v, cu_seqlens)
    return _dense_varlen(q, k, v, cu_seqlens)


def moba_attn_varlen_naive(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """MoonshotAI/MoBA's reference function, by a dense mask: causal MoBA of packed sequences.

    The same as `moba_attn_varlen`, but that `moba_topk=1` is the own block alone. Its memory grows with the square of a sequence's length.

    >>> import torch
    >>> from moba_flex.compat import moba_attn_varlen_naive
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 50], dtype=torch.int32)
    >>> moba_attn_varlen_naive(x, x, x, bounds, 30, moba_chunk_size=8, moba_topk=2).shape
    torch.Size([50, 2, 16])
    """
    _check_blocks(moba_chunk_size, moba_topk)
    return _out(moba_attention_varlen(q, k, v, cu_seqlens, block_size=moba_chunk_size, top_k=moba_topk, implementation="naive"))


def flash_moba_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    moba_chunk_size: int,
    moba_topk: int,
    causal: bool = True,
) -> Tensor:
    """FlashMoBA's function: MoBA of packed sequences, whose queries may be fewer or more than their keys.

    Args:
        q: `[T, H, D]`.
        k: `[Tk, G, D]`; H a multiple of G.
        v: `[Tk, G, Dv]`.
        cu_seqlens_q: `[n + 1]` int32, rising from 0 to T.
        cu_seqlens_k: `[n + 1]` int32, rising from 0 to Tk. With `causal=False`, sequences are worked through one by one where one of them
            has more queries than keys.
        max_seqlen_q, max_seqlen_k: the longest sequences' lengths. They are not needed, and not looked at.
        moba_chunk_size: tokens per block, counted from the sequence's first key.
        moba_topk: how many blocks a query reads, its own one included if `causal`. With 1 that is the own block alone.
        causal: a sequence's last query lies at its last key, and each sees the keys up to its own place; one that has no key there gets
            0. With False, each reads the best of all blocks, the last, partial one among them, and every key in those.

    Returns:
        `[T, H, Dv]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: the arguments do not fit; the message says which, what it was and what it must be.

    >>> import torch
    >>> from moba_flex.compat import flash_moba_varlen_func
    >>> q, k = torch.randn(4, 2, 16), torch.randn(50, 2, 16)
    >>> bounds_q, bounds_k = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 20, 50], dtype=torch.int32)
    >>> flash_moba_varlen_func(q, k, k, bounds_q, bounds_k, 3, 30, moba_chunk_size=8, moba_topk=2).shape
    torch.Size([4, 2, 16])
    """
    _check_blocks(moba_chunk_size, moba_topk)
    validation.check_flag("causal", causal)
    blocks: dict[str, Any] = {"block_size": moba_chunk_size, "top_k": moba_topk, "causal": causal}
    validation.check_packed_operands(q, k, v)
    validation.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[0])
    validation.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, k.shape[0])
    validation.check_same_count("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k", cu_seqlens_k)

    def compared() -> str:
        if torch.equal(cu_seqlens_q, cu_seqlens_k):
            return "as many keys"
        return "fewer keys" if bool((cu_seqlens_q.diff() > cu_seqlens_k.diff()).any()) else "more keys"

    found = "as many keys" if cu_seqlens_q is cu_seqlens_k else memo_of_both(cu_seqlens_q, cu_seqlens_k, "compared", compared)
    if found == "as many keys":
        return _out(moba_attention_varlen(q, k, v, cu_seqlens_q, **blocks))
    if found == "more keys":
        return _out(moba_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **blocks))
    if causal:
        more = (cu_seqlens_q.diff() - cu_seqlens_k.diff()).clamp(min=0)  # queries than keys
        return _without_blind_queries(q, k, v, cu_seqlens_q, cu_seqlens_k, more, **blocks)
    parts = [_one_sequence(*qkv, **blocks) for qkv in _sequences(q, cu_seqlens_q, k, v, cu_seqlens_k)]
    return torch.cat(parts)


def _out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output alone, which is all there is without `return_lse`."""
    assert isinstance(result, Tensor)
    return result


def _check_blocks(moba_chunk_size: int, moba_topk: int) -> None:
    validation.check_count("moba_chunk_size", moba_chunk_size, 1)
    validation.check_count("moba_topk", moba_topk, 1)


def _sequences(q: Tensor, cu_seqlens_q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
    """`q`, `k` and `v` of each sequence."""
    q_sizes, k_sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    return zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes))


def _without_blind_queries(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, blind: Tensor, **blocks: Any
) -> Tensor:
    """The first `blind [n]` queries of each sequence are before its first key, and get 0."""
    queries, first = cu_seqlens_q.diff(), cu_seqlens_q[:-1] + blind
    token = torch.arange(q.shape[0], device=q.device)
    sees = (token >= first.repeat_interleave(queries, output_size=q.shape[0])).nonzero()[:, 0]
    bounds = cu_seqlens_q - F.pad(blind.cumsum(0), (1, 0)).to(cu_seqlens_q.dtype)
    out = _out(moba_attention_varlen(q[sees], k, v, bounds, cu_seqlens_k=cu_seqlens_k, **blocks))
    return q.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, sees, out)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, **blocks: Any) -> Tensor:
    """`[Nq, H, D]`, `[Nk, G, D]`, `[Nk, G, Dv]` -> `[Nq, H, Dv]`, not causal: `moba_attention` takes as many queries as keys at a time."""
    n_key = k.shape[0]
    blind = 0 if n_key else q.shape[0]
    out = [q.new_zeros(blind, q.shape[1], v.shape[2])]
    for part in q[blind:].split(max(1, n_key)):
        part, key, value = (x.transpose(0, 1)[None] for x in (part, k, v))
        out.append(_out(moba_attention(part, key, value, **blocks))[0].transpose(0, 1))
    return torch.cat(out)


def _dense_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention to all keys of a token's own sequence."""
    out = [q.new_empty(0, q.shape[1], v.shape[2])]
    with without_autocast(q):
        for qkv in _sequences(q, cu_seqlens, k, v, cu_seqlens):
            query, key, value = (x.transpose(0, 1)[None] for x in qkv)
            out.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)
