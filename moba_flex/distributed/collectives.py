"""Differentiable exchange of keys and heads between processes.

W processes hold a slice of L tokens each, in the order of their ranks, of sequences of N = W * L tokens. There are two exchanges:

- `gathered_keys`: every process gets the keys and values of all tokens, a few heads at a time. The next heads are sent while the caller
  works on the current ones. In backward, gradients of keys and values are sent back in the same way, summed over the processes.
- `tokens_to_heads` and back: every process gets all tokens of its share of the heads (Ulysses, arXiv 2309.14509).

All processes issue collectives in the same order, in forward and backward, because shapes are the same on all of them. Second derivatives
raise an error.

B batch, H query heads, G key heads, g key heads in one message, L tokens of a slice, N tokens of all slices, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .watch import missing_processes

# PyTorch 2.13 renamed these two.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

# Size at which a message of gathered keys and values is full. It is large enough to saturate the links, and small enough that the first
# message, which overlaps with nothing, is a small part of a long sequence's total.
MESSAGE_BYTES = 64 << 20

_Started = list[tuple[dist.Work, Tensor]]  # collectives in flight, with their inputs, which must stay alive


def gathered_keys(key: Tensor, value: Tensor, group: dist.ProcessGroup, n_key: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices `[B, G, L, D]`, `[B, G, L, Dv]` -> which key heads, and their first `n_key` tokens `[B, g, n_key, D]`, `[B, g, n_key, Dv]`.

    Differentiable: gradients are summed over the processes. Each item yielded is one message; the next message is already in flight.
    """
    heads = key_heads_of_messages(key, value, group.size())
    coming_home: _Started = []
    parts = _Pack.apply(key, value, heads, coming_home)
    under_way: _Started = []
    message = _Gather.apply(parts[0], group, under_way, coming_home)
    for i, part in enumerate(heads):
        arrived = under_way.pop()
        following = _Gather.apply(parts[i + 1], group, under_way, coming_home) if i + 1 < len(heads) else None
        _wait(*arrived)
        yield part, *_Unpack.apply(message, n_key, key.shape[-1])
        message = following


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[L, ...]` of every process -> `[N, ...]`. Differentiable: gradients are summed over the processes."""
    return _Whole.apply(x, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over all processes (all-reduce). Not differentiable."""
    x = x.contiguous()
    _wait(dist.all_reduce(x, group=group, async_op=True), x)
    return x


def broadcast_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The first process's `x` on all processes (broadcast). Not differentiable."""
    x = x.contiguous()
    _wait(dist.broadcast(x, group=group, group_src=0, async_op=True), x)
    return x


def key_heads_of_messages(key: Tensor, value: Tensor, n_processes: int) -> list[slice]:
    """The key heads of each message: as few as reach `MESSAGE_BYTES`."""
    n_heads = key.shape[1]
    head_bytes = n_processes * (key[:, :1].numel() + value[:, :1].numel()) * key.element_size()
    together = min(n_heads, max(1, -(-MESSAGE_BYTES // max(1, head_bytes))))
    return [slice(first, min(first + together, n_heads)) for first in range(0, n_heads, together)]


_Backward = Callable[..., tuple[Tensor | None, ...]]


def _once(backward: _Backward) -> _Backward:
    """Refuse second derivatives. With PyTorch's `once_differentiable`, `torch.autograd.grad` would silently omit a part of them."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: exchanges between processes have first derivatives only")
        return backward(ctx, *grads)

    return checked


class _Pack(torch.autograd.Function):
    """`[B, G, L, D]`, `[B, G, L, Dv]` -> for each message `[L, B, g, D + Dv]`: tokens first, so that gathered slices are in order."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, heads: list[slice], coming_home: _Started) -> tuple[Tensor, ...]:
        ctx.coming_home, ctx.widths = coming_home, (key.shape[-1], value.shape[-1])
        return tuple(torch.cat([key[:, part], value[:, part]], -1).permute(2, 0, 1, 3).contiguous() for part in heads)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        while ctx.coming_home:  # they overlapped with attention's backward for other heads
            _wait(*ctx.coming_home.pop(0))
        key, value = torch.cat(grads, 2).permute(1, 2, 0, 3).split(ctx.widths, -1)
        return key, value, None, None


class _Gather(torch.autograd.Function):
    """`[L, ...]` -> `[N, ...]`, started but not waited for. In backward, `[N, ...]` is reduce-scattered to `[L, ...]` in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, under_way: _Started, coming_home: _Started) -> Tensor:
        ctx.group, ctx.coming_home = group, coming_home
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        under_way.append((_all_gather(out, x, group=group, async_op=True), x))
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        work = _reduce_scatter(out, grad, group=ctx.group, async_op=True), grad
        if torch.is_anomaly_enabled():  # anomaly detection reads the gradient at once
            _wait(*work)
        else:
            ctx.coming_home.append(work)
        return out, None, None, None


class _Unpack(torch.autograd.Function):
    """`[N, B, g, D + Dv]` -> `[B, g, n_key, D]`, `[B, g, n_key, Dv]` without a copy. Later tokens get zero gradients here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_key: int, width: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.n_key, ctx.width = x.shape, n_key, width
        seen = x.detach()[:n_key].permute(1, 2, 0, 3)
        return seen[..., :width], seen[..., width:]

    @staticmethod
    @_once
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        grad = key.new_empty(ctx.shape)
        grad[ctx.n_key :].zero_()
        seen = grad[: ctx.n_key].permute(1, 2, 0, 3)
        seen[..., : ctx.width], seen[..., ctx.width :] = key, value
        return grad, None, None


class _Whole(torch.autograd.Function):
    """`_Gather`, but waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        _wait(_all_gather(out, x, group=group, async_op=True), x)
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        _wait(_reduce_scatter(out, grad, group=ctx.group, async_op=True), grad)
        return out, None


def tokens_to_heads(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, L, D]` -> `[B, H / W, N, D]`: all tokens of this process's heads. Tensors of one dtype share one message."""
    return _AllToAll.apply(group, 1, 2, *tensors)


def heads_to_tokens(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H / W, N, D]` -> `[B, H, L, D]`: the inverse."""
    return _AllToAll.apply(group, 2, 1, *tensors)


class _AllToAll(torch.autograd.Function):
    """Each process gets its part of dimension `cut` from all processes, concatenated along dimension `join`."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, cut: int, join: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _all_to_all(group, cut, join, tensors)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_all_to_all(ctx.group, ctx.join, ctx.cut, grads)


def _all_to_all(group: dist.ProcessGroup, cut: int, join: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    parts = [torch.stack(x.chunk(group.size(), cut)) for x in tensors]  # one part per process
    sent = torch.cat([part.flatten(1) for part in parts], 1)
    received = torch.empty_like(sent)
    _wait(dist.all_to_all_single(received, sent, group=group, async_op=True), sent)
    pieces = received.split([part[0].numel() for part in parts], 1)
    return tuple(torch.cat(piece.reshape(part.shape).unbind(), join) for piece, part in zip(pieces, parts))


def _wait(work: dist.Work, _sent: Tensor) -> None:
    """On a GPU this makes the current stream wait, not the host."""
    try:
        work.wait()
    except RuntimeError as error:
        missing = missing_processes() or "another process has ended or hangs, see what it printed"
        raise RuntimeError(
            f"an exchange between the processes of one sequence failed on rank {dist.get_rank()} of {dist.get_world_size()}: "
            f"{missing} ({error})"
        ) from error
