"""The edges of what the operation takes: settings far larger than the input, no input at all, and what PyTorch does around a call."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import FAMILIES, logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

import moba_flex
from moba_flex import compat, dispatch, moba_attention, moba_attention_varlen, patch, select_blocks
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops.decoding import means_for, write_means

BLOCKS = {"block_size": 16, "top_k": 3}


def tensors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad) for _ in range(3)]


def kept_for_backward(call, *args, **kwargs) -> int:
    """Numbers that autograd keeps of a call."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        call(*args, **kwargs)
    return sum(sizes)


# Settings far larger than the input


@given(st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any), st.sampled_from([100, 300, 4096]), st.booleans())
def test_short_packed_sequences_in_a_long_block(lengths, block_size, causal):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    inputs = tensors(int(bounds[-1]), 2, 8)
    ours, expected = (
        moba_attention_varlen(*inputs, bounds, block_size=block_size, top_k=2, causal=causal, implementation=name)
        for name in ("eager", "naive")
    )
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, expected)))


def test_short_packed_sequences_take_no_more_memory_in_a_long_block():
    inputs, bounds = tensors(1024, 2, 8), torch.arange(0, 1025, 16, dtype=torch.int32)
    kept = [kept_for_backward(moba_attention_varlen, *inputs, bounds, block_size=size, top_k=3) for size in (128, 4096)]
    assert kept[0] == kept[1]


def test_nor_do_they_in_a_model():
    model = LlamaForCausalLM(FAMILIES["llama"]()).train()
    ids = torch.randint(1, 64, (1, 256), generator=torch.Generator().manual_seed(0))
    places = {"input_ids": ids, "position_ids": torch.arange(16).repeat(16)[None], "use_cache": False}
    kept, found = [], []
    for size in (128, 4096):
        patch(model, block_size=size, top_k=3)
        kept.append(kept_for_backward(model, **places))
        found.append(logits(model.eval(), places))
        model.train()
    assert kept[0] == kept[1]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("top_k", [65, 1000, 2**31, 2**62])
def test_far_more_blocks_than_there_are_is_all_of_them(causal, top_k):
    inputs = tensors(1, 1, 1100, 8)
    blocks = {"block_size": 16, "causal": causal, "sink_blocks": 2 * causal}  # 69 blocks
    ours, expected = (moba_attention(*inputs, **blocks, top_k=k, implementation=name) for k, name in ((top_k, "eager"), (top_k, "naive")))
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, expected)))


