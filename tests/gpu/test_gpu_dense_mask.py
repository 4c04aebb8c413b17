"""Few blocks on a GPU: all past blocks are computed, under a dense mask of the chosen ones. Equal to the specification and to routing."""

from __future__ import annotations

import random

import pytest
import torch
from support.cases import bounds, laid_out
from support.gpu import TOLERANCE, always_routed, distance
from torch import Tensor

from moba_flex import explain, moba_attention, moba_attention_varlen, set_cuda_graphs
from moba_flex.cuda_graphs.cache import EAGER_CALLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: FlexAttention compiles to Triton kernels"),
]

LAYOUTS = ["contiguous", "tokens first", "sliced", "every other", "expanded"]
BLOCKS = {"block_size": 128, "top_k": 3}


def drawn(seed: int, implementation: str) -> tuple[list[Tensor], dict, dict]:
    """Query, key and value; what tells of rows or packed sequences; and settings."""
    draw = random.Random(seed)
    block_size = draw.choice([64, 64, 128, 128, 192, 256] if implementation == "triton" else [48, 64, 100, 128, 128, 300])
    sinks, recent = draw.choice([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)])
    top_k = 1 + sinks + recent + draw.randint(1, 4)
    settings = {"block_size": block_size, "top_k": top_k, "sink_blocks": sinks, "recent_blocks": recent}
    settings |= {"softcap": draw.choice([None, None, 2.0]), "share_selection": draw.random() < 0.3, "scale": draw.choice([None, 0.3, -0.2])}
    n_key = draw.randint(block_size + 1, min(block_size * (top_k + 3), (block_size + 180) * top_k, 2000))
    kind = draw.choice(["rows", "last queries", "padded", "packed"])
    groups, repeats, batch = draw.randint(1, 3), draw.randint(1, 4), 1 if kind == "packed" else draw.randint(1, 3)
    n_query = draw.randint(1, n_key) if kind == "last queries" else n_key
    width, value_width = draw.choice([(64, 64), (128, 128), (96, 64), (33, 128), (16, 16)])
    told: dict = {}
    if kind == "padded":
        position = torch.arange(n_key, device="cuda")
        cuts = [sorted(draw.sample(range(n_key + 1), 2)) for _ in range(batch)]
        told["padding_mask"] = torch.stack([(position >= a) & (position < b) for a, b in cuts])
    if kind == "packed":
        cuts = sorted(draw.sample(range(n_key), 2))
        told["cu_seqlens"] = bounds(cuts[0], cuts[1] - cuts[0], 0, n_key - cuts[1]).cuda()
    dtype, layout = draw.choice([torch.bfloat16, torch.float16]), LAYOUTS[seed % len(LAYOUTS)]
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (groups * repeats, n_query, width), (groups, n_key, width), (groups, n_key, value_width)
    numbers = [torch.randn(batch, *shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    return [laid_out(x, layout).requires_grad_() for x in numbers], told, settings


def results(leaves: list[Tensor], told: dict, settings: dict, implementation: str) -> list[Tensor]:
    """Output, finite log-sum-exp and gradients of a loss that uses both."""
    if "cu_seqlens" in told:
        flat = [x[0].transpose(0, 1) for x in leaves]
        out, lse = moba_attention_varlen(*flat, **told, **settings, return_lse=True, implementation=implementation)
    else:
        out, lse = moba_attention(*leaves, **told, **settings, return_lse=True, implementation=implementation)
    lse = torch.where(lse == -torch.inf, 0, lse)
    weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [out, lse, *torch.autograd.grad((out.float() * weight).sum() + lse.sin().sum(), leaves)]


def path(leaves: list[Tensor], told: dict, settings: dict, implementation: str) -> str:
    operands = [x[0].transpose(0, 1) for x in leaves] if "cu_seqlens" in told else leaves
    return explain(*operands, **told, **settings, return_lse=True, implementation=implementation).path


@pytest.mark.parametrize("implementation", ["flex", "triton"])
@pytest.mark.parametrize("seed", range(20))
def test_values_and_gradients_are_those_of_the_specification(seed, implementation):
    leaves, told, settings = drawn(seed, implementation)
    assert path(leaves, told, settings, implementation) == "dense mask"
    wanted = results([x.detach().float().requires_grad_() for x in leaves], told, settings, "naive")
    got = results(leaves, told, settings, implementation)
    with always_routed():
        assert path(leaves, told, settings, implementation) == "routed"
        routed = results(leaves, told, settings, implementation)
    for name, a, b, c in zip(("output", "lse", "dq", "dk", "dv"), got, wanted, routed):
        assert a.shape == b.shape and a.dtype == c.dtype and a.stride() == c.stride(), name
        assert distance(a, b) < TOLERANCE[leaves[0].dtype], (name, distance(a, b), distance(c, b))


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_as_many_blocks_as_a_query_has_bits(implementation):
    """With "flex" the last one is the sign, of queries whose own block it is."""
    n = 64 * (64 if implementation == "triton" else 32) - 3
    leaves = [torch.randn(1, h, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (2, 1, 1)]
    settings = {"block_size": 64, "top_k": 9}
    assert path(leaves, {}, settings, implementation) == "dense mask"
    assert path([torch.cat([x, x[:, :, :4]], 2) for x in leaves], {}, settings, implementation) == "routed"
    got = results(leaves, {}, settings, implementation)
    with always_routed():
        wanted = results(leaves, {}, settings, implementation)
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, wanted):
        assert distance(a, b) < TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("implementation", ["flex", "triton"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_nan_in_padding_and_in_another_sequence_changes_nothing(kind, implementation):
    leaves = [torch.randn(1, h, 900, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    hidden = torch.zeros(900, dtype=torch.bool, device="cuda")
    if kind == "padded":
        hidden[:150] = True
        hidden[850:] = True
        told = {"padding_mask": ~hidden[None]}
    else:
        hidden[130:300] = True
        told = {"cu_seqlens": bounds(130, 170, 600).cuda()}
    assert path(leaves, told, BLOCKS, implementation) == "dense mask"
    spoilt = [x.detach().masked_fill(hidden[:, None], torch.nan).requires_grad_() for x in leaves]

    def of_the_rest(leaves: list[Tensor]) -> list[Tensor]:
        """Output and gradients."""
        if kind == "padded":
            out = moba_attention(*leaves, **told, **BLOCKS, implementation=implementation)
        else:
            out = moba_attention_varlen(*(x[0].transpose(0, 1) for x in leaves), **told, **BLOCKS, implementation=implementation)
            out = out.transpose(0, 1)[None]
        out = out[:, :, ~hidden]
        return [out, *(x[:, :, ~hidden] for x in torch.autograd.grad(out.float().sin().sum(), leaves))]

    for a, b in zip(of_the_rest(spoilt), of_the_rest(leaves)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_a_graph_gives_the_same_bits(implementation, replays):
    def leaves(seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn(2, h, 700, 64, generator=generator, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2)]

    before = set_cuda_graphs(False)
    wanted = [results(leaves(seed), {}, BLOCKS, implementation) for seed in range(EAGER_CALLS + 3)]
    set_cuda_graphs(before)
    for seed, one in enumerate(wanted):
        for a, b in zip(results(leaves(seed), {}, BLOCKS, implementation), one):
            assert torch.equal(a, b), seed
    assert replays


def test_where_routing_is_faster_it_is_taken():
    """On an H200, with width 128 and 32 heads, the two take equally long at about 5,300 tokens, and more than 32 blocks have no bits."""

    def found(n: int, implementation: str, **more) -> str:
        x = torch.empty(1, 2, n, 128, device="cuda", dtype=torch.bfloat16)
        return explain(x, x, **{"block_size": 128, "top_k": 8, **more}, implementation=implementation).path

    assert [found(n, "flex") for n in (1024, 1025, 4096, 4097)] == ["dense", "dense mask", "dense mask", "routed"]
    assert [found(n, "triton") for n in (1024, 1025, 5248, 5249)] == ["dense", "dense mask", "dense mask", "routed"]
    assert [found(2048, name, block_size=32) for name in ("flex", "triton")] == ["routed"] * 2
    assert [found(2048, name, block_size=100) for name in ("flex", "triton")] == ["dense mask", "routed"]
    assert found(2048, "flex", causal=False) == found(2048, "flex", top_k=1) == "routed"
