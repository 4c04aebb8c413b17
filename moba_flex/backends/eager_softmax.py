"""Softmax attention of queries to the keys of one block, forward and backward, in plain PyTorch: the core of the eager backend.

A log-sum-exp is rounded, and `exp(score - lse)` is off by as much: by 0.8 % for a score of 133,120 in float32. The forward pass keeps
log-sum-exps of large scores in float64 for that reason. The backward pass gets a rounded one, and recomputes it as a sum of two values
where that matters.

Inputs that are not `safe` (NaN, infinity, or values near the end of their range) use slower products, in which a weight of 0 hides any
value: see `moba_flex/core/hidden.py`. Only the own block has hidden pairs; along a route a query reads a whole block.

M queries and K keys of one block, P slots per block, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype
from ..core.hidden import visible_product
from ..core.settings import AttentionSettings

# e^30 * 1e10 is far below float32's maximum, and e^-30 (1e-13) far above its minimum, even times values down to 1e-24.
_SMALL_SCORE, _SMALL_SUM = 30.0, 1e10
_SAFE = 1e36  # bound on intermediate results, well below float32's maximum


def upcast(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


@dataclass(frozen=True)
class ValueRange:
    """What is known of the values of a call. `small`: no score is large, so none needs a subtraction. `safe`: nothing overflows."""

    small: bool
    safe: bool


def range_of(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> ValueRange:
    """`small` also means that sums of values weighted by `exp(score)` are far from float32's limits. Scores are bounded by norms."""
    lengths = [float(torch.linalg.vector_norm(x, dim=-1, dtype=accumulation_dtype(x.dtype)).max()) for x in (query, key)]
    score, values = lengths[0] * lengths[1] * abs(settings.scale), largest(value) * key.shape[2]
    safe = max(score, lengths[0] * lengths[1], lengths[1] * abs(settings.scale)) < _SAFE and values < _SAFE  # False for NaN
    return ValueRange(safe and score < _SMALL_SCORE and values < _SMALL_SUM, safe)


def backward_is_safe(
    query: float, key: float, value: float, grad: float, delta: float, width: int, value_width: int, settings: AttentionSettings
) -> bool:
    """Whether nothing overflows, given the largest absolute value of each operand. False for NaN."""
    products = query * key * width, query * key * width * abs(settings.scale), key * abs(settings.scale), grad * value * value_width + delta
    return all(x < _SAFE for x in products)


def largest(x: Tensor) -> float:
    return max(abs(float(bound)) for bound in torch.aminmax(x)) if x.numel() else 0.0


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The causal mask of a query's own block: keys up to its own position. It also hides the missing keys of a partial last block."""

    width: int
    device: torch.device
    tile: int | None = None  # queries `[q, tile]` are parts of blocks, which begin at slots `offset [q]`; None: whole blocks
    offset: Tensor | None = None

    def later(self) -> Tensor:
        """`[P, P]` or `[q, tile, P]`: the keys that come after a query."""
        if self.tile is None or self.offset is None:
            return _later(self.width, self.device)
        slot = torch.arange(self.width, device=self.device)
        return slot > (self.offset[:, None] + slot[: self.tile])[..., None]

    def hide(self, weight: Tensor) -> Tensor:
        """Sets `weight` to 0 at later keys, in place."""
        return weight.tril_() if self.tile is None else weight.masked_fill_(self.later(), 0)


def _later(width: int, device: torch.device) -> Tensor:
    """`[P, P]`: the keys that come after a query of the same block."""
    slot = torch.arange(width, device=device)
    return slot > slot[:, None]


def _scores(query: Tensor, key: Tensor, settings: AttentionSettings, safe: bool) -> Tensor:
    if safe:
        return settings.cap_(query @ (key * settings.scale).mT)
    return settings.cap_((query @ key.mT).mul_(settings.scale))


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: Diagonal | None,
    settings: AttentionSettings,
    known: ValueRange,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[..., M, D]` to `[..., K, D]` and its log-sum-exp. With `causal`, to keys up to the query's own.

    The output is written to `into`, if given. The log-sum-exp is float64, except for small scores.
    """
    weight, total, most = exponentials(query, key, causal, settings, known)
    lse = (total.log() if most is None else total.double().log().add_(most)).squeeze(-1)
    if known.safe:
        return torch.matmul(weight, value, out=into).div_(total), lse
    weight = weight.div_(total)  # before the product, which could overflow otherwise
    out = _product(weight, value, ~causal.later() if causal else None)
    return out if into is None else into.copy_(out), lse


def exponentials(
    query: Tensor, key: Tensor, causal: Diagonal | None, settings: AttentionSettings, known: ValueRange
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exponentials of scores `[..., M, K]`, their sums `[..., M, 1]`, and what was subtracted from the scores, or None."""
    weight, most = _scores(query, key, settings, known.safe), None
    if not known.small:
        later = causal.later() if causal else None
        most = (weight if later is None else weight.masked_fill_(later, -torch.inf)).amax(-1, keepdim=True)
        if not known.safe:
            most = torch.where(most.isfinite(), most, 0)
        weight -= most
        if later is not None:
            weight.masked_fill_(later, 0)  # the exponential of -inf takes many times as long as that of 0
    weight.exp_()
    if causal:
        causal.hide(weight)
    return weight, weight.sum(-1, keepdim=True), most


def softmax_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    rest: Tensor | None,
    hidden: Tensor | None,
    settings: AttentionSettings,
    safe: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one block, given the log-sum-exp over all blocks (`lse` plus `rest`) and `delta`, `out . grad - grad_lse`."""
    score = _scores(query, key, settings, safe)
    nothing = (lse == -torch.inf)[..., None]
    lse = lse[..., None].masked_fill(nothing, torch.inf)  # a query that reads nothing has no gradient
    weight = score - lse
    weight = (weight if rest is None else weight.sub_(rest[..., None])).exp_()
    if hidden is not None:
        hidden = hidden if safe else hidden | nothing
        weight.masked_fill_(hidden, 0)
    visible = None if safe or hidden is None else ~hidden
    grad_value = _product(weight.mT, grad, None if visible is None else visible.mT)
    grad_score = weight.mul_((grad @ value.mT).sub_(delta[..., None]))
    if settings.softcap is not None:
        grad_score *= 1 - (score / settings.softcap) ** 2
    grad_score *= settings.scale
    if visible is None or hidden is None:
        return grad_score @ key, grad_score.mT @ query, grad_value
    grad_score.masked_fill_(hidden, 0)
    return _product(grad_score, key, visible), _product(grad_score.mT, query, visible.mT), grad_value


def _product(weight: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    """`weight @ x`, restricted to `visible` pairs, if given."""
    return weight @ x if visible is None else visible_product(weight, visible, x)
