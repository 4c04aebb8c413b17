"""Dense causal attention of packed sequences by PyTorch's `varlen_attn`, for sequences whose queries read every block.

T query tokens, Tk key tokens, H query heads, G key heads, D head dimension.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ..core.strides import aligned

_MOST_SEQUENCES = 65535  # the kernels' launch grid has a dimension of sequences
# The backward pass allocates 128 float32 rows for each sequence, in addition to one for each query. A forward pass alone does not, but it
# should give the same bits with and without gradients.
_LEAST_QUERIES = 32
_LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # where PyTorch's dense attention does not train widths above 192 either
# PyTorch 2.11 groups heads without being asked; later versions have an argument for it.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def obstacle(query: Tensor, n_sequences: int) -> str | None:
    """Why `varlen_attn` cannot take `query [1, H, T, D]` in half precision, or None."""
    if not query.is_cuda or torch.version.cuda is None:
        return "packed sequences need an NVIDIA GPU"
    if not torch.backends.cuda.is_flash_attention_available():
        return "packed sequences need a PyTorch with FlashAttention"
    if n_sequences > min(_MOST_SEQUENCES, query.shape[2] // _LEAST_QUERIES):
        return "its packed sequences have fewer than 32 queries on average, or are too many"
    capability = torch.cuda.get_device_capability(query.device)
    if capability < (8, 0):
        return "packed sequences need a GPU of compute capability 8.0 or later"
    if query.shape[3] > 192 and capability in _LITTLE_SHARED_MEMORY:
        return "packed sequences need a head dimension of up to 192 on this GPU"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    """`[1, H, T, D]`, `[1, G, Tk, D]` twice -> `[1, H, T, D]`.

    `cu_seqlens` is `[n + 1]`, or `[2, n + 1]` for queries, which are the last tokens of their sequences, and keys. `longest` is the maximum
    number of keys of a sequence.
    """
    query, key, value = (aligned(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
    of_queries, of_keys = cu_seqlens.int().contiguous().expand(2, -1).unbind()
    lengths = min(longest, query.shape[0]), longest
    out = varlen_attn(query, key, value, of_queries, of_keys, *lengths, scale=scale, window_size=(-1, 0), **_GROUPED)
    assert isinstance(out, Tensor)  # with return_aux it would be a tuple
    return out.transpose(0, 1)[None]
