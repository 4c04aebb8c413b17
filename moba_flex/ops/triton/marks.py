"""Numbers that a GPU writes to host memory: how far it has got is then known without a CUDA call."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["number"])
def _mark_kernel(REACHED, number):
    tl.store(REACHED, number)


def mark(reached: Tensor, number: int) -> None:
    """Write `number` to `reached`, int32 in pinned host memory, when the current stream gets there.

    A copy would use the GPU's copy engine: the kernels before and after it do not overlap then, which takes 20 us.
    """
    _mark_kernel[(1,)](reached, number, num_warps=1)
