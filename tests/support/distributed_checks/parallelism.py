"""Data, sharded and tensor parallelism, and with accelerate, alone and together with sequences in slices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from support.cases import assert_same
from support.cpus_as_gpus import let_cpus_pass_as_gpus
from support.distributed_checks.models import (
    FLOAT32_LOSS,
    assert_same_gradients,
    context_mesh,
    gradients,
    mesh,
    one_process,
    says,
    sharded,
    tiny_model,
    tokens,
)
from support.stuck import here
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moba_flex
from moba_flex.distributed import context_parallel


def data_parallel_is_equal() -> None:
    """DDP: every process has rows of its own."""
    ids = tokens(4, 40)
    _, _, expected = one_process({"input_ids": ids, "labels": ids})
    model = DistributedDataParallel(tiny_model())
    mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
    model(input_ids=mine, labels=mine).loss.backward()
    assert_same_gradients(gradients(model), expected)


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
