"""Which path a call takes, and why. Every such decision is made here.

| path | when |
|---|---|
| empty | there is no query |
| reference | `implementation="naive"` |
| dense | every query reads all keys of its sequence up to itself: PyTorch's fused attention computes the same, on a GPU in half precision |
| dense mask | few blocks: every query computes all past blocks, and hides those that it did not choose (forward pass) |
| routed | all others: the four steps of `moba_flex/attention.py` |

Each `..._obstacle` returns why a path cannot be taken, or None. The reasons are constants, since every call asks for them.

B batch, H query heads, N tokens (Nq queries, Nk keys), D and Dv head dimensions.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ..core.chunking import MASK_TILE, MAX_HEADS
from ..core.settings import AttentionSettings
from ..core.validation import CUDA_IMPLEMENTATIONS
from ..ops import kernels
from . import dense_mask, flash, varlen


class Path(Enum):
    """How a call is computed."""

    EMPTY = "empty"
    REFERENCE = "reference"
    DENSE = "dense"
    DENSE_MASK = "dense mask"
    ROUTED = "routed"


# Per tensor of a captured forward pass: 8,192 tokens, 32 heads, head dimension 128. Copying larger tensors costs the GPU more than launches
# cost the host. Half of it in a backward pass, which copies twice as many tensors: graphs of both would not fit into the working memory.
MAX_CAPTURED_ELEMENTS = 1 << 25
MAX_ONE_PASS_BLOCK, MAX_ONE_PASS_WIDTH = 256, 256
# A routed row takes as long as reading its block and this many more keys under a dense mask. Measured on an H200: width 64 and 128, blocks
# of 64 and 128, both implementations.
KEYS_PER_ROW = 200
MAX_DENSE_MASK_WIDTH = 128
LEAST_DENSE_SCALE = 1e-6  # cuDNN and FlashAttention multiply the mask's -inf by it
_HALF = (torch.bfloat16, torch.float16)  # the precision of float32 on a GPU depends on settings that may change


def path_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: AttentionSettings,
    *,
    padded: bool = False,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    sinks: bool = False,
    return_lse: bool = False,
) -> Path:
    """The path of a call. `ROUTED` may turn out to be `DENSE_MASK`: the operator decides that.

    `longest`: the maximum number of keys of a packed sequence, None if it is unknown.
    """
    if query.numel() == 0:
        return Path.EMPTY
    if settings.implementation == "naive":
        return Path.REFERENCE
    if dense_obstacle(query, key, value, settings, padded, cu_seqlens, longest, sinks, return_lse) is None:
        return Path.DENSE
    return Path.ROUTED


def reads_all_keys(n_key: int, block_size: int, top_k: int) -> bool:
    """Whether each query of a causal call reads all keys up to itself, whatever the gate says."""
    return n_key <= block_size * top_k


def dense_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: AttentionSettings,
    padded: bool,
    cu_seqlens: Tensor | None,
    longest: int | None,
    sinks: bool,
    return_lse: bool,
) -> str | None:
    """Why a call cannot use PyTorch's fused attention, or None."""
    if settings.implementation not in CUDA_IMPLEMENTATIONS:
        return 'only "flex" takes it, the implementation for CUDA'
    if return_lse:
        return "it returns the log-sum-exp"
    if not settings.causal:
        return "it is not causal"
    if cu_seqlens is not None and longest is None:
        return "it is not known here how long its packed sequences are"
    if not reads_all_keys(key.shape[2] if longest is None else longest, settings.block_size, settings.top_k):
        return "there are more than top_k blocks"
    if padded or (cu_seqlens is None and query.shape[2] != key.shape[2]):
        return "it has padding, or fewer queries than keys"
    if sinks or settings.softcap is not None:
        return "it has sinks or a softcap"
    if settings.scale < LEAST_DENSE_SCALE:
        return "its scale is negative or close to 0, of which PyTorch's fused attention makes NaN"
    if query.dtype == torch.float32:
        return "it is in float32"
    width = query.shape[-1]
    if width != value.shape[-1] or width > 256 or width % 8:
        return "PyTorch's fused attention does not have these widths"
    if cu_seqlens is None:
        return None
    if cu_seqlens.dim() == 2 and settings.implementation == "triton":  # which refuses it, however long the sequences are
        return '"triton" takes no cu_seqlens_k'
    return varlen.obstacle(query, cu_seqlens.shape[-1] - 1)


