"""What one call asks for, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """The settings of one attention call, checked already."""

    block_size: int
    top_k: int
    sink_blocks: int
    recent_blocks: int
    causal: bool
    scale: float
    softcap: float | None = None

    @property
    def routed(self) -> int:
        """S: how many blocks a query takes by their scores, beside those that it always reads."""
        return self.top_k - 1 - self.sink_blocks - self.recent_blocks if self.causal else self.top_k

    @property
    def local(self) -> int:
        """How many blocks a query reads whatever its scores: its own, the sink blocks and the recent ones."""
        return 1 + self.sink_blocks + self.recent_blocks if self.causal else 0