@pytest.mark.parametrize("top_k", [65, 1000, 2**31, 2**62])
def test_far_more_blocks_than_there_are_are_selected(top_k):
    query, key, _ = tensors(1, 1, 1100, 8, grad=False)  # 69 blocks
    for causal in (True, False):
        selection = select_blocks(query, key, block_size=16, top_k=top_k, causal=causal)
        assert selection.indices.shape == (1, 1, 1100, min(top_k, 69) - causal)
        dense = selection.to_dense()
        assert (dense.sum(-1) == (torch.arange(1100) // 16 + 1 if causal else torch.tensor(69)).clamp(max=top_k)).all()
        few = select_blocks(query[..., :40, :], key[..., :40, :], block_size=16, top_k=top_k, causal=causal)
        assert few.indices.shape == (1, 1, 40, 64 - causal)


def test_far_more_blocks_than_there_are_take_no_more_memory():
    inputs = tensors(1, 2, 512, 8)
    kept = [kept_for_backward(moba_attention, *inputs, block_size=16, top_k=top_k) for top_k in (64, 2**31)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("forced", [(63, 1), (1, 63), (40, 40), (500, 0), (0, 500), (500, 500), (500, 2), (2, 500)])
@pytest.mark.parametrize("free", [0, 1, 500])
def test_far_more_sinks_and_recent_blocks_than_there_are_is_all_of_them(forced, free):
    sinks, recent = forced
    blocks = {"top_k": 1 + sinks + recent + free, "sink_blocks": sinks, "recent_blocks": recent}
    for n_tokens in (120, 280):  # 30 and 70 blocks
        inputs = tensors(1, 1, n_tokens, 4)
        ours, expected = (moba_attention(*inputs, block_size=4, **blocks, implementation=name) for name in ("eager", "naive"))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("forced", [(0, 0), (500, 0), (0, 500), (500, 500), (1, 62), (40, 40)])
def test_nor_does_decoding_gather_more_blocks_than_there_are(forced, monkeypatch):
    sinks, recent = forced
    blocks = {"block_size": 4, "top_k": 1 + sinks + recent + 500, "sink_blocks": sinks, "recent_blocks": recent}
    asked, decode = [], dispatch.decode
    monkeypatch.setattr(dispatch, "decode", lambda *args: asked.append(args[-1]) or decode(*args))
    for n_tokens in (120, 253, 257, 280):
        query, key, value = tensors(1, 1, n_tokens, 4, grad=False)
        means = write_means(means_for(key, n_tokens // 4), key, None, 4)
        ours = dispatch.attend_decoding(query[:, :, -1:], key, value, means, None, None, AttentionSettings(**blocks, scale=0.5))
        torch.testing.assert_close(ours, moba_attention(query[:, :, -1:], key, value, **blocks, implementation="naive"))
    assert max(max(x.top_k, x.sink_blocks, x.recent_blocks) for x in asked) <= 128


def test_they_take_no_more_memory_either():
    inputs = tensors(1, 2, 512, 8)
    settings = {"top_k": 64}, {"top_k": 4001, "sink_blocks": 4000}, {"top_k": 4001, "recent_blocks": 2000, "sink_blocks": 2000}
    kept = [kept_for_backward(moba_attention, *inputs, block_size=16, **blocks) for blocks in settings]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("name", ["block_size", "top_k"])
def test_a_count_that_no_operator_takes_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be below 2\*\*63, but is {2**64}"):
        moba_attention(*tensors(1, 2, 40, 8), **{**BLOCKS, name: 2**64})


# No input


@pytest.mark.parametrize("implementation", ["eager", "naive"])
def test_all_inputs_of_an_empty_call_have_gradients(implementation):
    for inputs, call in (
        (
            tensors(0, 2, 8),
            lambda *x: moba_attention_varlen(*x, torch.zeros(1, dtype=torch.int32), **BLOCKS, implementation=implementation),
        ),
        (tensors(0, 2, 40, 8), lambda *x: moba_attention(*x, **BLOCKS, implementation=implementation)),
    ):
        gradients = torch.autograd.grad(call(*inputs).sum(), inputs)
        assert [x.shape for x in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize("implementation", ["eager", "naive"])
def test_the_log_sum_exp_of_no_queries_has_gradients_too(implementation):
    query, key, value = tensors(1, 2, 40, 8)
    _, lse = moba_attention(query[:, :, :0], key, value, **BLOCKS, return_lse=True, implementation=implementation)
    assert all((x == 0).all() for x in torch.autograd.grad(lse.sum(), (query, key, value)))


@pytest.mark.parametrize("implementation", ["eager", "naive"])
def test_values_without_a_width_leave_the_log_sum_exp_as_it_is(implementation):
    query, key, value = tensors(1, 2, 40, 8)
    settings = {**BLOCKS, "return_lse": True, "sinks": torch.tensor([0.5, -1.0], dtype=torch.float64)}
    _, expected = moba_attention(query, key, value, **settings, implementation="naive")
    out, lse = moba_attention(query, key, value[..., :0], **settings, implementation=implementation)
    assert out.shape == (1, 2, 40, 0)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), (query, key)) for x in (lse, expected)))
    packed = [x[0].transpose(0, 1) for x in (query, key, value[..., :0])]
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    _, lse = moba_attention_varlen(*packed, bounds, **settings, implementation=implementation)
    torch.testing.assert_close(lse.T[None], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_log_sum_exp_of_an_empty_call_has_the_dtype_of_any_other(dtype, monkeypatch):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = [moba_attention(*tensors(1, 2, n, 8, dtype=dtype), **BLOCKS, return_lse=True)[1].dtype for n in (0, 40)]
    finally:
        torch.set_default_dtype(before)
    assert made[0] == made[1] == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("implementation", ["eager", "naive"])
def test_a_sink_of_minus_infinity_has_no_gradient_beside_padding(implementation):
    sinks = torch.tensor([-math.inf, 0.5], dtype=torch.float64, requires_grad=True)
    real = torch.arange(40) >= torch.tensor([[0], [13]])
    out = moba_attention(*tensors(2, 2, 40, 8), **BLOCKS, padding_mask=real, sinks=sinks, implementation=implementation)
    (gradient,) = torch.autograd.grad(out.sum(), sinks)
    assert gradient[0] == 0 and gradient[1].isfinite() and gradient[1] != 0


@pytest.mark.parametrize("score", [-61.0, -59.0, -31.0, -29.0, 29.0, 59.0])
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-24])
def test_small_values_come_through_whatever_the_scores(score, size):
    query = torch.full((1, 1, 64, 1), abs(score) ** 0.5)
    key, value = query * math.copysign(1, score), torch.full_like(query, size)
    out = moba_attention(query, key, value, block_size=8, top_k=3, scale=1.0, implementation="eager")
    torch.testing.assert_close(out, value, rtol=1e-5, atol=0)


# What PyTorch does around a call


@pytest.mark.parametrize("implementation", ["eager", "naive"])
def test_mapping_over_what_is_read_is_refused(implementation):
    query, key, value = tensors(1, 2, 40, 8, grad=False)
    with pytest.raises(NotImplementedError, match="vmap over query hides its values, which select_blocks reads"):
        torch.vmap(lambda x: select_blocks(x, key, **BLOCKS).indices)(query[None])
    with pytest.raises(NotImplementedError, match="vmap over key hides its values"):
        torch.vmap(torch.func.grad(lambda x: select_blocks(query, x, **BLOCKS).indices.sum() * x.sum()))(key[None])
    mask, bounds, packed = torch.ones(1, 1, 40, dtype=torch.bool), torch.tensor([[0, 40]], dtype=torch.int32), query[0].transpose(0, 1)
    with pytest.raises(NotImplementedError, match="vmap over padding_mask hides its values"):
        torch.vmap(lambda x: moba_attention(query, key, value, padding_mask=x, **BLOCKS, implementation=implementation))(mask)
    with pytest.raises(NotImplementedError, match="vmap over padding_mask hides its values"):
        torch.vmap(lambda x: select_blocks(query, key, padding_mask=x, **BLOCKS).indices)(mask)
    with pytest.raises(NotImplementedError, match="vmap over cu_seqlens hides its values"):
        torch.vmap(lambda x: moba_attention_varlen(packed, packed, packed, x, **BLOCKS, implementation=implementation))(bounds)


def test_the_specification_goes_through_transforms_beside_what_is_read():
    query, key, value = tensors(1, 2, 40, 8, grad=False)
    settings = {**BLOCKS, "implementation": "naive"}
    mask, bounds = torch.ones(1, 40, dtype=torch.bool), torch.tensor([0, 40], dtype=torch.int32)
    expected = moba_attention(query, key, value, **settings)
    found = torch.vmap(lambda x: moba_attention(x, key, value, padding_mask=mask, **settings))(query[None])
    torch.testing.assert_close(found[0], expected)
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    found = torch.vmap(lambda x: moba_attention_varlen(x, *packed[1:], bounds, **settings))(packed[0][None])
    torch.testing.assert_close(found.transpose(1, 2), expected)
    chosen = select_blocks(query, key, **BLOCKS).indices.sum()
    assert (torch.func.grad(lambda x: (x * select_blocks(x, key, **BLOCKS).indices.sum()).sum())(query) == chosen).all()


def test_forward_mode_derivatives_are_refused_but_by_the_specification():
    query, key, value = tensors(1, 2, 40, 8, grad=False)

    def tangent(implementation: str) -> Tensor:
        call = lambda x: moba_attention(x, key, value, **BLOCKS, implementation=implementation)  # noqa: E731
        return torch.func.jvp(call, (query,), (torch.ones_like(query),))[1]

    with pytest.raises(NotImplementedError, match='need implementation="naive"'):
        tangent("eager")
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match='need implementation="naive"'):
        moba_attention(query, torch.autograd.forward_ad.make_dual(key, key), value, **BLOCKS)
    for transform in (torch.func.grad, lambda call: torch.func.vmap(torch.func.grad(call))):
        x = query if transform is torch.func.grad else query[None]
        with pytest.raises(NotImplementedError, match='need implementation="naive"'):
            transform(lambda x: moba_attention(x, key, value, **BLOCKS).sum())(x)
    step = 1e-6
    moved, at = (moba_attention(x, key, value, **BLOCKS, implementation="naive") for x in (query + step, query))
    torch.testing.assert_close(tangent("naive"), (moved - at) / step, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused_but_by_the_specification():
    query, key, value = tensors(1, 2, 40, 8)

    def second(implementation: str) -> Tensor:
        out = moba_attention(query, key, value, **BLOCKS, implementation=implementation)
        (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), query)[0]

    with pytest.raises(NotImplementedError, match='second derivatives need implementation="naive"'):
        second("eager")
    assert second("naive").norm() > 0


