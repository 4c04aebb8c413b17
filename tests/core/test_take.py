"""The copy between tokens and block slots is that of plain PyTorch, bit for bit, in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/core/test_take.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex.core import take as module
from moba_flex.core.take import take, take_by_kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 50, 64, 24), (3, 2, 37, 80, 16), (2, 1, 1, 5, 1), (1, 2, 0, 4, 8), (2, 3, 9, 0, 4)], ids=str)
@pytest.mark.parametrize("tokens_first", [True, False])
def test_tokens_are_taken_as_by_pytorch(shape, dtype, tokens_first, monkeypatch):
    rows, heads, tokens, places, width = shape
    monkeypatch.setattr(module, "_TILE", 256)
    x = torch.randint(-9, 9, (rows, heads, tokens, width)).to(dtype)
    if tokens_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.randint(-1, tokens, (rows, places)) if tokens else torch.full((rows, places), -1)
    for fill, of in ((0, x), (-1, x), (-1, x[..., 0])):
        wanted = take(of, index, fill)
        assert torch.equal(take_by_kernel(of, index, fill), wanted)
        into = torch.full_like(wanted.transpose(1, 2), 7).contiguous().transpose(1, 2)
        assert take_by_kernel(of, index, fill, into) is into and torch.equal(into, wanted)


def test_log_sum_exps_are_filled_with_minus_infinity():
    x, index = torch.randn(2, 3, 10), torch.tensor([[4, -1, 0], [-1, -1, 9]])
    assert torch.equal(take_by_kernel(x, index, -torch.inf), take(x, index, -torch.inf))


def test_numbers_of_a_token_may_lie_further_apart_than_32_bits_count():
    """As in a query that was laid out width by width, of millions of tokens. Of the memory hardly a page is touched."""
    memory = torch.empty((1 << 32) + 64, dtype=torch.int8)  # what lies before would be read if offsets began again below 0
    x = memory.as_strided((1, 1, 4, 3), (0, 0, 1, (1 << 30) + 1), 1 << 31)
    memory[:8] = 7
    x.copy_(torch.arange(12).view(1, 1, 4, 3))
    index = torch.tensor([[3, -1, 0, 2]])
    assert take_by_kernel(x, index, -1).tolist() == [[[[9, 10, 11], [-1, -1, -1], [0, 1, 2], [6, 7, 8]]]]
