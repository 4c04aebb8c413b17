"""What checks on several processes share: meshes, slices, a small model, and what one process computes with it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from pytest import raises
from support.cases import assert_same
from support.stuck import here
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import moba_flex

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


def tiny(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 256, **sizes, **changes})


def tiny_model(**changes) -> nn.Module:
    """A patched Llama with one layer of full attention, the same on all processes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(**changes)).double().to(here())
    return moba_flex.patch(model, block_size=7, top_k=3, sink_blocks=1, full_attention_layers=[1])


def save_tiny_model(folder: Path) -> None:
    tiny_model().save_pretrained(folder)


def tokens(rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed)).to(here())


def sharded(model: nn.Module, over: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


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


def says(error: type[Exception], *words: str):
    return raises(error, match=".*".join(map(re.escape, words)))
