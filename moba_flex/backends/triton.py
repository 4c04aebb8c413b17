"""The implementation for CUDA with a forward pass of one kernel: `implementation="triton"`.

It takes blocks of up to 256 tokens in half precision, where it beats FlexAttention: tokens are read where they are in memory, and no
row of them is copied. Everything but `attend` is that of `flex.py`. `paths.one_pass_obstacle` says what it does not take.
"""

from __future__ import annotations

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..ops import kernels
from ..ops.routing import Routes
from ..ops.rows import over_no_keys, write
from . import flex
from .flex import (
    HEAD_BY_HEAD,
    MAX_TENSOR_ELEMENTS,
    READS_STRIDES,
    backward,
    choose,
    delta,
    route,
    row_numbers,
    slots_per_block,
    slots_per_query_tile,
)

# The protocol, most of which is that of `flex.py`.
__all__ = ["HEAD_BY_HEAD", "MAX_TENSOR_ELEMENTS", "READS_STRIDES", "backward", "choose", "delta", "route", "row_numbers"]
__all__ += ["attend", "reads_tokens", "slots_per_block", "slots_per_query_tile"]


def reads_tokens(query: Tensor, value: Tensor, layout: BlockLayout, backward: bool) -> bool:
    """Whether tokens are taken where they lie: always forward, where no other call comes here."""
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
    """Attention to the own block and along `routes`, merged by log-sum-exps; output and log-sum-exp go to `into`."""
    if routes is None and settings.causal:
        kernels.one_pass_forward(query, key, value, None, layout, settings, into)
        return
    # Not `into` itself: warps that share a query's log-sum-exp would read it after another one has written the merged one.
    apart = into[0].new_empty(into[0].shape), into[1].new_empty(into[1].shape)
    rows = kernels.one_pass_forward(query, key, value, routes, layout, settings, apart)
    own = apart if settings.causal else over_no_keys(query, value)
    if rows is None or routes is None:
        write(own, into)
    else:
        kernels.merge(*own, *rows, routes, layout, into)
