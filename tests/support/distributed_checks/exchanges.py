"""What processes send to each other: how many bytes, in what order, how much is held meanwhile, and one that ends."""

from __future__ import annotations

import os
from unittest.mock import Mock

import torch
import torch.distributed as dist
from support.distributed_checks.models import context_mesh, mesh, tiny_model, tokens
from support.stuck import here
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moba_flex.distributed import collectives, context_parallel, moba_attention_cp
from moba_flex.distributed.attention import context_parallel_attention


class Sent:
    """Within the `with` block counts the bytes that this process sends to others, by collective, whatever way they take."""

    def __enter__(self) -> dict[str, int]:
        self.sent: dict[str, int] = {"gather": 0, "reduce-scatter": 0, "all-to-all": 0}
        self.before = collectives._all_gather, collectives._reduce_scatter, dist.all_to_all_single

        def count(name: str, collective, to_each):
            def counted(out: Tensor, x: Tensor, *, group: dist.ProcessGroup, **options):
                self.sent[name] += (group.size() - 1) * to_each(x, group.size()) * x.element_size()
                return collective(out, x, group=group, **options)

            return counted

        whole, part = lambda x, _: x.numel(), lambda x, size: x.numel() // size
        collectives._all_gather = count("gather", self.before[0], whole)
        collectives._reduce_scatter = count("reduce-scatter", self.before[1], part)
        dist.all_to_all_single = count("all-to-all", self.before[2], part)
        return self.sent

    def __exit__(self, *_) -> None:
        collectives._all_gather, collectives._reduce_scatter, dist.all_to_all_single = self.before


def bytes_sent(by: str, size: int, length: int, heads: int, groups: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of one layer's forward and backward, at batch 1 in float32."""
    q, k, v = (torch.randn(1, h, length, width, device=here(), requires_grad=True) for h in (heads, groups, groups))
    with Sent() as forward:
        out = moba_attention_cp(q, k, v, context_mesh(size), exchange=by, block_size=8, top_k=2)
    with Sent() as backward:
        out.sum().backward()
    return forward, backward


def order_of_events() -> tuple[list[str], list[str]]:
    """Of gathering keys in three messages, forward and backward."""
    events: list[str] = []
    started: dict[dist.Work, str] = {}
    before = collectives.MESSAGE_BYTES, collectives._all_gather, collectives._reduce_scatter, collectives._wait

    def log(name: str, collective):
        def logged(*tensors: Tensor, **options) -> dist.Work:
            work = collective(*tensors, **options)
            started[work] = f"{name} {sum(what.startswith(name) for what in started.values())}"
            events.append(f"start {started[work]}")
            return work

        return logged

    def wait(work: dist.Work, sent: Tensor) -> None:
        events.append(f"wait for {started[work]}")
        before[3](work, sent)

    def attention(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> tuple[Tensor, None]:
        events.append(f"attention {heads.start}")
        out = query + key[:, :, -query.shape[2] :]
        out.register_hook(lambda _: events.append(f"attention's backward {heads.start}"))
        return out, None

    collectives.MESSAGE_BYTES, collectives._all_gather, collectives._reduce_scatter = 1, log("gather", before[1]), log("sum", before[2])
    collectives._wait = wait
    try:
        q, k, v = torch.randn(3, 1, 3, 4, 2, device=here(), requires_grad=True).unbind()
        out, _ = context_parallel_attention(q, k, v, context_mesh(2)["cp"].get_group(), "keys", attention)
        forward = list(events)
        events.clear()
        out.sum().backward()
        return forward, events
    finally:
        collectives.MESSAGE_BYTES, collectives._all_gather, collectives._reduce_scatter, collectives._wait = before


def most_messages_held() -> int:
    """How many gathered messages there are at a time while attention works, without gradients.

    Nothing travels: gloo's thread holds a message for a moment after it has arrived, and what is counted is what attention holds.
    """
    messages: list[StorageWeakRef] = []
    held: list[int] = []
    before = collectives.MESSAGE_BYTES, collectives._all_gather

    def gather(out: Tensor, x: Tensor, **_) -> Mock:
        messages.append(StorageWeakRef(out.untyped_storage()))
        held.append(sum(not message.expired() for message in messages))
        out.copy_(x.repeat(out.shape[0] // x.shape[0], *[1] * (x.dim() - 1)))
        return Mock(dist.Work)

    collectives.MESSAGE_BYTES, collectives._all_gather = 1, gather
    try:
        with torch.no_grad():
            q, k, v = torch.randn(3, 1, 4, 8, 2, device=here()).unbind()
            moba_attention_cp(q, k, v, context_mesh(2), block_size=4, top_k=2)
    finally:
        collectives.MESSAGE_BYTES, collectives._all_gather = before
    assert len(messages) == 4
    return max(held)


def one_ends() -> None:
    """In the middle of a model's forward pass, as when memory runs out."""
    model = tiny_model()
    context = context_parallel(model, mesh(dist.get_world_size(), names=("cp",)))
    if dist.get_rank() == 1:
        model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(7))
    model(**context.shard({"input_ids": tokens(1, 32)}))
