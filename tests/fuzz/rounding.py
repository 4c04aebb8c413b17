"""What rounding can do to the results of a call, and whether they are within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from support.oracle import Expected
from torch import Tensor

from .choices import LARGEST, Wrong
from .draws import DTYPES, Draw

UNCERTAIN = 0.02  # of weights: with more, values say nothing
MOST_ON_A_GPU = 1e9  # a score, of which docs/limits.md speaks


@dataclass(frozen=True)
class Sizes:
    """What rounding can do: the relative error of weights, that of a soft-cap's slope; the largest product, and the largest score."""

    weights: float
    slope: float
    wide: float
    narrow: float
    limit: float
    score: float


def sizes_of(draw: Draw, tensors: dict[str, Tensor], visible: Tensor) -> Sizes:
    case, dtype = draw.case, DTYPES[draw.dtype]
    wide = torch.float64 if draw.dtype == "float64" else torch.float32
    query, key = (torch.where(tensors[name].cpu().isfinite(), tensors[name].cpu(), 0).double() for name in ("query", "key"))
    product = query.abs() @ key.abs().repeat_interleave(case.repeats, 1).mT
    most = float(product.masked_fill(~visible, 0).max()) if visible.any() else 0.0
    score = most * abs(case.real_scale)
    eps = torch.finfo(wide).eps
    error = eps * (case.width + 8) * score
    slope = 0.0
    if case.softcap is not None:  # the rounding of a product may turn its sign, and a capped score from one end to the other
        slope = 4 * error / case.softcap
        error = min(error, 2 * case.softcap) + 8 * eps * min(score, case.softcap)
    return Sizes(error, slope, eps, torch.finfo(dtype).eps, most * max(1.0, abs(case.real_scale)), min(score, case.softcap or score))


def bounds_of(
    draw: Draw, tensors: dict[str, Tensor], upstream: dict[str, Tensor], visible: Tensor, wanted: Expected, sizes: Sizes
) -> dict[str, float]:
    """The largest error that rounding explains, for each result."""
    case = draw.case
    some, read = visible.any(-1), visible.any(2).unflatten(1, (case.groups, case.repeats)).any(2)
    largest = {name: _largest(tensors[name][some if name == "query" else read]) for name in ("query", "key", "value")}
    g_out, g_lse = _largest(upstream["out"]), _largest(upstream["lse"]) if "lse" in upstream else 0.0
    relative = 8 * sizes.weights + 300 * sizes.wide + 8 * sizes.narrow
    per_score = 2 * g_out * largest["value"] * case.value_width + g_lse
    reading = float(visible.double().sum(2).amax()) * case.repeats if visible.any() else 0.0
    bounds = {
        "out": relative * largest["value"],
        "lse": 4 * sizes.weights + 20 * sizes.wide * (1 + _largest(wanted.results["lse"])),
        "gradient of query": relative * per_score * abs(case.real_scale) * largest["key"] * 2,
        "gradient of key": relative * per_score * abs(case.real_scale) * largest["query"] * reading,
        "gradient of value": relative * g_out * reading,
    }
    if sizes.slope > UNCERTAIN:
        bounds["gradient of query"] = bounds["gradient of key"] = math.inf
    if case.sinks:
        bounds["gradient of sinks"] = relative * per_score * case.n_query * case.batch
    return bounds


def _largest(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def compare(name: str, x: Tensor, wanted: Expected, bound: float, dtype: torch.dtype, implementation: str) -> None:
    y, clean, info = wanted.results[name], wanted.clean[name], torch.finfo(dtype)
    clean = clean.view(*clean.shape, *(1,) * (x.dim() - clean.dim())).expand_as(x)
    judged = clean & (y.abs() < min(info.max, LARGEST) / 4) if name != "lse" else clean & y.isfinite()
    error = (x.double() - y).abs()
    bound = bound if bound < math.inf else math.inf  # which NaN is not
    allowed = bound + info.eps * y.abs() * 2 + info.smallest_normal * 4 * (1 if dtype == torch.float16 else 1e3)
    wrong = judged & ~(error <= allowed)
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise Wrong(f"{implementation}: {name} {at} is {float(x[at]):.6g}, should be {float(y[at]):.6g}, within {float(allowed[at]):.2g}")