def dense_mask_obstacle(
    query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, block_size: int, n_blocks: int, last_queries: bool
) -> str | None:
    """Why a forward pass cannot compute all past blocks under a dense mask, or None. The alternative is routing.

    `block_size` is that of the layout, and `n_blocks` its number of key blocks per row. `last_queries`: queries are the last tokens of
    packed sequences, in tiles.
    """
    if settings.implementation not in CUDA_IMPLEMENTATIONS or not on_nvidia_gpu(query):
        return "it is for NVIDIA GPUs"
    if query.dtype not in _HALF:
        return "it computes in bfloat16 and float16"
    if not settings.causal or settings.n_routed == 0 or last_queries:
        return "it is causal, needs blocks to choose, and takes no cu_seqlens_k"
    # Packed sequences count as one: how long each is, a captured graph does not know.
    if 2 * key.shape[2] - query.shape[2] > 2 * settings.top_k * (block_size + KEYS_PER_ROW):
        return "there are so many keys that routing is faster"
    if n_blocks > dense_mask.MAX_BLOCKS[settings.implementation]:
        return 'it takes up to 32 blocks, with "triton" 64'
    if block_size % MASK_TILE if settings.implementation == "triton" else block_size <= MASK_TILE // 2:
        return 'it takes blocks of more than 32 tokens, with "triton" multiples of 64'
    if max(query.shape[-1], value.shape[-1]) > MAX_DENSE_MASK_WIDTH:
        return "it takes widths of up to 128"
    if settings.implementation == "flex":
        if flash.enabled():
            return 'set_flex_backend("flash") is in force'
        in_slots = 2 * query.shape[0] * query.shape[1] * key.shape[2] * max(query.shape[-1], value.shape[-1])  # at most
        if query.shape[0] > MAX_HEADS or in_slots >= 1 << 31:
            return "it takes up to 65,535 rows, and tensors of fewer than 2**30 elements"
    return None


def on_nvidia_gpu(x: Tensor) -> bool:
    """Whether `x` is on an NVIDIA GPU that Triton compiles for."""
    return x.is_cuda and kernels is not None and torch.version.hip is None


def one_pass_obstacle(query: Tensor, value: Tensor, slots: int, last_queries: bool = False) -> str | None:
    """Why blocks of `slots` slots cannot use the one-kernel forward pass, `implementation="triton"`, or None."""
    if (obstacle := _one_kernel_obstacle(query, value, slots, last_queries)) is not None:
        return obstacle
    assert kernels is not None  # checked above
    fits = kernels.forward.fits(query, value, slots)
    return None if fits else "it needs an NVIDIA GPU whose shared memory holds a block's keys and values"


def one_pass_backward_obstacle(query: Tensor, value: Tensor, slots: int, last_queries: bool = False) -> str | None:
    """Why blocks of `slots` slots cannot use the one-kernel backward pass, or None. The alternative is FlexAttention's.

    `last_queries`: queries are the last tokens of packed sequences, in tiles.

    A block of many keys is split into sub-blocks, each of which writes gradient rows of its own. Up to three need no more memory than the
    copied rows of FlexAttention's.
    """
    if (obstacle := _one_kernel_obstacle(query, value, slots, last_queries)) is not None:
        return obstacle
    assert kernels is not None  # checked above
    return None if kernels.backward.sub_blocks(query, value, slots) <= 3 else "it would need more than three sub-blocks"


def _one_kernel_obstacle(query: Tensor, value: Tensor, slots: int, last_queries: bool) -> str | None:
    """Why blocks cannot use either of the one-kernel passes, or None."""
    if not query.is_cuda or kernels is None:
        return "it is for CUDA"
    if last_queries:
        return "it takes no cu_seqlens_k"
    if query.dtype not in _HALF:
        return "it computes in bfloat16 and float16"
    if slots > MAX_ONE_PASS_BLOCK or max(query.shape[-1], value.shape[-1]) > MAX_ONE_PASS_WIDTH:
        return "it takes blocks of up to 256 tokens and widths of up to 256"
    return None


def capture_obstacle(tensors: tuple[Tensor | None, ...], settings: AttentionSettings) -> str | None:
    """Why a call cannot run as a CUDA graph, or None. `tensors`: query, key and value, or the operands of a backward pass."""
    first, most = tensors[0], MAX_CAPTURED_ELEMENTS if len(tensors) <= 3 else MAX_CAPTURED_ELEMENTS // 2
    assert first is not None
    if settings.implementation not in CUDA_IMPLEMENTATIONS or not first.is_cuda:
        return "it is not on a GPU"
    if first.dtype not in _HALF:
        return "it is neither in bfloat16 nor in float16"
    if first.numel() == 0 or not all(x is None or x.numel() <= most for x in tensors):
        return "a tensor has more than 2**25 elements (2**24 in a backward pass), so that copying it costs more than launching kernels"
    if flash.enabled():
        return 'set_flex_backend("flash") is in force'
    if torch.cuda.is_current_stream_capturing():
        return "the program captures a CUDA graph of its own"
    return None
