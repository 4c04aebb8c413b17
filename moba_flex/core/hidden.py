"""Matrix products that ignore hidden elements. In IEEE arithmetic 0 * NaN is NaN, so a weight of 0 alone hides nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .compiling import outside_graphs
from .upstream import functorch_transform
from .validation import have_values


def all_finite(*tensors: Tensor) -> bool:
    """Whether all elements are finite. False if values must not be read."""
    if torch.compiler.is_compiling() or functorch_transform() is not None or not have_values(*tensors):
        return False
    return all(bool(x.isfinite().all()) for x in tensors)


@outside_graphs
def some_not_finite(*tensors: Tensor) -> bool:
    """Whether an element is NaN or infinite. False if values must not be read. A graph must not ask."""
    if functorch_transform() is not None or not have_values(*tensors):
        return False
    return not all(bool(x.isfinite().all()) for x in tensors)


def finite(x: Tensor) -> Tensor:
    """`x` with NaN and infinity replaced by 0."""
    return torch.where(x.isfinite(), x, 0)


def visible_product(weight: Tensor, visible: Tensor, x: Tensor) -> Tensor:
    """`weight [..., M, K] @ x [..., K, D]`, restricted to pairs that are `visible [..., M, K]`. Other weights must be 0.

    NaN and infinity in `x` reach the rows of `weight` that can see them, with the sign that a positive weight gives.
    """
    kinds = torch.cat([x == math.inf, x == -math.inf, x.isnan()], -1)
    above, below, nan = ((visible.to(weight.dtype) @ kinds.to(weight.dtype)) > 0).chunk(3, -1)
    reached = torch.zeros_like(above, dtype=weight.dtype)
    reached = reached.masked_fill(above, math.inf).masked_fill(below, -math.inf).masked_fill(nan | (above & below), math.nan)
    return weight @ finite(x) + reached * weight.sum(-1, keepdim=True)  # the sum makes the gradient of `weight` non-finite too
