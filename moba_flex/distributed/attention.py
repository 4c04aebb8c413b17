"""Attention over sequences that are cut into slices, one per process.

Causal attention of a slice reads keys up to the end of the slice, and `moba_attention` accepts queries that are the last tokens of the
keys. Each process therefore makes an ordinary call with its own queries and all keys so far. The gate, grouped heads and blocks that cross
a slice's border need no special treatment. Only the exchange of keys is new: `exchange="keys"` or `exchange="heads"`.

W processes. B batch, H query heads, G key heads, L tokens of a slice, N = W * L tokens, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from ..core import validation
from ..core.messages import kind_of
from ..core.settings import AttentionSettings
from ..core.validation import check_not_transformed
from ..dispatch import attend
from ..functional import checked_settings
from .collectives import gathered_keys, heads_to_tokens, tokens_to_heads

EXCHANGES = ("keys", "heads")

# Attention of queries that are the last tokens of the keys, for a slice of the query heads: output and log-sum-exp (None if not requested).
Attention = Callable[[Tensor, Tensor, Tensor, slice], tuple[Tensor, Tensor | None]]


def moba_attention_cp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    exchange: str = "keys",
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`moba_attention` of a sequence of which each process holds a slice: context parallelism. Causal.

    All processes of the mesh call it together, process r with the tokens `r * L` to `(r + 1) * L - 1`. Slices have the same length. If the
    sequence length is not a multiple of the number of processes, pad the sequence at its end, which causal attention never reads.

    Args:
        query: `[B, H, L, D]`, the same shape on all processes (not checked: different shapes fail or hang in the exchange).
        key: `[B, G, L, D]`.
        value: `[B, G, L, Dv]`.
        mesh: a DeviceMesh with one dimension, or with several of which one is named "cp"; or a process group. Slices are in the order of
            its ranks.
        exchange: "keys" gathers keys and values of all processes, some heads at a time, while attention computes other heads. "heads"
            exchanges tokens for heads before and after attention (Ulysses). It sends fewer bytes from H / G + 2 processes on, but H must be
            a multiple of the number of processes, and G a multiple or a divisor of it. docs/scaling.md says which is faster when.

    The other arguments and errors are those of `moba_attention`; `sinks [H]` are those of all heads.

    Returns:
        `[B, H, L, Dv]`, the outputs of this slice, and with `return_lse` also float32 `[B, H, L]`: the same values that one process would
            compute for the whole sequence. Differentiable once with respect to query, key, value and sinks. The gradient of the sinks is
            that of this slice: sum it over the processes.

    Raises:
        ValueError, TypeError: as `moba_attention`; the mesh has no suitable dimension, or this rank is not in it; heads that do not fit the
            number of processes.
        RuntimeError: another process has ended.

    The example uses one process, which needs no launcher; under torchrun leave out the arguments of `init_process_group`.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from moba_flex.distributed import moba_attention_cp
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> query, key = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    >>> moba_attention_cp(query, key, key, dist.group.WORLD, block_size=16, top_k=3).shape
    torch.Size([1, 4, 100, 16])
    >>> dist.destroy_process_group()
    """
    validation.check_query_key(query=query, key=key, value=value)
    validation.check_flag("return_lse", return_lse)
    settings = checked_settings(
        query,
        query.shape[1],
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        implementation=implementation,
    )
    check_not_transformed(query, key, value, but="do not go through exchanges between processes: use backward() or torch.autograd.grad")
    attention = sparse(settings, sinks, return_lse)
    out, lse = context_parallel_attention(query, key, value, group_of(mesh), exchange, attention, share_selection)
    return out if lse is None else (out, lse)


