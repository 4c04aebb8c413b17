"""What the processes of `test_distributed.py` do. Every function runs on all of them, and raises where they differ from one process."""

from __future__ import annotations

import copy
import os
import re
from functools import lru_cache
from pathlib import Path
from unittest.mock import Mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from pytest import raises
from support.cases import Case, assert_same, operands, random
from support.cpus_as_gpus import let_cpus_pass_as_gpus
from support.stuck import here
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.distributed import DistributedConfig

import moba_flex
from moba_flex import moba_attention
from moba_flex.distributed import collectives, context_parallel, moba_attention_cp
from moba_flex.distributed.attention import across
from moba_flex.models.state import context_of

VOCABULARY = 64
FLOAT32_LOSS = {"rtol": 1e-6, "atol": 1e-8}  # transformers takes a float64 model's loss in float32


@lru_cache
def mesh(*shape: int, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh over all processes."""
    return init_device_mesh(here().type, shape, mesh_dim_names=names)


def context_mesh(size: int) -> DeviceMesh:
    """Context parallelism over `size` processes, as often as they fit."""
    return mesh(dist.get_world_size() // size, size, names=("dp", "cp"))


def slices(x: Tensor, size: int, rank: int) -> Tensor:
    """`[B, H, N, D]` -> this process's slice of it, padded with zeros."""
    length = -(-x.shape[2] // size)
    return nn.functional.pad(x, (0, 0, 0, length * size - x.shape[2]))[:, :, rank * length : (rank + 1) * length]


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


def tiny(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 256, **sizes, **changes})


def tiny_model(**changes) -> nn.Module:
    """A patched Llama with one layer of full attention, the same on all processes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(**changes)).double().to(here())
    return moba_flex.patch(model, block_size=7, top_k=3, sink_blocks=1, full_attention_layers=[1])


def tokens(rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed)).to(here())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert_same(actual[name], grad, f"gradient of {name}", **FLOAT32_LOSS)


def one_process(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of the model on one process."""
    model = tiny_model()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


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


def data_parallel_is_equal() -> None:
    """DDP: every process has rows of its own."""
    ids = tokens(4, 40)
    _, _, expected = one_process({"input_ids": ids, "labels": ids})
    model = DistributedDataParallel(tiny_model())
    mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
    model(input_ids=mine, labels=mine).loss.backward()
    assert_same_gradients(gradients(model), expected)


def sharded(model: nn.Module, over: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def new_weights_after_sharding_are_refused() -> None:
    for model in (sharded(tiny_model(), mesh(dist.get_world_size(), names=("dp",))), DistributedDataParallel(tiny_model())):
        with says(ValueError, "key_conv=3", "must be there before"):
            moba_flex.patch(model, block_size=7, top_k=3, key_conv=3)
    blocks = {"block_size": 7, "top_k": 3}
    for change in ({"key_conv": 5}, {"key_conv": 3, "full_attention_layers": []}):  # another size, and one more layer
        model = moba_flex.patch(tiny_model(), **blocks, key_conv=3, full_attention_layers=[1])
        with says(ValueError, "must be there before DistributedDataParallel"):
            moba_flex.patch(DistributedDataParallel(model), **blocks, **change)


def sharded_is_equal() -> None:
    """FSDP2: parameters are sharded, every process has rows of its own; settings change under way."""
    ids = tokens(4, 40)
    _, _, expected = one_process({"input_ids": ids, "labels": ids})
    model = sharded(tiny_model(), mesh(dist.get_world_size(), names=("dp",)))
    mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
    with torch.no_grad(), moba_flex.full_attention(model):
        model(input_ids=mine)
    model(input_ids=mine, labels=mine).loss.backward()
    assert_same_gradients(gradients(model), expected)


def sharded_in_slices_is_equal(by: str) -> None:
    """FSDP2 over all four processes, two of which share a sequence each."""
    ids = tokens(2, 45)
    _, _, expected = one_process({"input_ids": ids, "labels": ids})
    of_cp = context_mesh(2)
    model = sharded(tiny_model(), mesh(4, names=("dp_shard_cp",)))
    context = context_parallel(model, of_cp, exchange=by)
    mine = ids[of_cp["dp"].get_local_rank()][None]
    model(**context.shard({"input_ids": mine, "labels": mine})).loss.backward()
    assert_same_gradients(gradients(model), expected)


def save_tiny_model(folder: Path) -> None:
    tiny_model().save_pretrained(folder)


def tensor_parallel_with_convolutions_is_refused(folder: str) -> None:
    plan = DistributedConfig(tp_plan="auto")
    model = moba_flex.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=plan)
    with says(ValueError, "channels of keys", "tensor parallelism", "key_conv=0"):
        model(input_ids=tokens(2, 16))


def tensor_parallel_is_equal(folder: str) -> None:
    """transformers' tensor parallelism: every process has some of the heads."""
    ids = tokens(2, 45)
    logits, _, expected = one_process({"input_ids": ids, "labels": ids})
    how = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=how, attn_implementation="moba", dtype=torch.float64)
    heads_here = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    assert heads_here == 32 // dist.get_world_size()
    out = model(input_ids=ids, labels=ids)
    assert_same(out.logits, logits, "logits")
    out.loss.backward()
    assert_same_gradients(gradients(model), expected)


def accelerate_is_equal(by: str) -> None:
    """accelerate's FSDP2 with activation checkpointing over all processes, two of which share a sequence each, by `ParallelismConfig`."""
    if here().type == "cpu":
        let_cpus_pass_as_gpus()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=True)
    accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=ParallelismConfig(dp_shard_size=2, cp_size=2))
    ids = tokens(2, 45)
    _, loss, expected = one_process({"input_ids": ids, "labels": ids})
    model = tiny_model()
    batches = DataLoader([{"input_ids": row, "labels": row} for row in ids])
    model, _, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), batches)
    context = context_parallel(model, accelerator.torch_device_mesh, exchange=by)
    (batch,) = batches  # accelerate gives the processes of one sequence the same one
    out = model(**context.shard(batch))
    accelerator.backward(out.loss)
    assert_same(accelerator.reduce(out.loss.detach(), "mean"), loss, "loss", **FLOAT32_LOSS)
    assert_same_gradients({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}, expected)


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


def one_ends() -> None:
    """In the middle of a model's forward pass, as when memory runs out."""
    model = tiny_model()
    context = context_parallel(model, mesh(dist.get_world_size(), names=("cp",)))
    if dist.get_rank() == 1:
        model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(7))
    model(**context.shard({"input_ids": tokens(1, 32)}))


def says(error: type[Exception], *words: str):
    return raises(error, match=".*".join(map(re.escape, words)))


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
    with says(TypeError, "mesh must be a DeviceMesh or a process group, but is a int"):
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
    for kind, batch in {"list": numbers, "ndarray": ids.cpu().numpy(), "NoneType": None}.items():
        with says(TypeError, f"input_ids of a batch must be a torch.Tensor, but is a {kind}"):
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
        out, _ = across(q, k, v, context_mesh(2)["cp"].get_group(), "keys", attention)
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
