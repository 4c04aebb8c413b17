"""The operator as PyTorch sees it: opcheck, one graph of torch.compile, exported programs, and wrong bounds that these notice."""

from __future__ import annotations

import pytest
import torch
from support.cases import Case, Packed, assert_same, attend, gradients, operands, random

from moba_flex import moba_attention, moba_attention_varlen
from moba_flex.operator import attention

OPERATOR_CASES = {
    "plain": Case(2, 4, 2, 8, 8, 3, 5, block_size=3),
    "one block": Case(1, 2, 1, 3, 3, block_size=4, top_k=3),
    "tail": Case(1, 2, 1, 5, 11, block_size=4),
    "routed blocks only": Case(1, 2, 1, 9, 9, block_size=4, causal=False),
    "shared selection": Case(1, 4, 2, 9, 9, 3, 5, block_size=3, share_selection=True),
    "padded": Case(2, 2, 1, 5, 11, block_size=4, padding=((3, 0), (0, 2)), softcap=3.0),
}


def _operator_arguments(case: Case, tensors: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None) -> tuple:
    query, key, value = (tensors[name].requires_grad_() for name in ("query", "key", "value"))
    mask = case.padding_mask()
    sizes = (case.block_size, case.top_k, case.sink_blocks, case.recent_blocks, 1 << 20)
    return query, key, value, mask, cu_seqlens, sizes, case.causal, case.share_selection, 0.5, case.softcap, "eager"


@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_the_operator_passes_opcheck(case: Case):
    torch.library.opcheck(attention, _operator_arguments(case, operands(case)))


def test_the_operator_passes_opcheck_on_transposed_views_and_packed_sequences():
    case = Case(1, 4, 2, 11, 11, 3, 5, block_size=3)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in operands(case).items()}
    torch.library.opcheck(attention, _operator_arguments(case, views))
    bounds = Packed((4, 0, 7), case).cu_seqlens()
    torch.library.opcheck(attention, _operator_arguments(case, views, bounds))


def test_results_of_one_head_are_aligned_where_queries_begin_within_a_block():
    """torch.compile takes them for that, and on a GPU its kernels, or an assertion of theirs, fail where they are not."""
    case = Case(1, 1, 1, 3, 21, 7, 5, block_size=16)
    given_ = _operator_arguments(case, operands(case))
    out, lse, _ = attention(*given_)
    grads = torch.autograd.grad(out.sum() + lse.sum(), given_[:3])
    assert [x.storage_offset() for x in (out, lse, *grads)] == [0] * 5


@pytest.mark.parametrize("lengths", [(4, 0, 7), (1, 1, 1), (19, 1, 0)], ids=str)
def test_the_operator_passes_opcheck_where_packed_sequences_have_more_keys(lengths: tuple[int, ...]):
    packed = Packed(lengths, Case(1, 4, 2, sum(lengths), 50, 3, 5, block_size=3), (20, 10, 20))
    torch.library.opcheck(attention, _operator_arguments(packed.case, operands(packed.case), packed.layout_bounds()))


# torch.compile and torch.export


@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_torch_compile_sees_one_graph_and_the_same_result(case: Case):
    case = case.but(sinks=True)
    torch.compiler.reset()

    def run(tensors):
        out, lse = attend(case, tensors)
        return out * 2, lse + 1

    tensors = operands(case, requires_grad=True)
    expected = run(tensors)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    for x, y in zip(outputs, expected):
        assert_same(x, y)
    grads, expected_grads = gradients(outputs, tensors), gradients(expected, tensors)
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


