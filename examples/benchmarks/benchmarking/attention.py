"""The attention comparison of `benchmark.py`: the systems, and their inputs.

B batch, H query heads, G key heads, N tokens, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moba_flex import moba_attention, set_flex_backend

from .measure import Call
from .results import OURS

FORWARD, BOTH = "forward", "forward + backward"


KEYS = {
    "uniform": "uniform keys (random, so that no block is read more often than others)",
    "skewed": "skewed keys (every query wants the same tenth of the blocks)",
}


@dataclass(frozen=True)
class Settings:
    """One row of the comparison."""

    batch: int
    heads: int
    key_heads: int
    width: int
    block_size: int
    top_k: int
    dtype: str
    repeats: int
    keys: str = "uniform"  # one of KEYS
    one_group: bool = False  # measure one key head with its query heads, and multiply times by the number of these groups

    @property
    def groups(self) -> int:
        return self.batch * self.key_heads if self.one_group else 1

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The measured shapes of query, key and value."""
        heads = (self.heads, self.key_heads, self.key_heads)
        if self.one_group:
            return [(1, h // self.key_heads, tokens, self.width) for h in heads]
        return [(self.batch, h, tokens, self.width) for h in heads]

    def title(self) -> str:
        title = f"batch {self.batch}, {self.heads} query heads on {self.key_heads}, D {self.width}, block {self.block_size}, "
        title += f"top-{self.top_k}, {self.dtype}, {KEYS[self.keys]}"
        return title + (f"; one of {self.groups} groups measured, times multiplied, memory of one" if self.groups > 1 else "")


# The compared functions. A function takes query `[B, H, N, D]`, key and value `[B, G, N, D]` and the settings, and returns `[B, H, N, D]`;
# a packed one takes and returns `[B * N, H, D]`.


def moba(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    return moba_attention(query, key, value, block_size=settings.block_size, top_k=settings.top_k)


def moba_triton(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    return moba_attention(query, key, value, block_size=settings.block_size, top_k=settings.top_k, implementation="triton")


def moba_flash(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    before = set_flex_backend("flash")
    try:
        return moba(query, key, value, settings)
    finally:
        set_flex_backend(before)


def sdpa(backend: SDPBackend | list[SDPBackend], query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def flex(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    mask = causal_mask(query.shape[2], query.device)
    options = {"BLOCKS_ARE_CONTIGUOUS": True}
    return compiled_flex()(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1], kernel_options=options)


def flash_moba(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    from flash_moba import flash_moba_varlen_func

    ends, n = packed(query, settings)
    return flash_moba_varlen_func(query, key, value, ends, ends, n, n, settings.block_size, settings.top_k, causal=True)


def moonshot_moba(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    from moba import moba_attn_varlen

    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))  # it needs as many key heads as query heads
    ends, n = packed(query, settings)
    return moba_attn_varlen(query, key, value, ends, n, moba_chunk_size=settings.block_size, moba_topk=settings.top_k)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # each length gets its own kernels, the fastest that FlexAttention has
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def causal(b, h, q, kv):
    return q >= kv


@cache
def causal_mask(tokens: int, device: torch.device, tile: int = 128) -> BlockMask:
    """The block mask of causal attention: a tile of queries reads the tile of the same index partly, and all earlier tiles fully.

    These are contiguous tiles, so their first index is enough (`BLOCKS_ARE_CONTIGUOUS`). `create_block_mask` would allocate tokens x
    tokens, 128 GiB at 131,072.
    """
    i = torch.arange(-(-tokens // tile), device=device, dtype=torch.int32)
    one, first, later = torch.ones_like(i), torch.zeros_like(i), (i + 1).clamp(max=len(i) - 1)
    runs = (one, i), (i, first), (one, i), (len(i) - 1 - i, later)  # partial and full tiles of keys; partial and full tiles of queries
    lists = [x for n, start in runs for x in (n[None, None].contiguous(), start[None, None, :, None].contiguous())]
    return BlockMask((tokens, tokens), *lists, BLOCK_SIZE=(tile, tile), mask_mod=causal)


def packed(query: Tensor, settings: Settings) -> tuple[Tensor, int]:
    """`cu_seqlens` of a packed batch, and the length of each sequence."""
    batch = settings.shapes(1)[0][0]
    return bounds(batch, query.shape[0] // batch, query.device), query.shape[0] // batch


@cache
def bounds(batch: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens


@dataclass(frozen=True)
class System:
    call: Callable[..., Tensor]
    growth: int  # time grows with this power of the length, for estimates
    devices: tuple[str, ...] = ("cuda",)  # devices on which it is compared by default
    needs: str | None = None  # a module that must be importable
    packed: bool = False
    needs_cuda: bool = False
    largest_block: int | None = None
    dtypes: tuple[str, ...] = ()  # empty: all

    def takes(self, row: Settings) -> bool:
        """Whether the system supports these settings."""
        return (self.largest_block is None or row.block_size <= self.largest_block) and (not self.dtypes or row.dtype in self.dtypes)


SYSTEMS = {
    OURS: System(moba, 1, ("cuda", "cpu")),
    f"{OURS}-triton": System(moba_triton, 1, needs_cuda=True, largest_block=256, dtypes=("bfloat16", "float16")),
    f"{OURS}-flash": System(moba_flash, 1, (), needs="flash_attn.cute", needs_cuda=True),  # large blocks, forward
    "dense-fa2": System(partial(sdpa, SDPBackend.FLASH_ATTENTION), 2, needs_cuda=True),
    "dense-cudnn": System(partial(sdpa, SDPBackend.CUDNN_ATTENTION), 2, needs_cuda=True),
    "dense-flex": System(flex, 2),
    "dense-sdpa": System(partial(sdpa, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), 2, ("cpu",)),
    "flash-moba": System(flash_moba, 1, needs="flash_moba", needs_cuda=True, packed=True),
    "moonshot-moba": System(moonshot_moba, 1, needs="moba", needs_cuda=True, packed=True),
}


class Attention:
    def __init__(self, row: Settings, device: torch.device, systems: list[str], forward_only: bool) -> None:
        self.row, self.device, self.systems = row, device, systems
        self.passes = [FORWARD] if forward_only else [FORWARD, BOTH]
        self.scale = row.groups

    def title(self) -> str:
        return self.row.title()

    def settings(self) -> dict:
        return {"workload": "attention", **vars(self.row)}

    def growth(self, system: str) -> int:
        return SYSTEMS[system].growth

    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call:
        """The call on the sample's random inputs, which are the same for all systems, in the layout that the system needs."""
        make, packed = SYSTEMS[system].call, SYSTEMS[system].packed
        tensors = [x.transpose(1, 2).flatten(0, 1) if packed else x for x in self.inputs(tokens, sample, pass_ == BOTH)]
        leaves, grad = [x.detach().requires_grad_(pass_ == BOTH) for x in tensors[:3]], tensors[3:]
        return one_pass(lambda *operands: make(*operands, self.row), leaves, grad, pass_)

    def inputs(self, tokens: int, sample: int, grad: bool) -> list[Tensor]:
        """Query, key, value and, for a backward pass, the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(sample)
        normal = partial(torch.randn, generator=generator, device=self.device, dtype=getattr(torch, self.row.dtype))
        query, key, value = map(normal, self.row.shapes(tokens))
        if self.row.keys == "skewed":
            # A common direction is added to all queries, and to the keys of every tenth block, whose means then exceed all others.
            lean = 0.5 * normal(self.row.width).sign()
            query += lean
            key += lean * (torch.arange(tokens, device=self.device) // self.row.block_size % 10 == 0)[:, None]
        return [query, key, value, *([normal(query.shape)] if grad else [])]


def one_pass(attention: Callable[..., Tensor], leaves: list[Tensor], grad: list[Tensor], pass_: str) -> Call:
    """The timed call of `attention` on query, key and value. `grad`: for a backward pass, the gradient of the output."""

    def forward() -> None:
        with torch.no_grad():
            attention(*leaves)

    def both() -> None:
        torch.autograd.grad(attention(*leaves), leaves, grad)

    return both if pass_ == BOTH else forward


def available(names: list[str] | None, device: torch.device, row: Settings) -> tuple[list[str], dict[str, str]]:
    """The systems to compare, and why others are left out. Without names, all that the device has by default and that take `row`."""
    chosen, missing = [], {}
    usual = [name for name, system in SYSTEMS.items() if device.type in system.devices and system.takes(row)]
    for name in names or usual:
        system = SYSTEMS[name]
        try:
            if system.needs:
                importlib.import_module(system.needs)
        except Exception as error:  # an extension built for another PyTorch may raise anything
            missing[name] = f"{type(error).__name__}: {error}"
        else:
            if system.needs_cuda and device.type != "cuda":
                missing[name] = "needs CUDA"
            elif not system.takes(row):
                missing[name] = f"does not take blocks of {row.block_size} in {row.dtype}"
            else:
                chosen.append(name)
    return chosen, missing
