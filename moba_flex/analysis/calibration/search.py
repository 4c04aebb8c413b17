"""The search for the cheapest settings within a limit: sinks, then layers, then sizes, then the check on texts set aside.

It measures little, by what is known of MoBA: more blocks, and more layers with full attention, lose less. So a setting that fails rules out
all that read a part of what it reads, and one that passes rules out all that cost more.

S search texts, H held-out texts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from ...config import MobaConfig
from .measure import Meter, Reading, name_of
from .space import Space, is_below, variants

NEAR = 0.02  # costs that differ by less count as equal
CANDIDATE_LAYERS, MOST_GREEDY = 3, 4  # layers that are tried in each round, and rounds


@dataclass(frozen=True)
class Limits:
    """What is asked for; None: no limit."""

    within: float  # nats behind full attention
    last_quarter: float | None = None  # nats behind it
    agreement: float | None = None  # least share of the positions
    retrieval: float | None = None  # least share of the facts that full attention finds


class Search:
    """The steps of a calibration, in order: `run`."""

    def __init__(self, meter: Meter, space: Space, limits: Limits, search: Sequence[int], held_out: Sequence[int]) -> None:
        self.meter, self.space, self.limits = meter, space, limits
        self.search, self.held_out = list(search), list(held_out)
        self.order: list[int] = []  # layers, those that need full attention most first
        self.gains: dict[int, float] = {}  # nats that each layer alone gives back
        self.together: list[tuple[tuple[int, ...], float, float]] = []  # layers, nats they give back, the sum of each alone
        self.seen: dict[MobaConfig, dict[int, Reading]] = {}
        self.full: dict[int, Reading] = {}
        self.checked: set[MobaConfig] = set()  # on the texts set aside

    def measure_full(self) -> None:
        """Full attention on all texts: what everything else is compared with."""
        for text in [*self.search, *self.held_out]:
            if text not in self.full:
                self.full[text] = self.meter.read(None, text, timed=True)

    def run(self, costs: Costs, extra: Callable[[MobaConfig], bool]) -> MobaConfig | None:
        """The cheapest setting that keeps all limits on the texts set aside, or None. `extra`: one more condition, asked last."""
        variant = self.choose_variant()
        blocks = self.space.blocks(variant)
        if not blocks:
            return None
        costs.prepare(blocks)
        cost = costs.of
        candidates = sorted(blocks, key=cost)
        cheapest = candidates[0]  # where it holds, nothing is cheaper, and no layer needs to be full
        if self.holds(cheapest, self.search) and self.passes_check(cheapest, extra):
            return cheapest
        self.rank_layers(variant)
        candidates = [
            replace(config, full_attention_layers=tuple(sorted(self.order[:n]))) for config in candidates for n in self.space.full_counts()
        ]
        ordered = sorted(candidates, key=lambda config: (rounded(cost(config)), self.space.share(config), config.block_size))
        found = self.cheapest(ordered, lambda config: self.holds(config, self.search))
        if found is None or self.passes_check(found, extra):
            return found
        costlier = [config for config in ordered[ordered.index(found) + 1 :] if not is_below(config, found)]
        return self.cheapest(costlier, lambda config: self.passes_check(config, extra) and self.holds(config, self.search))

    def cheapest(self, ordered: Iterable[MobaConfig], holds: Callable[[MobaConfig], bool]) -> MobaConfig | None:
        """The first of `ordered` that holds, by halves: what a failure or a success rules out is not measured."""
        left, best = list(ordered), None
        while left:
            probe = left[(len(left) - 1) // 2]
            if holds(probe):
                best, left = probe, left[: left.index(probe)]
            else:
                left = [config for config in left if not is_below(config, probe)]
        return best

    def choose_variant(self) -> MobaConfig:
        """The reference with those sinks, recent blocks and shared choice that lose least on the search texts."""
        best = self.space.reference()
        for other in variants(best):
            least = self.difference(best, self.search)
            if self.difference(other, self.search, stop=least) < least:
                best = other
        return best

    def rank_layers(self, variant: MobaConfig) -> None:
        """Put the layers into the order in which full attention helps: each alone, then the best ones together.

        Each layer is measured on the search text that loses most, the best ones on all. In each round the next layer is the one that
        gives back most beside those found: two layers may do the same work, or only help together.
        """
        text = max(self.search, key=lambda i: self.lost(variant, i))
        least = self.lost(variant, text)
        self.gains = {n: least - self.lost(replace(variant, full_attention_layers=(n,)), text) for n in self.space.layers}
        rest = sorted(self.gains, key=lambda n: -self.gains[n])
        lost = self.difference(variant, self.search)
        found: list[int] = []
        for _ in range(min(MOST_GREEDY, len(rest) // 2)):
            tried = {n: self.difference(self._full(variant, [*found, n]), self.search) for n in rest[:CANDIDATE_LAYERS]}
            best = min(tried, key=lambda n: tried[n])
            if lost - tried[best] <= self.limits.within / 20:  # the rest of the layers change next to nothing
                break
            found.append(best)
            rest.remove(best)
            alone = sum(self.gains[n] for n in found)
            self.together.append((tuple(sorted(found)), self.lost(variant, text) - self.lost(self._full(variant, found), text), alone))
            lost = tried[best]
        self.order = found + rest

    @staticmethod
    def _full(variant: MobaConfig, layers: Sequence[int]) -> MobaConfig:
        return replace(variant, full_attention_layers=tuple(sorted(layers)))

    def holds(self, config: MobaConfig, texts: Sequence[int], spread: bool = False) -> bool:
        """Whether the means over `texts` keep the limits, with `spread` one standard error further. It stops where they no longer can."""
        if self.difference(config, texts, stop=self.limits.within) > self.limits.within:
            return False
        readings = [self.read(config, i) for i in texts]
        lost = [x.loss - self.full[i].loss for i, x in zip(texts, readings)]
        last = [x.last_quarter - self.full[i].last_quarter for i, x in zip(texts, readings)]
        agreed = [x.agreement for x in readings]
        limits, error = self.limits, standard_error if spread else (lambda values: 0.0)
        return (
            fmean(lost) + error(lost) <= limits.within
            and (limits.last_quarter is None or fmean(last) + error(last) <= limits.last_quarter)
            and (limits.agreement is None or fmean(agreed) - error(agreed) >= limits.agreement)
        )

    def passes_check(self, config: MobaConfig, extra: Callable[[MobaConfig], bool]) -> bool:
        """The same on the texts that are set aside, with their spread. The text that lost most so far is read first: most fail on it."""
        self.checked.add(config)
        most = {
            i: max((readings[i].loss - self.full[i].loss for readings in self.seen.values() if i in readings), default=0.0)
            for i in self.held_out
        }
        return self.holds(config, sorted(self.held_out, key=lambda i: -most[i]), spread=True) and extra(config)

    def difference(self, config: MobaConfig, texts: Sequence[int], stop: float = math.inf) -> float:
        """Mean nats behind full attention; as soon as it must end above `stop` if no text is ahead, what it is so far, over all texts."""
        total = 0.0
        for i in texts:
            total += self.lost(config, i)
            if total / len(texts) > stop:
                break
        return total / len(texts)

    def lost(self, config: MobaConfig, text: int) -> float:
        return self.read(config, text).loss - self.full[text].loss

    def read(self, config: MobaConfig, text: int) -> Reading:
        readings = self.seen.setdefault(config, {})
        if text not in readings:
            readings[text] = self.meter.read(config, text, timed=text in self.held_out)
        return readings[text]

    def passes(self) -> int:
        """About how many forward passes it takes: for the estimate before it begins."""
        n_search, n_held_out, n_layers = len(self.search), len(self.held_out), len(self.space.layers)
        n_candidates = len(self.space.blocks(self.space.reference())) * len(self.space.full_counts())
        sizes = n_search * math.ceil(math.log2(max(2, n_candidates)) + 2)
        greedy = n_search * CANDIDATE_LAYERS * min(MOST_GREEDY, n_layers // 2)
        return n_search + n_held_out + 5 * n_search + n_layers + greedy + sizes + 2 * n_held_out


class Costs:
    """What settings cost: the share of keys, or seconds on this device."""

    def __init__(self, meter: Meter, space: Space, kind: str) -> None:
        self._meter, self._space, self._kind = meter, space, kind
        self.times: dict[tuple[int, int] | None, float] = {}  # by block size and top-k; None: full attention

    def prepare(self, blocks: Sequence[MobaConfig]) -> None:
        """Time settings without full layers in turn, and full attention beside them."""
        if self._kind == "time":
            found = self._meter.times([None, *blocks])
            self.times |= {_size(config): found[name_of(config)] for config in [None, *blocks]}

    def of(self, config: MobaConfig) -> float:
        """Seconds are those of its blocks without full layers, and for each of these what full attention takes more or less."""
        if self._kind == "keys":
            return self._space.share(config)
        if _size(config) not in self.times or None not in self.times:
            self.prepare([replace(config, full_attention_layers=())])
        blocks, full = self.times[_size(config)], self.times[None]
        return blocks + (full - blocks) * len(config.full_attention_layers) / len(self._space.layers)


def _size(config: MobaConfig | None) -> tuple[int, int] | None:
    return None if config is None else (config.block_size, config.top_k)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for one value, of which nothing is known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def rounded(cost: float) -> int:
    """Equal for costs that nearly are: so noise does not decide."""
    return round(math.log(max(cost, 1e-9)) / math.log1p(NEAR))
