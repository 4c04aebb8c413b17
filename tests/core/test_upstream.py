"""Canaries for private PyTorch API: each entry of `core/upstream.py` does what the package needs, and no other file uses such API."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import moba_flex
from moba_flex.core import upstream

PACKAGE = Path(moba_flex.__file__).parent


def assert_in_graph() -> None:
    def checked(x):
        upstream.assert_in_graph((x > 0).all(), "x must be positive")
        return x + 1

    compiled = torch.compile(checked, backend="aot_eager", fullgraph=True)
    for function in (checked, compiled):
        assert function(torch.ones(3)).tolist() == [2, 2, 2], "a check that holds changes the result"
        with pytest.raises(RuntimeError, match="x must be positive"):
            function(torch.zeros(3))


def modules_being_called() -> None:
    said = []

    class Inner(torch.nn.Module):
        def forward(self, x):
            said.append(upstream.modules_being_called())
            return x

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    outer = Outer()
    outer.register_forward_pre_hook(lambda module, args: said.append(upstream.modules_being_called()))
    outer(torch.ones(1))
    in_hook, in_forward = said
    assert in_hook == [outer], "in a pre-hook it does not name the module whose call begins"
    assert in_forward == [outer.inner, outer], "it does not name the modules whose calls a forward is in"
    assert upstream.modules_being_called() == [], "it names modules whose calls have ended"


def functorch_transform() -> None:
    said = []

    def remember(x):
        said.append(upstream.functorch_transform())
        return x.sum()

    assert upstream.functorch_transform() is None, "it sees a transform where there is none"
    torch.func.grad(remember)(torch.ones(2))
    torch.func.vmap(remember)(torch.ones(2, 2))
    torch.func.jvp(remember, (torch.ones(2),), (torch.ones(2),))
    assert said == ["Grad", "Vmap", "Jvp"], f"it calls grad, vmap and jvp {said}"

    def doubled_under_vmap(x):
        return x * (2 if upstream.functorch_transform() == "Vmap" else 1)

    for call, factor in ((doubled_under_vmap, 1), (lambda x: torch.func.vmap(doubled_under_vmap)(x), 2)):
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(torch.ones(2))
        assert found.tolist() == [factor] * 2, "a traced graph does not see the transform around a call"


def is_vmapped() -> None:
    said = []

    def remember(x):
        said.append(upstream.is_vmapped(x))
        return x.sum()

    remember(torch.ones(2))
    torch.func.grad(remember)(torch.ones(2))
    torch.func.vmap(remember)(torch.ones(2, 2))
    torch.func.vmap(torch.func.grad(remember))(torch.ones(2, 2))
    assert said == [False, False, True, True], f"for none, grad, vmap and grad under vmap it says {said}"
    traced = torch.compile(lambda x: torch.func.vmap(lambda y: y * upstream.is_vmapped(y))(x), backend="aot_eager", fullgraph=True)
    assert traced(torch.ones(2)).tolist() == [1, 1], "a traced graph does not see that a tensor is mapped"


def forward_mode_is_on() -> None:
    traced = torch.compile(lambda x: x * (2 if upstream.forward_mode_is_on() else 1), backend="aot_eager", fullgraph=True)
    x = torch.ones(2)
    assert traced(x).tolist() == [1, 1], "it sees a level of forward-mode differentiation where there is none"
    with forward_ad.dual_level():
        assert traced(x).tolist() == [2, 2], "a graph traced outside forward-mode differentiation is used in it"


def has_tangent() -> None:
    x = torch.ones(2)
    with forward_ad.dual_level():
        assert not upstream.has_tangent(x), "it sees a tangent of a tensor that has none"
        assert upstream.has_tangent(x, forward_ad.make_dual(x, x)), "it does not see a tangent"


def version_of() -> None:
    x = torch.zeros(4)
    before = upstream.version_of(x)
    x[1:].add_(1)
    assert upstream.version_of(x) > before, "it does not count a write to a view"
    assert upstream.version_of(x[:2]) == upstream.version_of(x), "a view has a count of its own"
    with torch.inference_mode(), pytest.raises(RuntimeError):
        upstream.version_of(torch.zeros(1))


def is_under_dispatch_mode() -> None:
    assert not upstream.is_under_dispatch_mode(), "it sees a dispatch mode where there is none"
    with FlopCounterMode(display=False):
        assert upstream.is_under_dispatch_mode(), "it does not see a dispatch mode"


def fake_tensor() -> None:
    seen = []

    @torch.library.custom_op("moba_flex_tests::canary", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @operator.register_fake
    def _(x):
        seen.append(isinstance(x, upstream.FakeTensor))
        return torch.empty_like(x)

    torch.export.export(_Calls(operator), (torch.ones(2),))
    assert seen and all(seen), "tensors that torch.export traces with are no longer of this class"
    assert not isinstance(torch.ones(2), upstream.FakeTensor), "ordinary tensors are of this class"


class _Calls(torch.nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mark_dynamic() -> None:
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x * 2, backend=count)
    for length in (5, 6, 7):
        x = torch.ones(length, 3)
        upstream.mark_dynamic(x, 0)
        compiled(x)
    assert len(graphs) == 1, f"three lengths took {len(graphs)} compilations"
    x = torch.ones(5)
    upstream.mark_dynamic(x, 0)
    torch.compile(lambda x: x + torch.ones(5), backend=count)(x)  # raises where a constant dimension is an error
    torch.compiler.reset()


def mark_static_address() -> None:
    x = torch.ones(2)
    upstream.mark_static_address(x)
    assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(x).tolist() == [2, 2]
    assert getattr(x, "_dynamo_static_input_type", None), "torch.compile is told nothing"


def copy_all() -> None:
    into, sources = [torch.zeros(2), torch.zeros(3, 1)], [torch.ones(2), torch.ones(3, 1)]
    places = [x.data_ptr() for x in into]
    upstream.copy_all(into, sources)
    assert all(x.eq(1).all() for x in into), "it does not copy"
    assert places == [x.data_ptr() for x in into], "it does not copy in place"


def flex_attention_backward() -> None:
    """With the operands of `backends/flex_calls.py`: the gradient of the log-sum-exp stands for `out`, which is not known."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, 1, 128, 16, dtype=torch.float64) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    scores = leaves[0] @ leaves[1].mT / 4
    out, lse = scores.softmax(-1) @ leaves[2], scores.logsumexp(-1)
    grad_lse = torch.randn_like(lse)
    torch.autograd.backward((out, lse), (grad, grad_lse))
    delta = (out * grad).sum(-1) - grad_lse
    lists = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    mask = torch.nn.attention.flex_attention.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=128, mask_mod=lambda b, h, q, kv: q >= 0)
    given = query, key, value, torch.zeros_like(grad), lse.detach() / math.log(2), grad, delta.detach() * -math.log(2)
    rules = (lambda score, b, h, q, kv: score.clone()), (lambda score, b, h, q, kv, grad: [grad.clone(), None, None, None, None])
    results = upstream.flex_attention_backward(*given, *rules, mask.as_tuple(), 0.25, {}, (), ())
    for name, found, leaf in zip(("query", "key", "value"), results[:3], leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, msg=lambda said, name=name: f"the gradient of {name} is another one: {said}")


