"""On a GPU: settings far larger than the input, what PyTorch does around a call, and models that share keys. See `test_edges.py`."""

from __future__ import annotations

import math

import pytest
import torch
from support.families import FAMILIES, SPARSE, assert_close, build, logits, padded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_flex import moba_attention, moba_attention_varlen, patch, select_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: FlexAttention compiles to Triton kernels"),
]
BLOCKS = {"block_size": 16, "top_k": 3}
TOLERANCE = 2e-5  # of float32


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda").requires_grad_() for shape in shapes]


def assert_equal(call, inputs: list[Tensor]) -> None:
    """`call(implementation)` has the specification's values and gradients of `inputs`."""
    results = []
    for implementation in ("flex", "naive"):
        out = call(implementation)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for ours, expected in zip(*results):
        assert ours.isfinite().all()
        assert (ours - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_short_packed_sequences_in_a_long_block(causal):
    bounds = torch.tensor([0, 1, 1, 131, 400, 450], dtype=torch.int32, device="cuda")
    inputs = tensors((450, 4, 64), (450, 2, 64), (450, 2, 64))
    for block_size in (200, 4096):
        settings = {"block_size": block_size, "top_k": 2, "causal": causal}
        assert_equal(lambda name: moba_attention_varlen(*inputs, bounds, implementation=name, **settings), inputs)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [4, 8, 12])
@pytest.mark.parametrize("width", [192, 256, 512, 576])
def test_the_gate_chooses_among_wide_keys(width, top_k, dtype):
    query, key = (x.detach().to(dtype) for x in tensors((1, 2, 2000, width), (1, 1, 2000, width)))
    for block_size in (64, 128):
        settings = {"block_size": block_size, "top_k": top_k, "sink_blocks": 1}
        chosen = [select_blocks(q, k, **settings).indices.cpu() for q, k in ((query, key), (query.cpu(), key.cpu()))]
        assert (chosen[0] != chosen[1]).any(-1).float().mean() < 2e-3  # scores that are equal but for rounding


def test_nothing_is_left_to_choose_beside_first_and_latest_blocks():
    inputs = tensors((1, 4, 1100, 64), (1, 2, 1100, 64), (1, 2, 1100, 64))
    settings = {"block_size": 16, "top_k": 5, "sink_blocks": 1, "recent_blocks": 3}
    assert_equal(lambda name: moba_attention(*inputs, implementation=name, **settings), inputs)


@pytest.mark.parametrize("top_k", [65, 1000, 2**31])
def test_far_more_blocks_than_there_are_is_all_of_them(top_k):
    inputs = tensors((1, 4, 1100, 64), (1, 2, 1100, 64), (1, 2, 1100, 64))
    assert_equal(lambda name: moba_attention(*inputs, block_size=16, top_k=top_k, implementation=name), inputs)  # 69 blocks


def test_a_sink_of_minus_infinity_beside_padding():
    (sinks,) = tensors((4,))
    sinks = torch.where(torch.arange(4, device="cuda") == 0, -math.inf, sinks.detach()).requires_grad_()
    inputs = tensors((2, 4, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    real = torch.arange(300, device="cuda") >= torch.tensor([[0], [113]], device="cuda")
    settings = {**BLOCKS, "padding_mask": real, "sinks": sinks}
    assert_equal(lambda name: moba_attention(*inputs, **settings, implementation=name), [*inputs, sinks])


def test_forward_mode_derivatives_are_refused():
    query, key, value = (x.detach() for x in tensors((1, 4, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64)))
    with pytest.raises(NotImplementedError, match='need implementation="naive"'):
        torch.func.jvp(lambda x: moba_attention(x, key, value, **BLOCKS), (query,), (torch.ones_like(query),))


def test_what_is_selected_under_autocast_is_what_is_read():
    query, key = (x.detach() for x in tensors((2, 4, 900, 64), (2, 2, 900, 64)))
    expected = select_blocks(query, key, **BLOCKS)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(select_blocks(query, key, **BLOCKS).indices, expected.indices)


def test_a_call_with_fake_tensors_leaves_nothing_for_real_ones():
    shape = 1, 2, 333, 64  # of no other test, so that nothing is kept of it yet
    with FakeTensorMode():
        fake = [torch.empty(shape, device="cuda") for _ in range(3)]
        assert moba_attention(*fake, **BLOCKS).shape == shape
    inputs = tensors(shape, shape, shape)
    assert_equal(lambda name: moba_attention(*inputs, **BLOCKS, implementation=name), inputs)


@pytest.mark.parametrize("decode", ["full", "sparse"])
@pytest.mark.parametrize("family", [name for name in ("llama", "gemma4", "gpt_oss") if name in FAMILIES])
def test_a_model_computes_and_generates_as_on_a_cpu(family, decode):
    """Gemma 4 shares keys between layers and cuts masks to the last tokens; GPT-OSS has attention sinks."""
    results = []
    for device in ("cuda", "cpu"):
        model = patch(build(family).to(device), **SPARSE, decode=decode)
        inputs = {name: x.to(device) for name, x in padded("left").items()}
        found = logits(model, inputs).cpu()
        del inputs["position_ids"]
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
        results.append((found, torch.stack(made.logits, 1).cpu(), made.sequences.cpu()))
    ours, expected = results
    assert_close(ours[0], expected[0], family)
    assert torch.equal(ours[2], expected[2])
    assert_close(ours[1], expected[1], family)
