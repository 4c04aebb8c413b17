"""The implementation for CUDA with a one-kernel forward pass: `implementation="triton"`.

It supports blocks of up to 256 tokens in half precision, where it is faster than FlexAttention: tokens are read in place, and no rows are
copied. Everything but `attend` and `reads_tokens` is from `flex.py`. `paths.one_pass_obstacle` says what it does not support.
"""

from __future__ import annotations

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops import kernels
from ..ops.routing import Routes
from ..ops.rows import copy_into, empty_attention
from . import flex
from .flex import (
    HEAD_BY_HEAD,
    MAX_TENSOR_ELEMENTS,
    READS_STRIDES,
    backward,
    choose,
    delta,
    elements_per_row,
    route,
    slots_per_block,
    slots_per_query_tile,
)

# The protocol, most of which is from `flex.py`.
__all__ = ["HEAD_BY_HEAD", "MAX_TENSOR_ELEMENTS", "READS_STRIDES", "backward", "choose", "delta", "elements_per_row", "route"]
__all__ += ["attend", "reads_tokens", "slots_per_block", "slots_per_query_tile"]


def reads_tokens(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> bool:
    """Whether tokens are read in place: always in the forward pass, which gets only supported calls."""
    return not backward or flex.reads_tokens(query, value, layout, backward)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes | None,
    layout: BlockLayout,
    settings: AttentionSettings,
    into: tuple[Tensor, Tensor],
) -> None:
    """Attention to the own block and along `routes`, merged by log-sum-exps. Writes output and log-sum-exp to `into`."""
    if routes is None and settings.causal:
        kernels.one_pass_forward(query, key, value, None, layout, settings, into)
        return
    # Not `into` itself: when merging, a warp would read a query's log-sum-exp after another warp has overwritten it.
    apart = into[0].new_empty(into[0].shape), into[1].new_empty(into[1].shape)
    rows = kernels.one_pass_forward(query, key, value, routes, layout, settings, apart)
    own = apart if settings.causal else empty_attention(query, value)
    if rows is None or routes is None:
        copy_into(own, into)
    else:
        kernels.merge(*own, *rows, routes, layout, into)
