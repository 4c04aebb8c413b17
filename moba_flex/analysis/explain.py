"""Which path a call takes, and why: `explain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import paths
from ..core import validation
from ..core.layout import clamp_block_size
from ..core.layout_builders import n_query_blocks
from ..core.settings import AttentionSettings
from ..cuda_graphs.cache import EAGER_CALLS, cuda_graphs_enabled
from ..functional import both_bounds, checked_settings

_MEANING = {
    paths.Path.EMPTY: "there is nothing to compute",
    paths.Path.REFERENCE: "the specification, a dense mask in plain PyTorch",
    paths.Path.DENSE: "every query reads all keys of its sequence: PyTorch's fused attention",
    paths.Path.DENSE_MASK: "few blocks: every query computes all past blocks, and hides those that it did not choose",
    paths.Path.ROUTED: "queries are routed to their blocks",
}


@dataclass(frozen=True)
class Explanation:
    """How a call is computed; returned by `explain`. Printed as a few sentences.

    Attributes:
        call: the call in words: tokens, block size and `top_k`.
        path: "empty", "reference", "dense", "dense mask" or "routed".
        implementation: the implementation in use, with "auto" resolved: "flex", "triton", "eager" or "naive".
        cuda_graph: whether calls of this shape are replayed from a CUDA graph, from the third one on.
        share_of_keys: the largest number of keys that queries read, divided by that of full attention.
        reasons: why it is not another path, and not a CUDA graph.

    >>> import torch
    >>> from moba_flex import explain
    >>> query, key = torch.randn(1, 8, 1000, 64), torch.randn(1, 2, 1000, 64)
    >>> explanation = explain(query, key, block_size=64, top_k=4)
    >>> explanation.path, explanation.implementation, round(explanation.share_of_keys, 3)
    ('routed', 'eager', 0.398)
    """

    call: str
    path: str
    implementation: str
    cuda_graph: bool
    share_of_keys: float
    reasons: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values."""
        return dict(vars(self))

    def __str__(self) -> str:
        graph = f", from a CUDA graph from call {EAGER_CALLS + 1} on" if self.cuda_graph else ""
        meaning = _MEANING[paths.Path(self.path)]
        lines = [f"{self.call}: {self.path} ({self.implementation}){graph}; {meaning}; {self.share_of_keys:.1%} of the keys are read"]
        return "\n".join([*lines, *(f"  no {name}: {reason}" for name, reason in self.reasons.items())])


@torch.no_grad()
def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
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
    cu_seqlens_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Explanation:
    """Report which path `moba_attention` takes with these arguments, and why. Use it when a call is slow. Computes nothing.

    Args:
        query, key, value: those of `moba_attention`, or with `cu_seqlens` those of `moba_attention_varlen`. Only shapes, dtypes and devices
            matter: "meta" tensors work, but do not count as CUDA tensors. `value=None`: as wide as `key`.

    The other arguments and errors are those of `moba_attention`.

    >>> import torch
    >>> from moba_flex import explain
    >>> query, key = torch.randn(1, 8, 1000, 64), torch.randn(1, 2, 1000, 64)
    >>> print(explain(query, key, block_size=64, top_k=4))
    1,000 tokens, block 64, top-4: routed (eager); queries are routed to their blocks; 39.8% of the keys are read
      no dense attention: only "flex" takes it, the implementation for CUDA
      no dense mask: it is for NVIDIA GPUs
      no CUDA graph: it is not on a GPU
    """
    value = key if value is None else value
    longest = None
    if cu_seqlens_k is not None and cu_seqlens is None:
        raise ValueError("cu_seqlens_k is for packed sequences, and needs cu_seqlens: give both")
    if padding_mask is not None and cu_seqlens is not None:
        raise ValueError("padding_mask is for rows of a batch, and cu_seqlens for packed sequences, without padding: give one")
    if cu_seqlens is None:
        validation.check_query_key(query=query, key=key, value=value)
        validation.check_padding_mask(padding_mask, query, key)
    else:
        longest = validation.check_packed(query, key, value, cu_seqlens, cu_seqlens_k)
        if cu_seqlens_k is not None:
            cu_seqlens = both_bounds(cu_seqlens, cu_seqlens_k)
    validation.check_flag("return_lse", return_lse)
    settings = checked_settings(
        query,
        query.shape[-2] if cu_seqlens is not None else query.shape[1],
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
    if cu_seqlens is not None:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    of_call: dict[str, Any] = {"padded": padding_mask is not None, "cu_seqlens": cu_seqlens, "longest": longest}
    of_call |= {"sinks": sinks is not None, "return_lse": return_lse}
    path = paths.path_of(query, key, value, settings, **of_call)
    obstacles = {
        "dense attention": paths.dense_obstacle(query, key, value, settings, **of_call),
        "dense mask": _dense_mask_obstacle(query, key, value, settings, cu_seqlens, longest),
        "CUDA graph": paths.capture_obstacle((query, key, value), settings),
    }
    if obstacles["CUDA graph"] is None and not cuda_graphs_enabled():
        obstacles["CUDA graph"] = "set_cuda_graphs(False) is in force"
    routed = path is paths.Path.ROUTED
    if routed and obstacles["dense mask"] is None:
        path = paths.Path.DENSE_MASK
    n_key = key.shape[2] if longest is None else longest
    what = f"{query.shape[2]:,} tokens" if query.shape[2] == key.shape[2] else f"{query.shape[2]:,} queries on {key.shape[2]:,} tokens"
    return Explanation(
        f"{what}, block {block_size}, top-{settings.top_k}",
        path.value,
        settings.implementation,
        routed and obstacles["CUDA graph"] is None,
        share_of_keys(min(query.shape[2], n_key), n_key, block_size, top_k, causal),
        {name: reason for name, reason in obstacles.items() if routed and reason},
    )


def _dense_mask_obstacle(
    query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, cu_seqlens: Tensor | None, longest: int | None
) -> str | None:
    """As the operator decides it."""
    block_size = clamp_block_size(settings.block_size, key.shape[2] if longest is None else longest)
    n_blocks = n_query_blocks(key.shape[2], key.shape[2], block_size, False, None if cu_seqlens is None else cu_seqlens.shape[-1] - 1)
    last_queries = cu_seqlens is not None and cu_seqlens.dim() == 2
    return paths.dense_mask_obstacle(query, key, value, settings, block_size, n_blocks, last_queries)


def share_of_keys(n_query: int, n_key: int, block_size: int, top_k: int, causal: bool = True) -> float:
    """The largest number of keys that the last `n_query` of `n_key` tokens can read, divided by that of full attention.

    It is exact for causal queries, because they choose among whole blocks.
    """
    if not n_query:
        return 1.0
    if not causal:
        return min(1.0, top_k * block_size / n_key)
    before = n_key - n_query
    read = _keys_read(n_key, block_size, top_k) - _keys_read(before, block_size, top_k)
    return read / (_up_to(n_key) - _up_to(before))


def _keys_read(n: int, block_size: int, top_k: int) -> int:
    """By the first `n` tokens: all keys up to their own while there are at most `top_k` blocks, then `top_k - 1` blocks and part of their
    own.
    """
    dense = min(n, block_size * top_k)
    blocks, rest = divmod(n - dense, block_size)
    own = blocks * _up_to(block_size) + _up_to(rest)
    return _up_to(dense) + (n - dense) * (top_k - 1) * block_size + own


def _up_to(n: int) -> int:
    """1 + 2 + ... + n: the keys that `n` causal queries see."""
    return n * (n + 1) // 2
