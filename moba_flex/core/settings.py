"""What one call asks for, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSettings:
    """The settings of one attention call, checked already."""

    block_size: int
    top_k: int
    sink_blocks: int
    recent_blocks: int
    causal: bool
    scale: float
    softcap: float | None = None
    share_selection: bool = False

    @property
    def routed(self) -> int:
        """S: how many blocks a query is routed to. Its own block is no matter of routing when attention is causal."""
        return self.top_k - 1 if self.causal else self.top_k
