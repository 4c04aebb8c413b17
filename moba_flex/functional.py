"""The public operation: `moba_attention` and `moba_attention_varlen`. Arguments are validated here and become one settings object."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import validation
from .core.memo import memo_of_both
from .core.settings import DEFAULT_WORKING_MEMORY, AttentionSettings
from .dispatch import attend

_working_memory = DEFAULT_WORKING_MEMORY


def set_working_memory(n_bytes: int = DEFAULT_WORKING_MEMORY) -> int:
    """Set the memory budget, in bytes, for the routed rows of one attention call, and return the previous budget.

    A larger budget means fewer, larger chunks. The smallest chunk, whatever the budget, is one key head of one batch element with its
    query heads: its rows take about `Nq * H / G * top_k * (D + 2 * Dv) * element_size` bytes. It is split further, by query heads or
    query blocks, only if its rows exceed the 32-bit offsets of a GPU kernel. Large "eager" calls are always split by query head.

    Raises ValueError if `n_bytes` is not an int of at least 1.

    >>> from moba_flex import set_working_memory
    >>> before = set_working_memory(1 << 30)
    >>> set_working_memory(before)
    1073741824
    """
    global _working_memory
    validation.check_count("n_bytes", n_bytes, 1)
    before, _working_memory = _working_memory, n_bytes
    return before


def working_memory() -> int:
    """The current budget, in bytes, see `set_working_memory`."""
    return _working_memory


def checked_settings(
    query: Tensor,
    n_heads: int,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int,
    recent_blocks: int,
    share_selection: bool,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str = "auto",
) -> AttentionSettings:
    """The validated settings of a call. Raises ValueError or TypeError, which names the invalid argument."""
    validation.check_blocks(block_size, top_k, sink_blocks, recent_blocks, causal, share_selection)
    validation.check_scores(query, n_heads, scale, softcap, sinks)
    return AttentionSettings(
        block_size,
        top_k,
        sink_blocks,
        recent_blocks,
        share_selection,
        causal,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        validation.resolve_implementation(implementation, query),
        _working_memory,
    )


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    causal: bool = True,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of Block Attention (arXiv 2502.13189, equations 2 to 6): each query reads its own block and the best past ones.

    Args:
        query: `[B, H, Nq, D]`, float32, bfloat16 or float16; the last `Nq` of the `Nk` positions.
        key: `[B, G, Nk, D]`; H a multiple of G, `Nq <= Nk`.
        value: `[B, G, Nk, Dv]`.
        block_size: tokens per block, at least 1.
        top_k: number of blocks that a query reads, its own block included. The others are the `top_k - 1` earlier blocks whose mean
            key has the highest inner product with the query, in float32. Ties go to the earlier block. If there are fewer earlier blocks,
            all of them are read.
        sink_blocks: number of blocks at the start of the sequence that are always among the `top_k`.
        recent_blocks: number of blocks just before the own block that are always among the `top_k`.
        share_selection: whether the query heads of a key head choose blocks together, by the sum of their scores.
        causal: if False, a query reads the `top_k` best of all blocks and every key in them; sink_blocks and recent_blocks must be 0.
        scale: factor applied to the scores, `D ** -0.5` by default. It does not affect the gate.
        padding_mask: `[B, Nk]` bool, True for real tokens, which must be contiguous in each row: padding is on the left or right. Blocks
            are counted from the first real token. Outputs at padded queries are 0, and values at padding have no effect. A graph of
            torch.compile or torch.export checks the mask when it runs: RuntimeError on a CPU, a device-side assertion on a GPU.
        softcap: scores become `softcap * tanh(score / softcap)`. The gate is not capped.
        sinks: `[H]`, one extra logit per head in the softmax's denominator.
        return_lse: also return the log-sum-exp.
        implementation: "flex" (compiled FlexAttention, CUDA), "triton" (CUDA, a one-kernel forward pass for blocks of up to 256 tokens
            in half precision), "eager" (plain PyTorch, any device), "naive" (dense mask, the specification), "auto" ("flex" on CUDA,
            else "eager"). All compute the same outputs and gradients up to rounding; "flex" and "triton" share one backward pass.

    Returns:
        `[B, H, Nq, Dv]` in the query's dtype; with `return_lse` also float32 `[B, H, Nq]`, the natural logarithm of the softmax's
        denominator (sinks included), -inf at padded queries. Both are differentiable with respect to query, key, value and sinks.

    Raises:
        ValueError, TypeError: an argument is invalid; the message says which, what it was and what it must be.
        NotImplementedError: torch.func transforms, forward-mode or second derivatives without "naive"; export to ONNX. Where every block is
            read on a GPU, second derivatives raise an error of PyTorch's.

    >>> import torch
    >>> from moba_flex import moba_attention
    >>> query, key, value = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> moba_attention(query, key, value, block_size=16, top_k=3).shape
    torch.Size([1, 4, 100, 16])
    """
    validation.check_query_key(query=query, key=key, value=value)
    validation.check_padding_mask(padding_mask, query, key)
    validation.check_flag("return_lse", return_lse)
    settings = checked_settings(
        query,
        query.shape[1],
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        implementation=implementation,
    )
    out, lse = attend(query, key, value, settings, padding_mask=padding_mask, sinks=sinks, return_lse=return_lse)
    return (out, lse) if lse is not None else out


