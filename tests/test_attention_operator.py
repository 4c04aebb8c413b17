"""The operator as PyTorch sees it: opcheck, one graph of torch.compile, exported programs, and wrong bounds and transforms in these."""

from __future__ import annotations

import pytest
import torch
from support.cases import Case, Packed, assert_same, attend, gradients, operands, random
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_they_are_noticed_after_a_caught_error_too(backend: str):
    """torch.compile then runs the checks outside a graph, and compiles the functions that they call one by one."""
    torch.compiler.reset()
    x, y = torch.randn(37, 2, 8), torch.randn(2, 2, 9, 8)
    packed = torch.compile(lambda x, bounds: moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2), backend=backend)
    chunked = torch.compile(
        lambda x, bounds_k: moba_attention_varlen(
            x[:2], x, x, torch.tensor([0, 1, 2], dtype=torch.int32), cu_seqlens_k=bounds_k, block_size=5, top_k=2
        ),
        backend=backend,
    )
    padded = torch.compile(lambda y, mask: moba_attention(y, y, y, block_size=4, top_k=2, padding_mask=mask), backend=backend)
    for call in (packed, chunked):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            call(x, [0, 37])
    with pytest.raises(TypeError, match="padding_mask must be bool"):
        padded(y, torch.ones(2, 9))
    for bounds in WRONG_BOUNDS:
        for call in (packed, chunked):
            with pytest.raises((ValueError, RuntimeError), match=r"cu_seqlens(_k)? (and|must)"):
                call(x, torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens_k must give each sequence at least as many keys"):
        chunked(x, torch.tensor([0, 0, 37], dtype=torch.int32))
    right = torch.tensor([0, 10, 37], dtype=torch.int32)
    assert_same(packed(x, right), moba_attention_varlen(x, x, x, right, block_size=5, top_k=2), rtol=1e-5, atol=1e-6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    padded(y, mask)
    mask[1, 4] = False
    with pytest.raises((ValueError, RuntimeError), match="padding_mask has a hole"):
        padded(y, mask)


# Under a transform torch.compile reports what a traced function raises in an error of its own with fullgraph=True.
TRANSFORMS = {
    "jvp": lambda call: lambda x: torch.func.jvp(call, (x,), (x,))[1],
    "jacfwd": lambda call: torch.func.jacfwd(lambda x: call(x)[0, 0, :2, 0]),
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum()),
    "vjp": lambda call: lambda x: torch.func.vjp(call, x)[1](x)[0],
    "vmap": lambda call: lambda x: torch.func.vmap(call)(x[None])[0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused_in_a_graph_but_by_the_specification(transform, backend: str):
    x = torch.randn(1, 2, 20, 4)
    plain = transform(lambda x: moba_attention(x, x, x, block_size=4, top_k=2, implementation="eager"))
    packed = transform(lambda x: moba_attention_varlen(*[x[0]] * 3, torch.tensor([0, 2], dtype=torch.int32), block_size=4, top_k=2)[None])
    for call in (plain, packed):
        torch.compiler.reset()
        with pytest.raises(NotImplementedError, match='need implementation="naive"'):
            torch.compile(call, **BACKENDS[backend])(x)
        with pytest.raises(Exception, match='need implementation="naive"'):
            torch.compile(call, fullgraph=True, **BACKENDS[backend])(x)
    if backend == "aot_eager":
        torch.compiler.reset()
        naive = transform(lambda x: moba_attention(x, x, x, block_size=4, top_k=2, implementation="naive"))
        assert_same(torch.compile(naive, fullgraph=True, backend=backend)(x), naive(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_around_or_inside_a_compiled_function_is_refused(backend: str):
    x = torch.randn(1, 2, 20, 4)
    call = lambda x: moba_attention(x, x, x, block_size=4, top_k=2, implementation="eager")  # noqa: E731

    def inside(x: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent

    torch.compiler.reset()
    around = torch.compile(call, backend=backend)
    expected = call(x)
    assert_same(around(x), expected)
    with forward_ad.dual_level():
        assert_same(around(x), expected)  # has no tangent
        for _ in range(2):
            with pytest.raises(NotImplementedError, match='need implementation="naive"'):
                around(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match='need implementation="naive"'):
        torch.compile(inside, backend=backend)(x)
    assert_same(around(x), expected)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_mapping_over_masks_and_bounds_is_refused_in_a_graph(fullgraph: bool):
    torch.compiler.reset()
    x = torch.randn(1, 2, 20, 4)
    mask, bounds = torch.ones(1, 1, 20, dtype=torch.bool), torch.tensor([[0, 20]], dtype=torch.int32)
    settings = {"block_size": 4, "top_k": 2, "implementation": "naive"}
    padded = lambda mask: torch.vmap(lambda mask: moba_attention(x, x, x, padding_mask=mask, **settings))(mask)  # noqa: E731
    packed = lambda bounds: torch.vmap(lambda b: moba_attention_varlen(*[x[0].transpose(0, 1)] * 3, b, **settings))(bounds)  # noqa: E731
    for call, given, name in ((padded, mask, "padding_mask"), (packed, bounds, "cu_seqlens")):
        with pytest.raises(Exception if fullgraph else NotImplementedError, match=f"vmap over {name} hides its values"):
            torch.compile(call, backend="aot_eager", fullgraph=fullgraph)(given)
    beside = lambda x: torch.vmap(lambda x: moba_attention(x, x, x, padding_mask=mask[0], **settings))(x[None])[0]  # noqa: E731
    assert_same(torch.compile(beside, backend="aot_eager", fullgraph=True)(x), moba_attention(x, x, x, **settings), rtol=1e-5, atol=1e-6)


def test_an_exported_program_notices_wrong_packed_bounds():
    class Packing(torch.nn.Module):
        def forward(self, x, bounds):
            return moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2)

    x = torch.randn(37, 2, 8)
    program = torch.export.export(Packing(), (x, torch.tensor([0, 10, 37], dtype=torch.int32))).module()
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
        program(x, torch.tensor([0, 10, 36], dtype=torch.int32))
