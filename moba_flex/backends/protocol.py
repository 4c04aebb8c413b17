"""The backend interface: the steps of MoBA. A backend is a module with these functions.

Shapes are those of tensors in block slots. If a backend `reads_tokens`, it gets tokens in place, and the layout says where blocks begin.

B batch, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, D and Dv head dimensions.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings

# The row of each (query, chosen block) pair. Opaque, except to the backend that created it.
Routes = Any


@runtime_checkable
class Backend(Protocol):
    """The steps of one implementation.

    Attributes:
        MAX_TENSOR_ELEMENTS: maximum number of elements of a tensor of a call; larger calls are split into parts.
        READS_STRIDES: whether tensors may be transposed views of `[B, N, H, D]` instead of contiguous. Outputs and gradients then have
            the strides of the tensors that they belong to.
        HEAD_BY_HEAD: whether a large call is faster one query head at a time, with several in parallel on a CPU.
    """

    MAX_TENSOR_ELEMENTS: int
    READS_STRIDES: bool
    HEAD_BY_HEAD: bool

    def slots_per_block(self, block_size: int, /) -> int:
        """P: number of slots for a block of `block_size` tokens."""
        ...

    def slots_per_query_tile(self, width: int, n_query: int, sequences: int, /) -> int:
        """Number of slots per query tile if queries are the last tokens of packed sequences, from shapes alone."""
        ...

    def reads_tokens(self, query: Tensor, value: Tensor, layout: BlockLayout, backward: bool, /) -> bool:
        """Whether `choose` and `attend`, or `backward`, read tokens in place, `[B, H, Nq, D]`, instead of in slots."""
        ...

    def elements_per_row(self, query: Tensor, value: Tensor, layout: BlockLayout, backward: bool, /) -> int:
        """Number of elements of the query's dtype that a pass holds per routed row. It determines the size of chunks."""
        ...

    def choose(self, query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings, /) -> Tensor:
        """The gate: `[B, H, Q * P, D]`, `[B, G, C * P, D]` -> the chosen blocks `[B, H, Q * P, S]` int32, padded with -1."""
        ...

    def route(self, chosen: Tensor, groups: int, n_blocks: int, max_pairs: int, /) -> Routes:
        """The (query, block) pairs of `chosen`, at most `max_pairs`, sorted by block."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        routes: Routes | None,
        layout: BlockLayout,
        settings: AttentionSettings,
        into: tuple[Tensor, Tensor],
        /,
    ) -> None:
        """Causal attention to the own block and attention along `routes`, merged by their log-sum-exps.

        Writes the output `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]` to `into`. If not causal, there is no own block.
        """
        ...

    def delta(self, out: Tensor, grad: Tensor, grad_lse: Tensor | None, /) -> Tensor:
        """`out . grad - grad_lse` `[B, H, Nq]`, at least float32: `grad_score = weight * (grad_weight - delta)`."""
        ...

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grad: Tensor,
        lse: Tensor,
        delta: Tensor,
        routes: Routes | None,
        layout: BlockLayout,
        settings: AttentionSettings,
        into: tuple[Tensor, Tensor, Tensor],
        /,
    ) -> None:
        """Writes the gradients of query, key and value, through the own block and along `routes`, to `into`.

        `lse` is the log-sum-exp over all blocks of a query, so no partial output is needed.
        """
        ...
