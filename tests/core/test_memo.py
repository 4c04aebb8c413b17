"""What follows from a mask's values is worked out once, and anew whenever the mask is written to. On a GPU, or as if a CPU were one."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moba_flex import moba_attention, moba_attention_varlen
from moba_flex.compat import flash_moba_varlen_func
from moba_flex.core import layout_builders, memo

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(memo, "may_be_remembered", lambda x: type(x) is Tensor and not x.is_inference())
    return request.param


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The mask of each layout that is built from one."""
    masks, build = [], layout_builders._layout_from

    def record(told: Tensor, *sizes: Any) -> Any:
        masks.append(told)
        return build(told, *sizes)

    monkeypatch.setattr(layout_builders, "_layout_from", record)
    return masks


def counted(x: Tensor) -> int:
    """How many sums had been worked out when that of `x` was."""
    return memo.memo(x, "calls", lambda: calls.append(x.sum().item()) or len(calls))


calls: list[float] = []


def test_kept_until_the_tensor_is_written_to_or_dies(device: str) -> None:
    calls.clear()
    x = torch.arange(4, device=device)
    assert (counted(x), counted(x)) == (1, 2), "nobody has said that it may be kept"
    memo.remember(x)
    assert (counted(x), counted(x), counted(x)) == (3, 3, 3)

    x[1] = 7
    assert not memo.is_remembered(x)
    memo.remember(x)
    assert (counted(x), counted(x), calls[-1]) == (4, 4, 12)
    x.view(2, 2)[0].add_(1)  # a write to what shares its memory
    assert counted(x) == 5

    memo.remember(x)
    number = id(x)
    assert number in memo._entries
    del x
    gc.collect()
    assert number not in memo._entries


def test_as_many_things_are_kept_as_calls_of_one_model_share(device: str) -> None:
    x = torch.zeros(3, device=device)
    memo.remember(x)
    for i in range(3 * memo.MOST):
        memo.memo(x, i, object)
        assert len(memo._entries[id(x)].known) <= memo.MOST
    made = memo.memo(x, 3 * memo.MOST - 1, object)
    assert memo.memo(x, 3 * memo.MOST - 1, object) is made


def test_nothing_is_remembered_where_versions_say_nothing(device: str) -> None:
    """Inference mode counts no writes; code of torch.compile gives one tensor several contents; fake tensors have none."""
    with torch.inference_mode():
        x = torch.zeros(3, device=device)
    memo.remember(x)
    assert not memo.is_remembered(x)

    def remembers(x: Tensor) -> Tensor:
        memo.remember(x)
        return x + 1

    x = torch.zeros(3, device=device)
    torch.compile(remembers, backend="eager", fullgraph=True)(x)
    assert not memo.is_remembered(x)
    with torch._subclasses.FakeTensorMode():
        x = torch.zeros(3, device=device)
        memo.remember(x)
        assert not memo.is_remembered(x)


def test_a_cpu_tensor_that_numpy_writes_is_read_again() -> None:
    """Nothing counts such a write."""
    bounds = np.array([0, 3, 8], dtype=np.int32)
    cu_seqlens = torch.from_numpy(bounds)
    query, key, value = (torch.randn(8, 2, 16) for _ in range(3))

    def attend() -> Tensor:
        return moba_attention_varlen(query, key, value, cu_seqlens, block_size=2, top_k=1)

    before = attend()
    bounds[1] = 5
    assert torch.equal(attend(), moba_attention_varlen(query, key, value, torch.tensor([0, 5, 8]).int(), block_size=2, top_k=1))
    assert not torch.equal(attend(), before)


def packed(tensors: list[Tensor], told: Tensor) -> Tensor:
    return moba_attention_varlen(*tensors, told, block_size=16, top_k=2)


def padded(tensors: list[Tensor], told: Tensor) -> Tensor:
    return moba_attention(*tensors, padding_mask=told, block_size=16, top_k=2)