def sparse(settings: AttentionSettings, sinks: Tensor | None = None, return_lse: bool = False) -> Attention:
    """MoBA, with the sinks `[H]` of all heads."""

    def attention(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> tuple[Tensor, Tensor | None]:
        out, lse = attend(query, key, value, settings, sinks=None if sinks is None else sinks[heads], return_lse=True)
        return out, lse if return_lse else None

    return attention


def full(scale: float | None) -> Attention:
    """Dense causal attention, for layers with full attention. It returns no log-sum-exp."""

    def attention(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> tuple[Tensor, None]:
        repeats = query.shape[1] // key.shape[1]
        by_group = query.unflatten(1, (-1, repeats)).flatten(0, 1)  # key heads are expanded, not copied
        key, value = (x.flatten(0, 1)[:, None].expand(-1, repeats, -1, -1) for x in (key, value))
        visible = causal_lower_right(query.shape[2], key.shape[2])
        out = F.scaled_dot_product_attention(by_group, key, value, attn_mask=visible, scale=scale)
        return out.reshape(*query.shape[:3], -1), None

    return attention


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
    exchange: str,
    attention: Attention,
    share_selection: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attention` on this process's slice of the sequence: `[B, H, L, Dv]` and `[B, H, L]`, or None if it returns no log-sum-exp.

    Raises ValueError for an unknown exchange, for keys of another length than the queries, and for heads that do not fit.
    """
    check_exchange(exchange, query.shape[1], key.shape[1], group.size(), share_selection)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} tokens and key {key.shape[2]}, but each process holds one slice of both: "
            "context parallelism takes whole sequences, without a cache"
        )
    return (_keys if exchange == "keys" else _heads)(query, key, value, group, attention)


def _keys(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, attention: Attention) -> tuple[Tensor, Tensor | None]:
    repeats, n_key = query.shape[1] // key.shape[1], (group.rank() + 1) * key.shape[2]
    outs, lses = [], []
    for part, part_key, part_value in gathered_keys(key, value, group, n_key):
        heads = slice(part.start * repeats, part.stop * repeats)
        out, lse = attention(query[:, heads], part_key, part_value, heads)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
        del part_key, part_value  # free them before the next message arrives
    return torch.cat(outs, 1), torch.cat(lses, 1) if lses else None


def _heads(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, attention: Attention) -> tuple[Tensor, Tensor | None]:
    copies = max(1, group.size() // key.shape[1])  # copies of a key head, if several processes share its query heads
    if copies > 1:
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    share = query.shape[1] // group.size()
    heads = slice(group.rank() * share, (group.rank() + 1) * share)
    query, key, value = tokens_to_heads(group, query, key, value)
    out, lse = attention(query, key, value, heads)
    del query, key, value
    (out,) = heads_to_tokens(group, out)
    if lse is not None:
        lse = heads_to_tokens(group, lse[..., None])[0][..., 0]
    return out, lse


def check_exchange(exchange: str, n_heads: int, n_key_heads: int, n_processes: int, share_selection: bool = False) -> None:
    """Raise ValueError if there is no such exchange, or if the heads cannot be distributed over the processes."""
    validation.check_choice("exchange", exchange, EXCHANGES)
    if exchange == "heads" and (n_heads % n_processes or (n_key_heads % n_processes and n_processes % n_key_heads)):
        raise ValueError(
            f'exchange="heads" deals {n_heads} query heads and {n_key_heads} key heads out to {n_processes} processes: query heads must be '
            'a multiple of the processes, and key heads a multiple or a divisor of them; use exchange="keys", which takes any number'
        )
    if exchange == "heads" and share_selection and n_processes > n_key_heads:
        raise ValueError(
            f'share_selection=True lets the query heads of a key head choose together, but exchange="heads" deals {n_key_heads} key heads '
            f'out to {n_processes} processes, several of which share one: use exchange="keys", or at most {n_key_heads} processes'
        )


def group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The process group of a mesh's only dimension, or of the one named "cp"."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        if mesh is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"mesh is a process group that rank {dist.get_rank()} is not in: call this on its members alone")
        raise TypeError(f"mesh must be a DeviceMesh or a process group, but is {kind_of(mesh)}")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1:
        return mesh.get_group()
    if "cp" not in names:
        raise ValueError(f'mesh must have one dimension, or one named "cp", but has {mesh.ndim}, named {names}')
    return mesh["cp"].get_group()
