"""What a backend is: the steps of MoBA. A backend is a module with these functions.

Shapes are those of tensors in block slots. Where a backend `reads_tokens`, it is given tokens as they lie, and the layout says where.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, S chosen blocks per query, D and Dv widths.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings

# Where each (query, chosen block) pair went. Only the backend that made them looks inside.
Routes = Any


@runtime_checkable
class Backend(Protocol):
    """The steps of one implementation.

    Attributes:
        MAX_TENSOR_ELEMENTS: how many elements a tensor of a call may have; larger calls are cut into parts.
        READS_STRIDES: whether tensors may have their heads together for each token, instead of one head after another. Outputs and
            gradients then lie as what they belong to.
        HEAD_BY_HEAD: whether a large call is sooner done one query head at a time, several side by side on a CPU.
    """

    MAX_TENSOR_ELEMENTS: int
    READS_STRIDES: bool
    HEAD_BY_HEAD: bool

    def slots_per_block(self, block_size: int, /) -> int:
        """P: how many slots the layout gives to a block of `block_size` tokens."""
        ...

    def slots_per_query_tile(self, width: int, n_query: int, sequences: int, /) -> int:
        """How many slots a tile of queries has where they are the last tokens of packed sequences, from shapes alone."""
        ...

    def reads_tokens(self, query: Tensor, value: Tensor, layout: BlockLayout, backward: bool, /) -> bool:
        """Whether `choose` and `attend`, or `backward`, take tokens where they lie, `[B, H, Nq, D]`, instead of in slots."""
        ...

    def row_numbers(self, query: Tensor, value: Tensor, layout: BlockLayout, backward: bool, /) -> int:
        """How many numbers of the queries' dtype a pass holds for each routed row: by it calls are cut to fit into the working memory."""
        ...

    def choose(self, query: Tensor, key: Tensor, layout: BlockLayout, settings: AttentionSettings, /) -> Tensor:
        """The gate: `[B, H, Q * P, D]`, `[B, G, C * P, D]` -> the chosen blocks `[B, H, Q * P, S]` int32, -1 where there are fewer."""
        ...

    def route(self, chosen: Tensor, groups: int, n_blocks: int, max_pairs: int, /) -> Routes:
        """The (query, block) pairs of `chosen`, at most `max_pairs`, in the order of blocks."""
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
        """Causal attention to the own block, attention to the blocks of `routes`, and their sum by log-sum-exps.

        The output `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]` go to `into`. Without a causal mask no block is a query's own.
        """
        ...

    def delta(self, out: Tensor, grad: Tensor, grad_lse: Tensor | None, /) -> Tensor:
        """`out . grad - grad_lse` `[B, H, Nq]`, float32 at least: what is subtracted from every score's gradient."""
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
        """Gradients of query, key and value, through the own block and along `routes`; they go to `into`.

        `lse` is the log-sum-exp over all blocks of a query, so that no partial output has to be known.
        """
        ...
