"""The settings of one attention call: built once by the public function, and handed down whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

DEFAULT_WORKING_MEMORY = 2 << 30


@dataclass(frozen=True)
class AttentionSettings:
    """What a call asks for apart from its tensors, validated already. Its fields are the arguments of `moba_flex.moba_attention`."""

    block_size: int
    top_k: int
    sink_blocks: int = 0
    recent_blocks: int = 0
    share_selection: bool = False
    causal: bool = True
    scale: float = 1.0
    softcap: float | None = None
    implementation: str = "eager"  # "eager", "flex", "triton" or "naive": "auto" is resolved
    working_memory: int = DEFAULT_WORKING_MEMORY  # bytes that routed rows may take at a time

    @property
    def n_routed(self) -> int:
        """S: how many blocks a query is routed to. With causal attention its own block is not one of them."""
        return self.top_k - 1 if self.causal else self.top_k

    def cap_(self, score: Tensor) -> Tensor:
        """`score` after the softcap, if there is one. In place."""
        return score if self.softcap is None else score.div_(self.softcap).tanh_().mul_(self.softcap)

    def to_arguments(self) -> tuple[tuple[int, ...], bool, bool, float, float | None, str]:
        """As arguments of an operator: `sizes`, `causal`, `share_selection`, `scale`, `softcap`, `implementation`.

        What PyTorch does around an operator grows with the square of the number of its arguments, so all whole numbers are one.
        """
        sizes = self.block_size, self.top_k, self.sink_blocks, self.recent_blocks, self.working_memory
        return sizes, self.causal, self.share_selection, self.scale, self.softcap, self.implementation

    @classmethod
    def from_arguments(
        cls, sizes: Sequence[int], causal: bool, share_selection: bool, scale: float, softcap: float | None, implementation: str
    ) -> AttentionSettings:
        """The inverse of `to_arguments`."""
        block_size, top_k, sink_blocks, recent_blocks, working_memory = sizes
        blocks = block_size, top_k, sink_blocks, recent_blocks
        return cls(*blocks, share_selection, causal, scale, softcap, implementation, working_memory)

    @property
    def n_free(self) -> int:
        """How many of these the gate chooses by their scores. The others are sink and recent blocks."""
        return self.n_routed - self.sink_blocks - self.recent_blocks
