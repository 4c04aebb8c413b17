"""The public operation: `moba_attention` and `moba_attention_varlen`. Arguments are validated here, and become one settings object."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import validation
from .core.memo import memo_of_both
from .core.settings import DEFAULT_WORKING_MEMORY, AttentionSettings
from .dispatch import attend

_working_memory = DEFAULT_WORKING_MEMORY


def set_working_memory(n_bytes: int = DEFAULT_WORKING_MEMORY) -> int:
    """Set how many bytes the routed rows of one attention call may take at a time, and return what it was before.

    A larger budget means fewer, larger chunks. One key head of one batch element with its query heads is always one chunk, however
    small the budget: its rows take about `Nq * H / G * top_k * (D + 2 * Dv) * element_size` bytes. Only where a GPU kernel's 32-bit
    offsets would not reach so many rows is it worked through in parts: fewer query heads at a time, or some query blocks of one.

    Raises ValueError if `n_bytes` is no int of at least 1.

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
    """What `set_working_memory` has set."""
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
    """The settings of a call, validated: ValueError or TypeError names the argument that is wrong."""
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
        top_k: how many blocks a query reads, its own one included. The others are the `top_k - 1` wholly past blocks whose mean key has
            the highest inner product with the query (in float32; among equals the earlier one); all of them when there are fewer.
        sink_blocks: how many blocks at the start of the sequence are always among the `top_k`.
        recent_blocks: how many blocks just before the own one are always among the `top_k`.
        share_selection: the query heads of a key head choose together, by the sum of their scores, so that they all read the same
            blocks.
        causal: with False, a query reads the `top_k` best of all blocks, none of them forced, and every key in them.
        scale: factor on the scores, `D ** -0.5` by default. The gate's order does not depend on it.
        padding_mask: `[B, Nk]` bool, True for real tokens; padding on the left or the right of a row. Blocks are counted from the
            first real token. Outputs at padded queries are 0, and nothing that stands at padding has any effect. A hole between real
            tokens is an error; in a graph of torch.compile or torch.export it is a RuntimeError when the graph runs.
        softcap: scores become `softcap * tanh(score / softcap)`. The gate is not capped.
        sinks: `[H]`, one extra logit per head in the softmax's denominator.
        return_lse: also return the log-sum-exp.
        implementation: "flex" (compiled FlexAttention, CUDA), "triton" (CUDA, a forward pass of one kernel for blocks of up to 256 tokens
            in half precision), "eager" (plain PyTorch, any device), "naive" (dense mask, the specification), "auto" (flex on CUDA, else
            eager). All give the same answer and gradients; "flex" and "triton" have one backward pass.

    Returns:
        `[B, H, Nq, Dv]` in the query's dtype; with `return_lse` also float32 `[B, H, Nq]`, the natural logarithm of the softmax's
        denominator (sinks included), -inf at padded queries. Both are differentiable in query, key, value and sinks.

    Raises:
        ValueError, TypeError: the arguments do not fit; the message says which, what it was and what it must be.

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
    """`moba_attention` for packed sequences, which never see each other.

    Args:
        query: `[T, H, D]`, all tokens of all sequences one after another.
        key: `[T, G, D]`, or `[Tk, G, D]` with `cu_seqlens_k`.
        value: `[T, G, Dv]`, or `[Tk, G, Dv]`.
        cu_seqlens: `[n + 1]` int32, rising from 0 to T: sequence i is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. Empty
            sequences are allowed. In a graph of torch.compile or torch.export wrong ones are a RuntimeError when the graph runs; on a
            GPU that is an assertion of the device, which ends the process. While a CUDA graph is captured by hand they are not checked.
        cu_seqlens_k: `[n + 1]` int32, rising from 0 to Tk, where sequences have more keys than queries, as chunks of prompts and generated
            tokens do whose earlier keys are cached: the keys of sequence i are `cu_seqlens_k[i]` to `cu_seqlens_k[i + 1] - 1`, and its
            queries are the last tokens of these. No sequence may have more queries than keys; it may have no query. Blocks are counted
            from its first key. With `causal=False` its queries choose among all its blocks.

    The other arguments, what is raised and the dtypes are those of `moba_attention`.

    Returns:
        `[T, H, Dv]`, and with `return_lse` also float32 `[T, H]`.

    >>> import torch
    >>> from moba_flex import moba_attention_varlen
    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    >>> moba_attention_varlen(x, x, x, bounds, block_size=8, top_k=2).shape
    torch.Size([50, 2, 16])

    A chunk of 20 tokens of a prompt, after 30 that are cached, and one token generated after 40:

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
        both = cu_seqlens, cu_seqlens_k
        cu_seqlens = memo_of_both(*both, "both", lambda: torch.stack([x.int() for x in both]))
    out, lse = attend(query, key, value, settings, cu_seqlens=cu_seqlens, longest=longest, sinks=sinks, return_lse=True)
    assert lse is not None
    # `out[0]` would give the backward pass a tensor of zeros to copy the gradient into.
    out, lse = out.squeeze(0).transpose(0, 1).contiguous(), lse.squeeze(0).transpose(0, 1)
    return (out, lse) if return_lse else out
