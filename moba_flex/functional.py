"""The operation: `moba_attention` and `moba_attention_varlen`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .core import validation
from .core.autocast import without_autocast
from .core.layout import one_block
from .decoding import decode
from .reference import reference_attention

# Bytes of working memory for the routed rows of one chunk, beside inputs and outputs. Heads are worked through in chunks that fit.
DEFAULT_WORKING_MEMORY = 2 << 30
_working_memory = DEFAULT_WORKING_MEMORY
_TRANSFORM = torch._C._functorch.TransformType
_LEAST_WIDTH = {"flex": 16, "eager": 1}  # of a GPU's tiles; values without a width have a log-sum-exp all the same
_LARGE_TOP_K = 64  # blocks a query; a larger `top_k` is compared with how many there are


def set_working_memory(n_bytes: int = DEFAULT_WORKING_MEMORY) -> int:
    """Set how many bytes the routed rows of one attention call may take at a time, and return what it was before.

    A larger budget means fewer, larger chunks. One key head of one batch element with its query heads is always one chunk, however
    small the budget: its rows take about `Nq * H / G * top_k * (D + 2 * Dv) * element_size` bytes. Only where a GPU kernel's 32-bit
    offsets would not reach so many rows is it worked through in parts: fewer query heads at a time, or some query blocks of one.

    Raises ValueError if `n_bytes` is no int of at least 1.

    >>> before = set_working_memory(1 << 30)
    >>> set_working_memory(before)
    1073741824
    """
    global _working_memory
    validation.check_count("n_bytes", n_bytes, 1)
    before, _working_memory = _working_memory, n_bytes
    return before


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
        block_size: tokens a block, at least 1.
        top_k: how many blocks a query reads, its own one included. The others are the `top_k - 1` wholly past blocks whose mean key has
            the highest inner product with the query (in float32; among equals the earlier one); all of them when there are fewer.
        sink_blocks: how many blocks at the start of the sequence are always among the `top_k`.
        recent_blocks: how many blocks just before the own one are always among the `top_k`.
        share_selection: the query heads of a key head choose together, by the sum of their scores, so that they all read the same
            blocks.
        causal: with False, a query reads the `top_k` best of all blocks, none of them forced, and every key in them.
        scale: factor on the scores, `D ** -0.5` by default. The gate's order does not depend on it.
        padding_mask: `[B, Nk]` bool, True for real tokens; padding on the left or the right of a row. Blocks are counted from the
            first real token. Outputs at padded queries are 0.
        softcap: scores become `softcap * tanh(score / softcap)`. The gate is not capped.
        sinks: `[H]`, one extra logit a head in the softmax's denominator.
        return_lse: also return the log-sum-exp.
        implementation: "flex" (compiled FlexAttention, CUDA), "eager" (plain PyTorch, any device), "naive" (dense mask, the
            specification), "auto" (flex on CUDA, else eager). All give the same answer and gradients.

    Returns:
        `[B, H, Nq, Dv]` in the query's dtype; with `return_lse` also float32 `[B, H, Nq]`, the natural logarithm of the softmax's
        denominator (sinks included), -inf at padded queries. Both are differentiable in query, key, value and sinks.

    Raises:
        ValueError, TypeError: the arguments do not fit; the message says which, what it was and what it must be.

    >>> query, key, value = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> moba_attention(query, key, value, block_size=16, top_k=3).shape
    torch.Size([1, 4, 100, 16])
    """
    validation.check_query_key(query=query, key=key, value=value)
    validation.check_blocks(block_size, top_k, sink_blocks, recent_blocks, causal, share_selection)
    validation.check_padding_mask(padding_mask, query, key)
    validation.check_scores(query, query.shape[1], scale, softcap, sinks)
    validation.check_flag("return_lse", return_lse)
    implementation = validation.resolve_implementation(implementation, query)
    return attend(
        query,
        key,
        value,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
        scale=scale,
        padding_mask=padding_mask,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
        implementation=implementation,
    )


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`moba_attention` for packed sequences, which never see each other.

    Args:
        query: `[T, H, D]`, all tokens of all sequences one after another.
        key: `[T, G, D]`.
        value: `[T, G, Dv]`.
        cu_seqlens: `[n + 1]` int32, rising from 0 to T: sequence i is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. Empty
            sequences are allowed.

    The other arguments, what is raised and the dtypes are those of `moba_attention`.

    Returns:
        `[T, H, Dv]`, and with `return_lse` also float32 `[T, H]`.

    >>> x, bounds = torch.randn(50, 2, 16), torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    >>> moba_attention_varlen(x, x, x, bounds, block_size=8, top_k=2).shape
    torch.Size([50, 2, 16])
    """
    longest = validation.check_packed(query, key, value, cu_seqlens)
    validation.check_blocks(block_size, top_k, sink_blocks, recent_blocks, causal, share_selection)
    validation.check_scores(query, query.shape[1], scale, softcap, sinks)
    validation.check_flag("return_lse", return_lse)
    implementation = validation.resolve_implementation(implementation, query)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = attend(
        query,
        key,
        value,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
        scale=scale,
        cu_seqlens=cu_seqlens,
        longest=longest,
        softcap=softcap,
        sinks=sinks,
        return_lse=True,
        implementation=implementation,
    )
    out, lse = out[0].transpose(0, 1).contiguous(), lse[0].transpose(0, 1)
    return (out, lse) if return_lse else out


def attend(
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
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operation on arguments that have been checked, `[B, H, N, D]`; the adapters for models call this for every layer.

    `longest` is the length of the longest packed sequence, where it is known.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if query.numel() == 0:
        nothing = (query.sum() + key.sum() + value.sum()) * 0  # so that all have gradients
        out = nothing + query.new_zeros(*query.shape[:3], value.shape[-1])
        lse = nothing + query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    elif implementation == "naive":
        run = _naive_packed if cu_seqlens is not None else reference_attention
        which = {"cu_seqlens": cu_seqlens} if cu_seqlens is not None else {"padding_mask": padding_mask}
        blocks = {"block_size": block_size, "top_k": top_k, "sink_blocks": sink_blocks, "recent_blocks": recent_blocks}
        blocks["share_selection"] = share_selection
        with without_autocast(query):
            out, lse = run(query, key, value, **blocks, **which, causal=causal, scale=scale, softcap=softcap)
    elif (
        implementation == "flex"
        and not return_lse
        and _is_plain(query, key, value, block_size * top_k, causal, padding_mask, cu_seqlens, softcap, sinks)
    ):
        with without_autocast(query):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    else:
        check_not_transformed(query, key, value)
        if longest is not None:  # short sequences are then not padded to a long block each
            block_size = one_block(block_size, longest)
        if top_k > _LARGE_TOP_K:
            top_k, sink_blocks, recent_blocks = _enough(top_k, sink_blocks, recent_blocks, -(-key.shape[2] // block_size))
        sizes = (block_size, top_k, sink_blocks, recent_blocks, _working_memory)
        settings = (sizes, causal, share_selection, scale, softcap, implementation)
        least = _LEAST_WIDTH[implementation]
        narrow = min(query.shape[-1], value.shape[-1]) < least
        if narrow:  # zeros change neither scores nor outputs
            width = value.shape[-1]
            query, key, value = (F.pad(x, (0, max(0, least - x.shape[-1]))) for x in (query, key, value))
        out, lse, _ = attention(query, key, value, padding_mask, cu_seqlens, *settings)
        out = out[..., :width] if narrow else out
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _enough(top_k: int, sink_blocks: int, recent_blocks: int, n_blocks: int) -> tuple[int, int, int]:
    """Smaller counts that mean the same where they are far above the number of blocks: time and memory grow with them."""
    enough = _LARGE_TOP_K
    while enough < n_blocks:
        enough *= 2
    sink_blocks = min(sink_blocks, enough - 1)  # that many are all past blocks, and leave nothing to the others
    return min(top_k, enough), sink_blocks, min(recent_blocks, enough - 1 - sink_blocks)


def check_not_transformed(*tensors: Tensor, but: str = 'need implementation="naive"') -> None:
    """A custom operator would let tangents fall, and say nothing; other transforms would name PyTorch's inside alone."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() in (_TRANSFORM.Grad, _TRANSFORM.Vmap):
        raise NotImplementedError(f"the transforms of torch.func (grad, vmap and the like) {but}")
    if torch.autograd.forward_ad._current_level < 0:
        return
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"forward-mode derivatives (torch.func.jvp and the like) {but}")


