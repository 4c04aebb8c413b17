"""The gate's kernels choose by full float32 means, in Triton's interpreter, where two halves of them do not tell blocks apart.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_gate_kernel.py

`tests/gpu/test_gpu_operation.py` has the same cases on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.near_ties import NEAR_TIES, NearTies, check_choices

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from triton.language import bfloat16, float32
from triton.runtime.interpreter import InterpreterBuilder

from moba_flex.core.layout_builders import dense_layout, packed_layout, padded_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import gate as plain
from moba_flex.ops.triton import gate


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton's interpreter holds bfloat16 as integers, and multiplies these."""
    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("case", NEAR_TIES, ids=str)
def test_near_ties_are_decided_by_float32_means(case: NearTies):
    check_choices(case, "cpu")


def exact_searches(case: NearTies, monkeypatch) -> float:
    """The share of tiles that ask for one."""
    search, flags = gate._search_kernel, []

    def recording(grid):
        def launch(*args, **options):
            flags.append(args[6].bool())
            return search[grid](*args, **options)

        return launch

    monkeypatch.setattr(gate, "_search_kernel", type("Recording", (), {"__getitem__": lambda _, grid: recording(grid)})())
    query, key = case.tensors("cpu")
    gate.choose(query, key, case.layout("cpu"), case.settings)
    return flags[0].float().mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_blocks_in_doubt_need_no_exact_search(dtype: torch.dtype, monkeypatch):
    assert exact_searches(NearTies(1, dtype, 2, 3, 40, n_query=128), monkeypatch) == 0
    assert exact_searches(NearTies(1, dtype, 40, 3, 40, n_query=128), monkeypatch) == 1


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["dense", "padded", "packed"])
def test_choices_are_those_of_plain_pytorch(kind: str, dtype: torch.dtype, bad: float):
    """Causal, with a sink and a recent block, with equal blocks, with a block that holds no number or keys that are 0."""
    n, block_size = 400, 16
    settings = AttentionSettings(block_size, 5, sink_blocks=1, recent_blocks=1, implementation="flex")
    if kind == "packed":
        layout = packed_layout(torch.tensor([0, 37, 290, n], dtype=torch.int32), n, block_size, block_size)
    elif kind == "padded":
        layout = padded_layout(torch.arange(n)[None] >= 50, n, block_size, block_size)
    else:
        layout = dense_layout(1, n, n, block_size, block_size, torch.device("cpu"))
    query, key = torch.randn(1, 4, n, 32).to(dtype), torch.randn(1, 2, n, 32).to(dtype)
    key[:, :, 80:112] = key[:, :, 112:144]  # equal blocks where they start at multiples of 16
    key[:, :, 64 : 80 if bad == 0 else 65] = bad
    query, key = layout.query_slots(query), layout.key_slots(key)
    found = gate.choose(query, key, layout.in_slots(), settings)
    wanted = plain.choose(query.float(), key.float(), layout, settings)
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)