def release_broken_pool() -> None:
    if not torch.backends.cuda.is_built():
        pytest.skip("needs a PyTorch built for CUDA")
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name), f"torch._C.{name} is gone"
    if not torch.cuda.is_available():
        return
    device, pool = torch.cuda.current_device(), torch.cuda.MemPool()
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool.id)
    torch.empty(1 << 20, device="cuda")
    upstream.release_broken_pool(device, pool.id)
    with pytest.raises(RuntimeError):  # nobody allocates from it any more
        torch._C._cuda_endAllocateToPool(device, pool.id)


def connection_to_store() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        upstream.connection_to_store().set("name", "value")
        found = upstream.connection_to_store().multi_get(["name"])
    finally:
        dist.destroy_process_group()
    assert found == [b"value"], f"what one connection was given is {found} by another"


def in_backward_pass() -> None:
    said = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            said.append(upstream.in_backward_pass())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            said.append(upstream.in_backward_pass())
            return grad

    Asks.apply(torch.ones(1, requires_grad=True)).backward()
    assert [*said, upstream.in_backward_pass()] == [False, True, False], f"in forward, in backward and after them it says {said}"


def recompile_limit() -> None:
    torch.compiler.reset()
    traced = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: traced.append(1) or graph.forward, fullgraph=True, dynamic=False)
    limit = torch._dynamo.config.recompile_limit
    with pytest.raises(upstream.FailOnRecompileLimitHit):
        for length in range(2, limit + 10):
            compiled(torch.ones(length))
    with upstream.any_number_of_compilations():
        for length in range(2, limit + 10):
            compiled(torch.ones(length))
    assert len(traced) == limit + 8, f"{limit + 8} lengths took {len(traced)} compilations"
    torch.compiler.reset()


