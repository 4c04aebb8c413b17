"""The settings of one attention call: built once by the public function and passed down as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

DEFAULT_WORKING_MEMORY = 2 << 30


@dataclass(frozen=True)
class AttentionSettings:
    """The validated arguments of `moba_flex.moba_attention` other than tensors, and the memory budget."""

    block_size: int
    top_k: int
    sink_blocks: int = 0
    recent_blocks: int = 0
    share_selection: bool = False
    causal: bool = True
    scale: float = 1.0
    softcap: float | None = None
    implementation: str = "eager"  # "eager", "flex", "triton" or "naive": "auto" is resolved
    working_memory: int = DEFAULT_WORKING_MEMORY  # bytes for routed rows, see `set_working_memory`

    @property
    def n_routed(self) -> int:
        """S: number of blocks that a query is routed to. In causal attention its own block is not one of them."""
        return self.top_k - 1 if self.causal else self.top_k

    def cap_(self, score: Tensor) -> Tensor:
        """Applies the softcap, if any, to `score` in place."""
        return score if self.softcap is None else score.div_(self.softcap).tanh_().mul_(self.softcap)

    def to_arguments(self) -> tuple[tuple[int, ...], bool, bool, float, float | None, str]:
        """The settings as operator arguments: `sizes`, `causal`, `share_selection`, `scale`, `softcap`, `implementation`.

        PyTorch's overhead per operator call grows with the square of the number of arguments, so all ints are one argument.
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
        """Number of routed blocks that the gate chooses by score. The others are sink and recent blocks."""
        return self.n_routed - self.sink_blocks - self.recent_blocks
