"""What is refused on every process with one clear error, so that none waits for another."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from support.cases import assert_same
from support.distributed_checks.models import VOCABULARY, context_mesh, mesh, says, tiny, tiny_model, tokens
from support.stuck import here
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import moba_flex
from moba_flex.distributed import context_parallel, moba_attention_cp
from moba_flex.models.state import context_of


def bad_input_is_refused() -> None:
    """Each with one clear error on every process, so that none waits for another."""
    of_cp = context_mesh(4)
    q, k = torch.randn(1, 6, 8, 4, device=here()), torch.randn(1, 3, 8, 4, device=here())
    blocks = {"block_size": 4, "top_k": 2}
    with says(ValueError, "6 query heads and 3 key heads", "4 processes", 'exchange="keys"'):
        moba_attention_cp(q, k, k, of_cp, exchange="heads", **blocks)
    with says(ValueError, "share_selection=True", "2 key heads out to 4 processes", 'exchange="keys"'):
        moba_attention_cp(q[:, :4], k[:, :2], k[:, :2], of_cp, exchange="heads", share_selection=True, **blocks)
    with says(ValueError, "exchange must be one of keys, heads, but is 'ring'"):
        moba_attention_cp(q, k, k, of_cp, exchange="ring", **blocks)
    with says(ValueError, 'one named "cp"', "('a', 'b')"):
        moba_attention_cp(q, k, k, mesh(2, 2, names=("a", "b")), **blocks)
    with says(TypeError, "mesh must be a DeviceMesh or a process group, but is an int"):
        moba_attention_cp(q, k, k, 4, **blocks)
    with says(ValueError, "return_lse must be True or False, but is 1"):
        moba_attention_cp(q, k, k, of_cp, return_lse=1, **blocks)
    for implementation in ("eager", "naive"):
        call = lambda x: moba_attention_cp(x, k, k, of_cp, implementation=implementation, **blocks).sum()  # noqa: B023, E731
        for transform in (lambda: torch.func.grad(call)(q), lambda: torch.vmap(call)(q[None]), lambda: torch.func.jvp(call, (q,), (q,))):  # noqa: B023
            with says(NotImplementedError, "torch.func", "do not go through exchanges between processes"):
                transform()
    with says(ValueError, "query has 4 tokens and key 8", "without a cache"):
        moba_attention_cp(q[:, :, :4], k, k, of_cp, **blocks)
    with says(ValueError, "LlamaForCausalLM does not use MoBA", "patch it first"):
        context_parallel(LlamaForCausalLM(tiny()), of_cp)
    with says(ValueError, "6 query heads", "4 processes"):
        context_parallel(tiny_model(hidden_size=24, num_attention_heads=6, num_key_value_heads=3), of_cp, exchange="heads")
    convolved = moba_flex.patch(LlamaForCausalLM(tiny()), **blocks, key_conv=3)
    with says(ValueError, "has key_conv", "key_conv=0"):
        context_parallel(convolved, of_cp)
    with says(ValueError, "mesh is a process group that rank", "is not in"):
        context_parallel(tiny_model(), dist.GroupMember.NON_GROUP_MEMBER)
    local = moba_flex.patch(Qwen2ForCausalLM(windowed()), **blocks)
    with says(ValueError, "Qwen2ForCausalLM has layers that are not full causal self-attention: 1"):
        context_parallel(local, of_cp)

    shared = tiny_model(num_key_value_heads=2)
    by_heads = context_parallel(shared, of_cp, exchange="heads")
    moba_flex.patch(shared, **blocks, share_selection=True)  # settings may change under way
    with says(ValueError, "share_selection=True", "2 key heads out to 4 processes"):
        shared(**by_heads.shard({"input_ids": tokens(2, 16)}))

    model = tiny_model()
    context = context_parallel(model, of_cp)
    with says(ValueError, "is context-parallel", "remove() first"):
        moba_flex.unpatch(model)
    ids = tokens(2, 16)
    with says(ValueError, "padding on the right"):
        context.shard({"input_ids": ids, "attention_mask": torch.arange(16, device=here()).expand(2, -1) > 2})
    with says(ValueError, "packed sequences cannot"):
        context.shard({"input_ids": ids, "position_ids": torch.arange(16, device=here()).expand(2, -1) % 8})
    with says(ValueError, "batch must have input_ids", "pixel_values"):
        context.shard({"input_ids": ids, "pixel_values": ids})
    with says(ValueError, "labels of shape (2, 8)", "(2, 16)"):
        context.shard({"input_ids": ids, "labels": ids[:, :8]})
    with says(ValueError, "must be the same on all 4 processes", "process 1: 1 x 16", "process 2: 2 x 16"):
        context.shard({"input_ids": ids[: 1 if context.rank == 1 else 2]})  # the uneven end of an epoch, say
    with says(ValueError, "must be the same on all 4 processes"):
        context.shard({"input_ids": tokens(2, 16, seed=context.rank)})
    others = {"input_ids": ids, "labels": ids.roll(1) if context.rank == 1 else ids}
    for batch in (others, {"input_ids": ids.flip(0) if context.rank == 2 else ids}, {"input_ids": ids, **({} if context.rank else others)}):
        with says(ValueError, "must be the same on all 4 processes", "process 3: 2 x 16"):
            context.shard(batch)
    with says(ValueError, "[B, N] with at least one token, but have shape (16,)"):
        context.shard({"input_ids": ids[0]})
    with says(ValueError, "labels of shape (1, 16)", "(2, 16)"):
        context.shard({"input_ids": ids, "labels": ids[:1]})
    numbers = ids.tolist()
    for kind, batch in {"a list": numbers, "an ndarray": ids.cpu().numpy(), "a NoneType": None}.items():
        with says(TypeError, f"input_ids of a batch must be a torch.Tensor, but is {kind}"):
            context.shard({"labels": ids, "input_ids": batch})
    for batch in (ids, None, [ids]):
        with says(TypeError, f'batch must be a mapping such as {{"input_ids": ids}}, but is a {type(batch).__name__}'):
            context.shard(batch)
    for name in ("input_ids", "labels"):
        with says(TypeError, f"{name} must be whole numbers", "torch.float32", ".long()"):
            context.shard({"input_ids": ids, name: ids.float()})
    wrong = {"input_ids": ids.float(), "labels": numbers, "attention_mask": "a mask", "position_ids": ids.to("meta")}
    for name, x in wrong.items():  # on one process, for which the others would wait
        batch = {"input_ids": ids, **({name: x} if context.rank == 1 else {})}
        error = RuntimeError if name == "position_ids" else TypeError  # PyTorch's own: any must end the agreement
        with says(error, "") if context.rank == 1 else says(ValueError, "cannot be cut into slices on process 1"):
            context.shard(batch)
    packed = torch.arange(16, device=here()) % (8 if context.rank == 1 else 16)
    with says(ValueError, "packed sequences cannot" if context.rank == 1 else "cannot be cut into slices on process 1"):
        context.shard({"input_ids": ids, "position_ids": packed.expand(2, -1)})
    with says(ValueError, "is context-parallel", "remove() first"):
        moba_flex.trace(model, ids)
    with says(ValueError, "key_conv=3", "context-parallel"):
        moba_flex.patch(model, **blocks, key_conv=3)
    dropping = tiny_model(attention_dropout=0.1).train()
    with says(ValueError, "dropout of 0.1", "set to 0"):
        dropping(**context_parallel(dropping, of_cp).shard({"input_ids": ids}))
    qkv = [torch.randn(1, 4, 8, 4, device=here(), requires_grad=True) for _ in range(3)]
    for by in ("keys", "heads"):
        out = moba_attention_cp(*qkv, of_cp, exchange=by, implementation="naive", **blocks)
        with says(RuntimeError, "create_graph=True", "first derivatives only"):
            torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with says(ValueError, "padding or packed sequences"):
        model(input_ids=ids, attention_mask=torch.arange(16, device=here()).expand(2, -1) > 2, use_cache=False)
    newer = context_parallel(model, of_cp, exchange="heads")
    context.remove()  # ends no other
    assert all(context_of(layer) is newer for layer in newer._layers)
    context = newer
    assert_same(copy.deepcopy(model)(**context.shard({"input_ids": ids})).logits, model(**context.shard({"input_ids": ids})).logits)


def windowed() -> Qwen2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    kinds = ["full_attention", "sliding_attention"]
    return Qwen2Config(vocab_size=VOCABULARY, use_sliding_window=True, sliding_window=8, layer_types=kinds, **sizes)
