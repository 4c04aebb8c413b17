"""Drop-in replacements for the functions of other MoBA implementations: only the import line changes.

    from moba_flex.compat import moba_attn_varlen, moba_attn_varlen_naive   # MoonshotAI/MoBA, the report's own
    from moba_flex.compat import flash_moba_varlen_func                     # FlashMoBA, mit-han-lab/flash-moba

Names, order, defaults, layouts and meaning of the arguments are those of the originals. In addition, any device, float32, grouped query
heads, values with their own head dimension, any block size and empty sequences are supported. The choice among blocks whose scores are
equal, or equal up to rounding, may differ: see docs/how-to/migrate.md.

T tokens of all sequences, concatenated, Tk keys, H query heads, G key heads, D and Dv head dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import validation
from .core.autocast import without_autocast
from .core.hidden import some_not_finite
from .core.memo import memo_of_both
from .core.strides import aligned
from .functional import moba_attention, moba_attention_varlen

NAMES = ("q", "k", "v")


def moba_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """MoonshotAI/MoBA's efficient function: causal MoBA for packed sequences.

    Args:
        q: `[T, H, D]`.
        k: `[T, G, D]`; H a multiple of G.
        v: `[T, G, Dv]`.
        cu_seqlens: `[n + 1]` int32, cumulative lengths from 0 to T.
        max_seqlen: the maximum sequence length; ignored.
        moba_chunk_size: tokens per block.
        moba_topk: number of blocks that a query reads, its own block included. With 1, a query reads all keys up to itself, not only its
            own block: the original skips MoBA if there is nothing to choose. `moba_attn_varlen_naive` reads only the own block.

    Returns:
        `[T, H, Dv]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: an argument is invalid; the message says which, what it was and what it must be.

    >>> import torch
    >>> from moba_flex.compat import moba_attn_varlen
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 50], dtype=torch.int32)
    >>> moba_attn_varlen(x, x, x, bounds, 30, moba_chunk_size=8, moba_topk=2).shape
    torch.Size([50, 2, 16])
    """
    _check_one_length(q, k, v, cu_seqlens, moba_chunk_size, moba_topk)
    validation.check_not_transformed(q, k, v, but="need moba_attn_varlen_naive")
    if moba_topk > 1:
        return _out(moba_attention_varlen(q, k, v, cu_seqlens, block_size=moba_chunk_size, top_k=moba_topk))
    validation.check_values("moba_attn_varlen with moba_topk=1", cu_seqlens=cu_seqlens)
    if not q.is_cuda and some_not_finite(q, k, v):  # PyTorch's attention would spread it to earlier tokens
        return _out(moba_attention_varlen(q, k, v, cu_seqlens, block_size=max(1, q.shape[0]), top_k=1))
    return _dense_varlen(q, k, v, cu_seqlens)


def moba_attn_varlen_naive(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """MoonshotAI/MoBA's reference function: causal MoBA for packed sequences, with a dense mask.

    Like `moba_attn_varlen`, except that `moba_topk=1` reads only the own block. Memory grows with the square of a sequence's length.

    >>> import torch
    >>> from moba_flex.compat import moba_attn_varlen_naive
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 50], dtype=torch.int32)
    >>> moba_attn_varlen_naive(x, x, x, bounds, 30, moba_chunk_size=8, moba_topk=2).shape
    torch.Size([50, 2, 16])
    """
    _check_one_length(q, k, v, cu_seqlens, moba_chunk_size, moba_topk)
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
    """FlashMoBA's function: MoBA for packed sequences, which may have fewer or more queries than keys.

    Args:
        q: `[T, H, D]`.
        k: `[Tk, G, D]`; H a multiple of G.
        v: `[Tk, G, Dv]`.
        cu_seqlens_q: `[n + 1]` int32, cumulative lengths from 0 to T.
        cu_seqlens_k: `[n + 1]` int32, cumulative lengths from 0 to Tk. With `causal=False`, if any sequence has more queries than keys,
            sequences are computed one by one.
        max_seqlen_q, max_seqlen_k: the maximum sequence lengths; ignored.
        moba_chunk_size: tokens per block, counted from the sequence's first key.
        moba_topk: number of blocks that a query reads, its own block included if `causal`. With 1, a causal query reads only its own block.
        causal: a sequence's last query is at the position of its last key, and each query reads keys up to its own position; the output is
            0 for a query before the first key. If False, each query reads the best of all blocks, the last, partial one included, and
            every key in them.

    Returns:
        `[T, H, Dv]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: an argument is invalid; the message says which, what it was and what it must be.

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
    validation.check_packed_operands(q, k, v, NAMES)
    validation.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[0], of="q")
    validation.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, k.shape[0], of="k")
    validation.check_same_count("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k", cu_seqlens_k)
    validation.check_not_transformed(q, k, v, but='need moba_flex.moba_attention_varlen with implementation="naive"')

    def compared() -> str:
        validation.check_values("flash_moba_varlen_func", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        if torch.equal(cu_seqlens_q, cu_seqlens_k):
            return "as many keys"
        return "fewer keys" if bool((cu_seqlens_q.diff() > cu_seqlens_k.diff()).any()) else "more keys"

    found = "as many keys" if cu_seqlens_q is cu_seqlens_k else memo_of_both(cu_seqlens_q, cu_seqlens_k, "compared", compared)
    if found == "as many keys":
        return _out(moba_attention_varlen(q, k, v, cu_seqlens_q, **blocks))
    if found == "more keys":
        return _out(moba_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **blocks))
    if causal:
        more = (cu_seqlens_q.diff() - cu_seqlens_k.diff()).clamp(min=0)  # excess queries per sequence
        return _without_blind_queries(q, k, v, cu_seqlens_q, cu_seqlens_k, more, **blocks)
    parts = [_one_sequence(*qkv, **blocks) for qkv in _sequences(q, cu_seqlens_q, k, v, cu_seqlens_k)]
    return torch.cat(parts)


