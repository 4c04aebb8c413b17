"""Marks, in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/ops/test_marks_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex.ops import triton as kernels


def test_a_mark_writes_its_number():
    reached = torch.full((), 7, dtype=torch.int32)
    for number in (0, 1, 2, 16, 255):
        kernels.mark(reached, number)
        assert reached.item() == number