def with_gradients(attend: Callable[[list[Tensor], Tensor], Tensor], tensors: list[Tensor], told: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(leaves, told)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_layers_and_backward_passes_share_a_layout_and_follow_what_is_written(kind: str, device: str, built: list[Tensor]) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (100, 4, 32) if kind == "packed" else (2, 4, 100, 32)
    of_layers = [[torch.randn(shape, device=device, dtype=dtype) for _ in range(3)] for _ in range(2)]
    if kind == "packed":
        attend, told, other = packed, torch.tensor([0, 40, 100]), torch.tensor([0, 71, 100])
    else:
        attend, told, other = padded, torch.arange(100) >= torch.tensor([[0], [30]]), torch.arange(100) >= torch.tensor([[50], [0]])
    told, other = (x.int().to(device) if kind == "packed" else x.to(device) for x in (told, other))
    wanted = {name: [with_gradients(attend, layer, x.clone()) for layer in of_layers] for name, x in (("told", told), ("other", other))}
    assert len(built) == 4, "each mask is another tensor, and is built once for forward and backward"
    built.clear()

    for name, mask in (("told", told.clone()), ("other", other)):
        told.copy_(mask)
        for layer, expected in zip(of_layers, wanted[name]):
            for a, b in zip(with_gradients(attend, layer, told), expected):
                assert torch.equal(a, b)
    assert len(built) == 2, "one for each content"
    number = id(told)
    del told, mask, built[:]
    gc.collect()
    assert number not in memo._entries, "what is kept keeps no mask alive"


@pytest.mark.parametrize("function", ["ours", "that of FlashMoBA"])
def test_bounds_of_queries_and_of_keys_are_put_together_once_and_again_when_either_is_written_to(
    function: str, device: str, built: list[Tensor]
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (torch.randn(n, 4, 32, device=device, dtype=dtype) for n in (40, 100, 100))
    bounds, bounds_k = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([0, 10, 40], [0, 60, 100]))

    def attend(bounds: Tensor, bounds_k: Tensor) -> Tensor:
        if function == "ours":
            return moba_attention_varlen(query, key, value, bounds, cu_seqlens_k=bounds_k, block_size=16, top_k=2)
        return flash_moba_varlen_func(query, key, value, bounds, bounds_k, 0, 0, moba_chunk_size=16, moba_topk=2)

    def check(bounds: Tensor, bounds_k: Tensor) -> None:
        wanted = attend(bounds.clone(), bounds_k.clone())
        built.clear()
        for _ in range(3):
            assert torch.equal(attend(bounds, bounds_k), wanted)
        assert len(built) == 1

    check(bounds, bounds_k)
    bounds[1] = 25
    check(bounds, bounds_k)
    bounds_k[1] = 55
    check(bounds, bounds_k)
    bounds_k = torch.tensor([0, 70, 100], device=device, dtype=torch.int32)  # which may have the old one's number
    check(bounds, bounds_k)
    number = id(bounds)
    del bounds, built[:]
    gc.collect()
    assert number not in memo._entries


def test_what_follows_from_two_tensors_is_of_these_two_whatever_other_threads_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "may_be_remembered", lambda x: True)
    before = sys.getswitchinterval()
    x, others = torch.zeros(2), [torch.full((2,), float(i)) for i in range(2)]
    for tensor in (x, *others):
        memo.remember(tensor)
    wrong: list[int] = []

    def ask(y: Tensor, number: int) -> None:
        wrong.extend(1 for _ in range(20_000) if memo.memo_of_both(x, y, "number", lambda: number) != number)

    threads = [threading.Thread(target=ask, args=(y, i)) for i, y in enumerate(others)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_what_follows_from_two_tensors_is_of_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "may_be_remembered", lambda x: True)
    x, y, stream = torch.zeros(2), torch.ones(2), iter([1, 2, 1, 2])
    monkeypatch.setattr(memo, "stream_of", lambda device: next(stream))
    for tensor in (x, y):
        memo.remember(tensor)
    a, b, again, b_again = (memo.memo_of_both(x, y, "sum", lambda: x + y) for _ in range(4))
    assert a is again and b is b_again and a is not b


def test_a_mask_is_checked_again_once_it_is_written_to(device: str) -> None:
    query = torch.randn(10, 2, 16, device=device)
    bounds = torch.tensor([0, 4, 10], device=device, dtype=torch.int32)
    for _ in range(2):
        moba_attention_varlen(query, query, query, bounds, block_size=4, top_k=2)
    bounds[1] = 11
    for _ in range(2):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at 10"):
            moba_attention_varlen(query, query, query, bounds, block_size=4, top_k=2)

    mask, rows = torch.ones(2, 10, dtype=torch.bool, device=device), query.view(1, 2, 10, 16).expand(2, -1, -1, -1)
    moba_attention(rows, rows, rows, padding_mask=mask, block_size=4, top_k=2)
    mask[1, 4] = False
    for _ in range(2):
        with pytest.raises(ValueError, match="padding_mask has a hole in row 1"):
            moba_attention(rows, rows, rows, padding_mask=mask, block_size=4, top_k=2)


def test_a_compiled_call_reads_its_mask_each_time(device: str, built: list[Tensor]) -> None:
    def attend(query: Tensor, lengths: Tensor) -> Tensor:  # both masks may come to lie in one tensor
        first, second = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (lengths, lengths.flip(0)))
        return sum(moba_attention_varlen(query, query, query, bounds, block_size=16, top_k=1) for bounds in (first, second))

    query, lengths = torch.randn(100, 2, 16, device=device), torch.tensor([30, 70], device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    actual = torch.compile(attend, backend=backend)(query, lengths)
    assert len(built) == 2
    torch.testing.assert_close(actual, attend(query, lengths))