def test_torch_compile_sees_one_graph_for_packed_sequences():
    packed = Packed((4, 0, 7), Case(1, 4, 2, 11, 11, 3, 5, block_size=3))
    torch.compiler.reset()

    def run(query, key, value, bounds):
        return moba_attention_varlen(query, key, value, bounds, block_size=3, top_k=2)

    tensors = [x[0].transpose(0, 1) for x in operands(packed.case).values()]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors, packed.cu_seqlens()), run(*tensors, packed.cu_seqlens()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_gives_values_and_gradients_where_packed_sequences_have_more_keys(dynamic: bool):
    torch.compiler.reset()
    compiled = torch.compile(attend_packed_plainly, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths, keys in (((4, 0, 7), (20, 10, 8)), ((1, 1, 1, 1), (5, 9, 2, 30)), ((19, 1), (25, 40))):
        case = Case(1, 4, 2, sum(lengths), sum(keys), 3, 5, block_size=3, sinks=True)
        packed, tensors = Packed(lengths, case, keys), operands(case, requires_grad=True)
        results = []
        for run in (attend_packed_plainly, compiled):
            outputs = run(*tensors.values(), packed.cu_seqlens(), packed.cu_seqlens_k())
            results.append((*outputs, *gradients(outputs, tensors).values()))
        for x, y in zip(*results):
            assert_same(y, x, f"{lengths} of {keys}")


def attend_packed_plainly(query, key, value, sinks, bounds, bounds_k):
    tensors = (x[0].transpose(0, 1) for x in (query, key, value))
    return moba_attention_varlen(*tensors, bounds, cu_seqlens_k=bounds_k, sinks=sinks, block_size=3, top_k=2, return_lse=True)


def test_an_exported_program_takes_any_lengths_and_any_number_of_packed_sequences():
    class Packing(torch.nn.Module):
        def forward(self, query, key, bounds, bounds_k):
            own = moba_attention_varlen(key, key, key, bounds_k, block_size=4, top_k=2)
            return own, moba_attention_varlen(query, key, key, bounds, cu_seqlens_k=bounds_k, block_size=4, top_k=2)

    def given(lengths, keys):
        packed = Packed(lengths, Case(), keys)
        return random(sum(lengths), 2, 3, seed=0), random(sum(keys), 2, 3, seed=1), packed.cu_seqlens(), packed.cu_seqlens_k()

    sizes = {0: torch.export.Dim("T")}, {0: torch.export.Dim("Tk")}, *[{0: torch.export.Dim("n", min=3)}] * 2
    program = torch.export.export(Packing(), given((5, 1, 0, 30), (5, 40, 7, 60)), dynamic_shapes=sizes).module()
    for lengths, keys in (((1, 1, 1, 1, 1), (9, 20, 1, 4, 30)), ((50, 3), (220, 3))):
        for x, y in zip(program(*given(lengths, keys)), Packing()(*given(lengths, keys))):
            assert_same(x, y, f"{lengths} of {keys}")


# Wrong bounds and masks


# Without vectors inductor asks the C++ compiler for less, and need not try out first which ones the processor has.
PLAIN = {"cpp.simdlen": 1, "cpp.vec_isa_ok": False}
BACKENDS = {"aot_eager": {"backend": "aot_eager"}, "inductor": {"backend": "inductor", "options": PLAIN}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_bounds_of_keys_are_noticed_under_torch_compile(backend: str):
    torch.compiler.reset()
    query, key, bounds = torch.randn(12, 2, 8), torch.randn(37, 2, 8), torch.tensor([0, 10, 12], dtype=torch.int32)
    run = torch.compile(
        lambda bounds_k: moba_attention_varlen(query, key, key, bounds, cu_seqlens_k=bounds_k, block_size=5, top_k=2),
        fullgraph=True,
        **BACKENDS[backend],
    )
    for wrong, words in (
        ((0, 20, 30), "cu_seqlens_k must start at 0, never fall and end at the number of tokens"),
        ((0, 9, 37), "cu_seqlens_k must give each sequence at least as many keys as cu_seqlens gives it queries"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(torch.tensor(wrong, dtype=torch.int32))
    run(torch.tensor([0, 10, 37], dtype=torch.int32))


WRONG_BOUNDS = [(0, 10, 30), (5, 37), (0, 20, 10, 37), (0, 10, 40), (0,), (-1, 37)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_packed_bounds_and_masks_are_noticed_under_torch_compile(backend: str):
    torch.compiler.reset()
    x, y = torch.randn(37, 2, 8), torch.randn(2, 2, 9, 8)
    packed = torch.compile(
        lambda x, bounds: moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2), fullgraph=True, **BACKENDS[backend]
    )
    padded = torch.compile(
        lambda y, mask: moba_attention(y, y, y, block_size=4, top_k=2, padding_mask=mask), fullgraph=True, **BACKENDS[backend]
    )
    for bounds in WRONG_BOUNDS if backend == "aot_eager" else WRONG_BOUNDS[:2]:
        for grad in (False, True):
            with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never fall and end at the number of tokens"):
                packed(x.clone().requires_grad_(grad), torch.tensor(bounds, dtype=torch.int32))
    right = torch.tensor([0, 10, 37], dtype=torch.int32)
    assert_same(packed(x, right), moba_attention_varlen(x, x, x, right, block_size=5, top_k=2), rtol=1e-5, atol=1e-6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    padded(y, mask)
    mask[1, 4] = False
    with pytest.raises(RuntimeError, match="padding_mask has a hole"):
        padded(y, mask)


def test_an_exported_program_notices_wrong_packed_bounds():
    class Packing(torch.nn.Module):
        def forward(self, x, bounds):
            return moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2)

    x = torch.randn(37, 2, 8)
    program = torch.export.export(Packing(), (x, torch.tensor([0, 10, 37], dtype=torch.int32))).module()
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
        program(x, torch.tensor([0, 10, 36], dtype=torch.int32))
