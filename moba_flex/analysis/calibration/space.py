"""The settings that are searched, and the share of the keys that each of them reads.

L layers that MoBA can replace, N tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...config import MobaConfig
from ..explain import share_of_keys

KEYS = (1 / 16, 1 / 8, 1 / 4, 3 / 8)  # key budgets, as shares of a text
MOST_FULL = 1 / 2  # largest share of layers with full attention
FULL_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of layers that keep full attention


@dataclass(frozen=True)
class Space:
    """The search space: block sizes and key budgets, for a model and a length."""

    template: MobaConfig  # settings that are not searched: `decode`, `implementation`, `key_conv`
    length: int
    layers: tuple[int, ...]  # layers that MoBA can replace
    block_sizes: tuple[int, ...]
    budgets: tuple[int, ...]  # largest numbers of keys that a query reads

    def reference(self) -> MobaConfig:
        """The settings with which variants and layers are compared: the middle block size, and the second smallest budget."""
        budget = sorted(self.budgets)[min(1, len(self.budgets) - 1)]
        return self.config(self.block_sizes[len(self.block_sizes) // 2], budget, self.template)

    def config(self, block_size: int, budget: int, variant: MobaConfig) -> MobaConfig:
        """Settings of that size, with the sinks, recent blocks and shared selection of `variant`."""
        top_k = max(budget // block_size, 2 + variant.sink_blocks + variant.recent_blocks)  # at least one block is chosen
        return replace(variant, block_size=block_size, top_k=top_k)

    def blocks(self, variant: MobaConfig) -> list[MobaConfig]:
        """All sizes and budgets, without full layers, except those that would read all keys of a text."""
        found = {self.config(size, budget, variant): None for size in self.block_sizes for budget in self.budgets}
        return [config for config in found if config.block_size * config.top_k < self.length]

    def full_counts(self) -> list[int]:
        """The numbers of layers that may keep full attention, up to half of them."""
        return [n for n in FULL_STEPS if n <= len(self.layers) * MOST_FULL]

    def share(self, config: MobaConfig | None) -> float:
        """The keys of a text that all layers read, divided by those of full attention."""
        if config is None:
            return 1.0
        n_full = len(set(config.full_attention_layers) & set(self.layers))
        sparse = share_of_keys(self.length, self.length, config.block_size, config.top_k)
        return (n_full + (len(self.layers) - n_full) * sparse) / len(self.layers)


def default_block_sizes(length: int) -> tuple[int, ...]:
    """Three powers of two: 32, 64 and 128 up to 4,096 tokens, 64, 128 and 256 beyond; smaller ones for texts with few such blocks.

    >>> from moba_flex.analysis.calibration.space import default_block_sizes
    >>> default_block_sizes(4096), default_block_sizes(32_768), default_block_sizes(512)
    ((32, 64, 128), (64, 128, 256), (4, 8, 16))
    """
    largest = 128 if length <= 4096 else 256
    while largest > 4 and largest * 32 > length:
        largest //= 2
    return largest // 4, largest // 2, largest


def default_budgets(length: int) -> tuple[int, ...]:
    """A sixteenth, an eighth, a quarter and three eighths of a text."""
    return tuple(int(length * share) for share in KEYS)


def with_full_layers(config: MobaConfig, layers: Iterable[int] = ()) -> MobaConfig:
    """The same settings with full attention in these layers and no others."""
    return replace(config, full_attention_layers=tuple(sorted(layers)))


def is_dominated_by(config: MobaConfig, other: MobaConfig) -> bool:
    """Whether `config` must lose at least as much as `other`: no more keys, no smaller blocks, no other full layers, else equal."""
    return (
        (config.sink_blocks, config.recent_blocks, config.share_selection)
        == (other.sink_blocks, other.recent_blocks, other.share_selection)
        and config.block_size >= other.block_size
        and config.block_size * config.top_k <= other.block_size * other.top_k
        and set(config.full_attention_layers) <= set(other.full_attention_layers)
    )


def variants(config: MobaConfig) -> Iterable[MobaConfig]:
    """Other sinks, a recent block, and a shared selection, one at a time."""
    for change in ({"sink_blocks": 0}, {"sink_blocks": 2}, {"recent_blocks": 1}, {"share_selection": True}):
        other = {**config.to_dict(), **change}
        if 2 + other["sink_blocks"] + other["recent_blocks"] <= config.top_k:
            yield MobaConfig.from_dict(other)