def failed_compilation() -> None:
    def fails(graph, inputs):
        raise ArithmeticError("of the backend")

    with pytest.raises(upstream.BackendCompilerFailed, match="of the backend"):
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(1))


def has_storage() -> None:
    said = []

    def hook(grad: torch.Tensor) -> None:
        said.append(upstream.has_storage(grad))

    x = torch.ones(2, requires_grad=True)
    out = x * 2
    out.register_hook(hook)
    torch.autograd.grad(out, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(out, x, torch.ones(3, 2), is_grads_batched=True)
    assert said == [True, False], f"of a gradient and of a batch of gradients it says {said}"


CANARIES: dict[str, Callable[[], None]] = {
    "BackendCompilerFailed": failed_compilation,
    "FailOnRecompileLimitHit": recompile_limit,
    "any_number_of_compilations": recompile_limit,
    "FakeTensor": fake_tensor,
    "assert_in_graph": assert_in_graph,
    "in_backward_pass": in_backward_pass,
    "modules_being_called": modules_being_called,
    "connection_to_store": connection_to_store,
    "copy_all": copy_all,
    "flex_attention_backward": flex_attention_backward,
    "forward_mode_is_on": forward_mode_is_on,
    "functorch_transform": functorch_transform,
    "has_storage": has_storage,
    "has_tangent": has_tangent,
    "is_under_dispatch_mode": is_under_dispatch_mode,
    "is_vmapped": is_vmapped,
    "mark_dynamic": mark_dynamic,
    "mark_static_address": mark_static_address,
    "release_broken_pool": release_broken_pool,
    "version_of": version_of,
}


@pytest.mark.parametrize("entry", CANARIES)
def test_pytorch_does_what_an_entry_needs(entry: str):
    try:
        CANARIES[entry]()
    except Exception as error:
        pytest.fail(f"PyTorch {torch.__version__} has changed what `{entry}` of moba_flex/core/upstream.py stands on: {error!r}")


@pytest.mark.gpu
def test_pytorch_does_what_an_entry_for_gpus_needs():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    test_pytorch_does_what_an_entry_needs("release_broken_pool")


def test_every_entry_has_a_canary():
    defined = {name for name, x in vars(upstream).items() if inspect.isfunction(x) and x.__module__ == upstream.__name__}
    assert set(CANARIES) == set(upstream.__all__) >= defined


def test_no_other_file_uses_private_api_of_pytorch():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "core/upstream.py"
        for line, name in private_names(path.read_text(encoding="utf-8"))
    ]
    assert not found, "private PyTorch API belongs in moba_flex/core/upstream.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._C._len_torch_dispatch_stack()", "torch._C._len_torch_dispatch_stack"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._subclasses import FakeTensor", "torch._subclasses.FakeTensor"),
        ("from torch import _dynamo as d", "torch._dynamo"),
        ("import torch.distributed as dist\ndist._functional_collectives", "torch.distributed._functional_collectives"),
        ("from torch.utils import data\ndata._utils", "torch.utils.data._utils"),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", "torch.autograd.forward_ad._current_level"),
        ("import functorch", "functorch"),
    ],
)
def test_private_api_is_found(code: str, name: str):
    assert name in {found for _, found in private_names(code)}


def test_public_api_is_not_taken_for_private():
    code = '"""See torch._dynamo.config."""\nimport torch\nfrom torch import nn\ntorch.__version__, nn.Linear, model._torch, self._x'
    assert not list(private_names(code))


def private_names(code: str) -> Iterator[tuple[int, str]]:
    """Lines and full names of private PyTorch API in `code`: a part of the name starts with one underscore, or it is functorch's."""
    tree = ast.parse(code)
    known: dict[str, str] = {}  # a name in this file: what it is of PyTorch
    for node in ast.walk(tree):
        full: dict[str, str] = {}
        if isinstance(node, ast.Import):
            full = {x.asname or x.name.partition(".")[0]: x.name for x in node.names}
            known |= {name: module if name != module.partition(".")[0] else name for name, module in full.items() if _is_torch(module)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full = {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
            known |= {name: module for name, module in full.items() if _is_torch(module)}
        yield from ((node.lineno, name) for name in full.values() if _is_private(name))
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in known:
            name = ".".join([known[inner.id], *reversed(parts)])
            if _is_private(name):
                yield node.lineno, name


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "functorch")


def _is_private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "functorch" or (parts[0] == "torch" and any(x.startswith("_") and not x.startswith("__") for x in parts))