def test_what_is_selected_under_autocast_is_what_is_read():
    query, key, _ = tensors(2, 4, 500, 32, dtype=torch.float32)
    expected = select_blocks(query, key, **BLOCKS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_blocks(query, key, **BLOCKS).indices, expected.indices)


def test_dense_attention_of_the_other_implementations_functions_ignores_autocast():
    inputs, bounds = tensors(50, 2, 32, dtype=torch.float32), torch.tensor([0, 50], dtype=torch.int32)
    expected = compat.moba_attn_varlen(*inputs, bounds, 50, moba_chunk_size=64, moba_topk=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compat.moba_attn_varlen(*inputs, bounds, 50, moba_chunk_size=64, moba_topk=1), expected)


def test_a_packed_query_without_a_width_is_refused():
    with pytest.raises(ValueError, match="query must have a width"):
        moba_attention_varlen(*tensors(40, 2, 0), torch.tensor([0, 40], dtype=torch.int32), **BLOCKS)


def test_a_call_with_fake_tensors_leaves_nothing_for_real_ones():
    shape = 1, 2, 77, 8  # of no other test, so that nothing is kept of it yet
    with FakeTensorMode():
        query, key, value = (torch.empty(shape) for _ in range(3))
        assert moba_attention(query, key, value, **BLOCKS).shape == shape
        with pytest.raises(ValueError, match="query must have values, which select_blocks reads, but is a FakeTensor"):
            select_blocks(query, key, **BLOCKS)
    inputs = tensors(*shape)
    torch.testing.assert_close(moba_attention(*inputs, **BLOCKS), moba_attention(*inputs, **BLOCKS, implementation="naive"))
    assert select_blocks(*inputs[:2], **BLOCKS).indices.shape == (1, 2, 77, 2)