def _out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Narrows the type: without `return_lse` the result is one tensor."""
    assert isinstance(result, Tensor)
    return result


def _check_blocks(moba_chunk_size: int, moba_topk: int) -> None:
    validation.check_count("moba_chunk_size", moba_chunk_size, 1)
    validation.check_count("moba_topk", moba_topk, 1)


def _check_one_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, moba_chunk_size: int, moba_topk: int) -> None:
    """The arguments of the functions whose queries and keys have the same `cu_seqlens`, by the names that they have there."""
    _check_blocks(moba_chunk_size, moba_topk)
    validation.check_packed(q, k, v, cu_seqlens, names=NAMES, more_keys="use flash_moba_varlen_func")


def _sequences(q: Tensor, cu_seqlens_q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
    """`q`, `k` and `v` of each sequence."""
    q_sizes, k_sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    return zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes))


def _without_blind_queries(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, blind: Tensor, **blocks: Any
) -> Tensor:
    """The first `blind [n]` queries of each sequence are before its first key, and have output 0."""
    queries, first = cu_seqlens_q.diff(), cu_seqlens_q[:-1] + blind
    token = torch.arange(q.shape[0], device=q.device)
    sees = (token >= first.repeat_interleave(queries, output_size=q.shape[0])).nonzero()[:, 0]
    bounds = cu_seqlens_q - F.pad(blind.cumsum(0), (1, 0)).to(cu_seqlens_q.dtype)
    out = _out(moba_attention_varlen(q[sees], k, v, bounds, cu_seqlens_k=cu_seqlens_k, **blocks))
    return q.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, sees, out)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, **blocks: Any) -> Tensor:
    """`[Nq, H, D]`, `[Nk, G, D]`, `[Nk, G, Dv]` -> `[Nq, H, Dv]`, non-causal. `moba_attention` takes at most as many queries as keys."""
    n_key = k.shape[0]
    blind = 0 if n_key else q.shape[0]
    out = [q.new_zeros(blind, q.shape[1], v.shape[2])]
    for part in q[blind:].split(max(1, n_key)):
        part, key, value = (x.transpose(0, 1)[None] for x in (part, k, v))
        out.append(_out(moba_attention(part, key, value, **blocks))[0].transpose(0, 1))
    return torch.cat(out)


def _dense_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention to all keys of a token's own sequence."""
    out = []
    with without_autocast(q):
        for qkv in list(_sequences(q, cu_seqlens, k, v, cu_seqlens)) or [(q, k, v)]:  # without sequences there are no tokens either
            query, key, value = (aligned(x.transpose(0, 1)[None]) for x in qkv)
            out.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)