def both_bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """`[2, n + 1]` int32: the bounds of queries and of keys, as `attend` takes them."""
    both = cu_seqlens, cu_seqlens_k
    return memo_of_both(*both, "both", lambda: torch.stack([x.int() for x in both]))


def moba_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`moba_attention` for packed sequences: tokens attend only within their own sequence.

    Args:
        query: `[T, H, D]`, the concatenated tokens of all sequences.
        key: `[T, G, D]`, or `[Tk, G, D]` with `cu_seqlens_k`.
        value: `[T, G, Dv]`, or `[Tk, G, Dv]`.
        cu_seqlens: `[n + 1]` int32, cumulative lengths from 0 to T: sequence i is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`.
            Empty sequences are allowed. A graph of torch.compile or torch.export checks the values when it runs: RuntimeError on a CPU, a
            device-side assertion on a GPU, after which the process cannot use CUDA. They are not checked while a CUDA graph is captured.
        cu_seqlens_k: `[n + 1]` int32, cumulative lengths from 0 to Tk, for sequences with more keys than queries, as in chunked prefill
            and decoding with cached keys: the keys of sequence i are `cu_seqlens_k[i]` to `cu_seqlens_k[i + 1] - 1`, and its queries are
            the last of these tokens. A sequence may have no query, but not more queries than keys. Blocks are counted from its first
            key. With `causal=False` its queries choose among all its blocks.

    The other arguments, dtypes and errors are those of `moba_attention`.

    Returns:
        `[T, H, Dv]`, and with `return_lse` also float32 `[T, H]`.

    >>> import torch
    >>> from moba_flex import moba_attention_varlen
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    >>> moba_attention_varlen(x, x, x, bounds, block_size=8, top_k=2).shape
    torch.Size([50, 2, 16])

    A prompt chunk of 20 tokens after 30 cached ones, and one generated token after 40 cached ones:

    >>> query, key, value = torch.randn(21, 4, 16), torch.randn(91, 2, 16), torch.randn(91, 2, 16)
    >>> bounds, bounds_k = torch.tensor([0, 20, 21], dtype=torch.int32), torch.tensor([0, 50, 91], dtype=torch.int32)
    >>> moba_attention_varlen(query, key, value, bounds, cu_seqlens_k=bounds_k, block_size=8, top_k=2).shape
    torch.Size([21, 4, 16])
    """
    longest = validation.check_packed(query, key, value, cu_seqlens, cu_seqlens_k)
    validation.check_flag("return_lse", return_lse)
    settings = checked_settings(
        query,
        query.shape[1],
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        implementation=implementation,
    )
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if cu_seqlens_k is not None:
        cu_seqlens = both_bounds(cu_seqlens, cu_seqlens_k)
    out, lse = attend(query, key, value, settings, cu_seqlens=cu_seqlens, longest=longest, sinks=sinks, return_lse=return_lse)
    # Not `out[0]`: its backward pass would allocate zeros and copy the gradient into them.
    out = out.squeeze(0).transpose(0, 1).contiguous()
    return out if lse is None else (out, lse.squeeze(0).transpose(0, 1))