def test_fake_and_meta_tensors_go_through_every_argument():
    bounds = torch.tensor([0, 20, 40], dtype=torch.int32)
    with FakeTensorMode() as mode:
        inputs = [torch.empty(40, 2, 8) for _ in range(3)]
        assert moba_attention_varlen(*inputs, mode.from_tensor(bounds), **BLOCKS).shape == (40, 2, 8)
        inputs = [torch.empty(1, 2, 40, 8) for _ in range(3)]
        assert moba_attention(*inputs, **BLOCKS, padding_mask=torch.ones(1, 40, dtype=torch.bool)).shape == (1, 2, 40, 8)
    meta = [torch.empty(1, 2, 40, 8, device="meta") for _ in range(3)]
    assert moba_attention(*meta, **BLOCKS, implementation="naive").shape == (1, 2, 40, 8)
    packed = [torch.empty(40, 2, 8, device="meta") for _ in range(3)]
    with pytest.raises(ValueError, match='cu_seqlens must have values, which implementation="naive" reads, but is on the meta device'):
        moba_attention_varlen(*packed, torch.empty(3, dtype=torch.int32, device="meta"), **BLOCKS, implementation="naive")


def test_packed_outputs_can_be_viewed_as_those_of_flash_attention():
    inputs, bounds = tensors(40, 2, 8), torch.tensor([0, 13, 40], dtype=torch.int32)
    for top_k in (1, 3):
        for implementation in ("eager", "naive"):
            out = moba_attention_varlen(*inputs, bounds, block_size=8, top_k=top_k, implementation=implementation)
            assert out.view(40, 16).shape == (40, 16)
    out = moba_flex.compat.moba_attn_varlen(*inputs, bounds, 27, moba_chunk_size=8, moba_topk=3)
    assert out.view(40, 16).shape == (40, 16)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"causal": None}, "causal must be True or False, but is None"),
        ({"causal": 0}, "causal must be True or False, but is 0"),
        ({"scale": math.nan}, "scale must be finite in float32, but is nan"),
        ({"scale": -math.inf}, "scale must be finite in float32, but is -inf"),
    ],
    ids=str,
)
def test_what_would_give_other_attention_or_none_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        moba_attention(*tensors(1, 2, 40, 8), **BLOCKS, **wrong)
