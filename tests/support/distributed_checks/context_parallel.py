"""Sequences in slices: the operation and whole models, each process with a part of every sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.cases import Case, assert_same, operands, random
from support.distributed_checks.models import (
    FLOAT32_LOSS,
    assert_same_gradients,
    context_mesh,
    gradients,
    one_process,
    says,
    slices,
    tiny_model,
    tokens,
)
from support.stuck import here
from torch import Tensor

from moba_flex import moba_attention
from moba_flex.distributed import collectives, context_parallel, moba_attention_cp


def operator_is_equal(case: Case, size: int, by: str, implementation: str, message_bytes: int) -> None:
    """Outputs, log-sum-exps and gradients of the slices are those of the naive implementation on one process."""
    collectives.MESSAGE_BYTES = message_bytes
    of_cp = context_mesh(size)
    rank = of_cp["cp"].get_local_rank()
    whole = {name: x.to(here()).requires_grad_() for name, x in operands(case).items()}
    out, lse = moba_attention(**whole, **case.settings, return_lse=True, implementation="naive")
    upstream = random(*out.shape, seed=1).to(here()), random(*lse.shape, seed=2).to(here())
    expected = dict(zip(whole, torch.autograd.grad((out, lse), list(whole.values()), upstream)))

    mine = {name: x.detach() if name == "sinks" else slices(x.detach(), size, rank) for name, x in whole.items()}
    mine = {name: x.clone().requires_grad_() for name, x in mine.items()}
    settings = {name: x for name, x in case.settings.items() if name != "causal"}
    part, part_lse = moba_attention_cp(**mine, mesh=of_cp, exchange=by, **settings, return_lse=True, implementation=implementation)
    n_real = slices(out.detach(), size, rank).shape[2] if rank < size else 0
    real = max(0, min(n_real, case.n_key - rank * n_real))
    assert_same(part[:, :, :real], slices(out, size, rank)[:, :, :real], f"output of slice {rank}")
    assert_same(part_lse[:, :, :real], slices(lse[..., None], size, rank)[:, :, :real, 0], f"log-sum-exp of slice {rank}")
    upstream = slices(upstream[0], size, rank), slices(upstream[1][..., None], size, rank)[..., 0]
    actual = dict(zip(mine, torch.autograd.grad((part, part_lse), list(mine.values()), upstream)))
    for name, grad in actual.items():
        if name == "sinks":
            dist.all_reduce(grad, group=of_cp["cp"].get_group())
            assert_same(grad, expected[name], "gradient of sinks")
        else:
            assert_same(grad, slices(expected[name], size, rank), f"gradient of {name}, slice {rank}")


def flex_is_equal(size: int, by: str) -> None:
    """Compiled FlexAttention in bfloat16, in slices that no block divides, against itself on one process; differences as relative norms."""
    of_cp = context_mesh(size)
    rank = of_cp["cp"].get_local_rank()
    generator = torch.Generator(here()).manual_seed(0)
    shapes = (1, 8, 1500, 64), (1, 4, 1500, 64), (1, 4, 1500, 64), (1, 8, 1500, 64)
    *whole, upstream = (torch.randn(shape, generator=generator, device=here()).bfloat16() for shape in shapes)
    settings = {"block_size": 100, "top_k": 3, "implementation": "flex"}

    def results(attend, *tensors: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, **settings)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def in_slices(*tensors: Tensor, **settings) -> Tensor:
        return moba_attention_cp(*tensors, mesh=of_cp, exchange=by, **settings)

    expected = results(moba_attention, *whole, grad=upstream)
    actual = results(in_slices, *(slices(x, size, rank) for x in whole), grad=slices(upstream, size, rank))
    for name, x, y in zip(("output", "gradient of query", "of key", "of value"), actual, expected, strict=True):
        y = slices(y, size, rank).float()
        off = ((x.float() - y).norm() / y.norm()).item()
        assert off < 1e-2, f"{name} of slice {rank} differs by {off:.1e}"


def model_in_slices_is_equal(size: int, by: str, n_tokens: int, checkpointing: bool) -> None:
    """A right-padded batch with labels in slices, layers with full attention among the others."""
    of_cp = context_mesh(size)
    ids = tokens(2, n_tokens)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    logits, loss, expected = one_process(batch)

    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    context = context_parallel(model, of_cp, exchange=by)
    out = model(**context.shard(batch))
    whole = context.unshard(out.logits, n_tokens)
    assert_same(whole[mask == 1], logits[mask == 1], "logits")
    out.loss.backward()
    mean = out.loss.detach()
    dist.all_reduce(mean, group=context.group)
    assert_same(mean / size, loss, "loss", **FLOAT32_LOSS)
    for p in model.parameters():
        dist.all_reduce(p.grad, group=context.group)
        p.grad /= size
    assert_same_gradients(gradients(model), expected)

    context.remove()
    assert_same(model(**batch).loss, loss, "loss after remove()", **FLOAT32_LOSS)


def length_scaled_is_equal(size: int, rope: dict) -> None:
    """Rotary embeddings whose frequencies depend on the length: a short sequence, a long one, and a short one again."""
    lengths = {"rope_parameters": rope, "max_position_embeddings": 40 if rope["rope_type"] == "dynamic" else 256}
    model, whole = tiny_model(**lengths), tiny_model(**lengths)
    context_parallel(model, context_mesh(size), exchange="heads")
    context = context_parallel(model, context_mesh(size))
    for n_tokens in (24, 64, 32):
        batch = {"input_ids": tokens(2, n_tokens)}
        assert_same(context.unshard(model(**context.shard(batch)).logits), whole(**batch).logits, f"{n_tokens} tokens", **FLOAT32_LOSS)
    with says(ValueError, f"must have a multiple of the {size} processes"):
        context.shard({"input_ids": tokens(2, 8 * size + 1)})
    context.remove()
    assert_same(model(input_ids=tokens(2, 63)).logits, whole(input_ids=tokens(2, 63)).logits, "after remove()", **FLOAT32_LOSS)