def _is_plain(query: Tensor, key: Tensor, value: Tensor, reach: int, causal: bool, *more: Tensor | float | None) -> bool:
    """Whether every query reads all `reach` tokens there are, so that PyTorch's fused dense attention computes the same, for less."""
    every_token = causal and query.shape[2] == key.shape[2] <= reach and all(x is None for x in more)
    return every_token and query.dtype != torch.float32 and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def attend_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    length: Tensor | None,
    start: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str,
) -> Tensor:
    """`attend` for the last tokens of a cache with block means, see `moba_flex.decoding.decode`: `[B, H, n, Dv]`."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if top_k > _LARGE_TOP_K:
        top_k, sink_blocks, recent_blocks = _enough(top_k, sink_blocks, recent_blocks, means.shape[2] + 1)  # and the own block
    blocks = (block_size, top_k, sink_blocks, recent_blocks, share_selection)
    out, lse = decode(query, key, value, means, length, start, *blocks, scale, softcap, implementation)
    return out if sinks is None else _with_sinks(out, lse, sinks)[0]


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp with one more logit a head in the softmax's denominator."""
    sink = sinks.to(lse.dtype)[:, None]
    empty = lse == -torch.inf
    safe = lse.masked_fill(empty, 0)  # with a sink of -inf, which is none, the difference below would have no gradient
    share = torch.sigmoid(safe - sink)
    out = torch.where(empty[..., None], 0, out * share[..., None]).to(out.dtype)
    return out, torch.where(empty, lse, torch.logaddexp(safe, sink))


def _naive_packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **settings) -> tuple[Tensor, Tensor]:
    """The specification of packed sequences: each one alone."""
    sizes = cu_seqlens.diff().tolist()
    parts = [
        reference_attention(q, k, v, **settings) for q, k, v in zip(*(x.split(sizes, dim=2) for x in (query, key, value))) if q.shape[2]
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
