"""`set_flex_backend("flash")`: used where it agrees with plain PyTorch, and nowhere else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from support.cases import unchecked
from torch import Tensor

from moba_flex import moba_attention, set_flex_backend
from moba_flex.backends import flash


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Nothing is known of the kernels yet, and blocks are routed however few there are."""
    monkeypatch.setattr(flash, "_kernels", {})
    monkeypatch.setattr(flash, "_backend", "triton")
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


class StandIn:
    """What a compiled call would compute, from the lists alone. `spoil` changes its results; `unit` is that of its log-sum-exp."""

    def __init__(self, unit: float = 1.0, spoil=lambda out, lse: (out, lse)):
        self.unit, self.spoil, self.calls = unit, spoil, 0

    def __call__(self, settings: tuple):
        scale = settings[-1]

        def call(query: Tensor, key: Tensor, value: Tensor, none: Tensor, _: Tensor, count: Tensor, index: Tensor):
            self.calls += 1
            assert query.shape[2] == 128 * count.shape[2] and (none == 0).all()
            out, lse = query.new_zeros(*query.shape[:3], value.shape[3]), torch.full(query.shape[:3], -torch.inf)
            for tile, n in enumerate(count[0, 0].tolist()):
                if n:
                    rows = slice(tile * 128, (tile + 1) * 128)
                    keys = (index[0, 0, tile, :n, None] * 128 + torch.arange(128)).flatten()
                    score = query[0, 0, rows].float() @ key[0, 0, keys].float().mT * scale
                    out[0, 0, rows] = (score.softmax(-1) @ value[0, 0, keys].float()).to(out.dtype)
                    lse[0, 0, rows] = score.logsumexp(-1)
            return self.spoil(out, lse * self.unit)

        return call


@pytest.fixture
def without_a_gpu(monkeypatch):
    """FlexAttention without compilation, and the package's kernel replaced by what the test gives."""

    def replace(stand_in: StandIn) -> None:
        monkeypatch.setattr(flash, "_DEVICE", "cpu")
        monkeypatch.setattr(flash, "_LEAST_BLOCK", 128)
        monkeypatch.setattr(flash, "_compiled", stand_in)
        monkeypatch.setattr(flash, "_missing", lambda: None)

    return replace


def computed(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **settings) -> list[Tensor]:
    """Output, log-sum-exp and gradients through the FlexAttention path, of two query heads on one key head."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(1, heads, 520, 16, generator=generator).to(dtype).requires_grad_() for heads in (2, 1, 1)]
    out, lse = unchecked(*leaves, **{"block_size": 128, "top_k": 3, **settings}, return_lse=True, implementation="flex")
    return [out, lse, *torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), leaves)]


def assert_same(results: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), results, wanted):
        distance = (a.double() - b.double()).norm() / b.double().norm()
        assert distance < 1e-2, (name, distance.item())


@pytest.mark.parametrize("unit", [1.0, math.log(2)])
def test_a_kernel_that_agrees_is_used_whatever_the_unit_of_its_log_sum_exp(without_a_gpu, unit):
    wanted, stand_in = computed(), StandIn(unit)
    without_a_gpu(stand_in)
    set_flex_backend("flash")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = computed()
    assert_same(results, wanted)
    assert stand_in.calls == 3 + 1  # the check, and one chunk
    computed(1)
    assert stand_in.calls == 3 + 2  # it is checked once


def spoiled_in_one_row(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    out[0, 0, 10_000:10_001, 0] += 0.5
    return out, lse


def raises(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoiled_in_one_row, "output is not that of plain PyTorch"),
        (lambda out, lse: (out * torch.nan, lse), "output is not that of plain PyTorch"),
        (lambda out, lse: (out, lse * 1.2), "log-sum-exp is not that of plain PyTorch"),
        (raises, "RuntimeError: no such instruction"),
    ],
)
def test_a_kernel_that_differs_or_raises_is_not_used_and_one_warning_says_why(without_a_gpu, spoil, reason):
    wanted, stand_in = computed(), StandIn(spoil=spoil)
    without_a_gpu(stand_in)
    set_flex_backend("flash")
    with pytest.warns(UserWarning, match=reason) as caught:
        results = computed()
    assert len(caught) == 1
    calls = stand_in.calls
    for a, b in zip(results, wanted):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        computed(1)
    assert stand_in.calls == calls


@pytest.mark.parametrize(
    "settings",
    [{"softcap": 2.0}, {"causal": False}, {"block_size": 100}, {"block_size": 192}, {"block_size": 64}, {"dtype": torch.float32}],
    ids=str,
)
def test_what_the_kernel_cannot_do_stays_with_triton(without_a_gpu, settings):
    wanted, stand_in = computed(**settings), StandIn()
    without_a_gpu(stand_in)
    set_flex_backend("flash")
    for a, b in zip(computed(**settings), wanted):
        assert torch.equal(a, b)
    assert stand_in.calls == 0


def test_the_default_is_triton_and_setting_returns_what_was_before(without_a_gpu):
    stand_in = StandIn()
    without_a_gpu(stand_in)
    computed()
    assert stand_in.calls == 0
    assert set_flex_backend("flash") == "triton"
    assert set_flex_backend() == "flash"
    computed()
    assert stand_in.calls == 0


def test_a_missing_package_an_old_one_and_an_unknown_name_are_refused_and_change_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'flash-attn-4 4.0.0b26 or newer, which is not here: pip install "moba_flex\[flash\]"'):
        set_flex_backend("flash")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b10")
    with pytest.raises(ImportError, match=r'flash-attn-4 4.0.0b26 or newer, but this is 4.0.0b10: pip install "moba_flex\[flash\]"'):
        set_flex_backend("flash")
    for newer in ("4.0.0b26", "4.0.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, newer=newer: newer)
        set_flex_backend("flash")
        assert set_flex_backend() == "flash"
    with pytest.raises(ValueError, match=r"triton, flash.*'cudnn'"):
        set_flex_backend("cudnn")
    assert set_flex_backend() == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(flash._missing() is not None, reason='needs the package flash-attn-4: pip install "moba_flex[flash]"')
@pytest.mark.parametrize(("width", "value_width", "block_size"), [(128, 128, 2048), (64, 128, 1024)])
def test_on_a_gpu_it_equals_the_specification_or_says_why_not(width: int, value_width: int, block_size: int):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (4, width), (2, width), (2, value_width)
    leaves = [torch.randn(1, n, 9000, w, generator=generator, device="cuda").bfloat16().requires_grad_() for n, w in shapes]
    results = []
    set_flex_backend("flash")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for implementation in ("flex", "naive"):
            out, lse = moba_attention(*leaves, block_size=block_size, top_k=3, return_lse=True, implementation=implementation)
            results.append([out, lse, *torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), leaves)])
    assert_same(*results)
    assert flash._kernels, "it was tried"
    said = [str(w.message) for w in caught if "FLASH" in str(w.message)]
    assert (list(flash._kernels.values()) == [None]) == bool(said), "a kernel that is not used is warned of, and only such"
    if said:
        pytest.xfail(said[0])
