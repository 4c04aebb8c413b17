"""The search for the cheapest settings within limits: variant, sizes, the check on held-out texts, then the same with full layers.

It relies on what is known of MoBA to measure little: more blocks, smaller blocks with the same number of keys, and more layers with full
attention lose less. Settings that fail therefore rule out all that read less. Most settings that fail do so on one text. Settings are tried
on that text alone, and only the cheapest that pass there are read with the others. If they fail on a held-out text, it becomes the next
text to try settings on, and layers are ranked again on it.

S search texts, H held-out texts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ...config import MobaConfig
from .measure import Meter, Reading
from .space import Space, is_dominated_by, variants, with_full_layers

NEAR = 0.02  # relative cost difference below which costs count as equal
MOST_RANKED = 3  # largest number of texts on which layers are ranked
MOST_HALVED = 8  # largest number of layer groups that are halved, per ranked text
MOST_LOST = 1000.0  # nats per token as which larger losses count where settings and layers are compared
MOST_TOGETHER = 4  # number of layers whose joint gain is compared with the sum of their single gains


@dataclass(frozen=True)
class Limits:
    """The limits of a calibration; None: no limit."""

    within: float  # nats behind full attention
    last_quarter: float | None = None  # nats behind it
    agreement: float | None = None  # smallest share of the positions
    retrieval: float | None = None  # smallest share of the facts that full attention finds

    def used(self, readings: Sequence[tuple[Reading, Reading]], n: int, spread: bool = False) -> float:
        """The share of the limits that the means over `n` texts use up: the largest over all limits; with `spread` plus one standard error.

        `readings` are pairs with MoBA and with full attention. Texts without a reading count as if MoBA lost nothing there, which gives a
        lower bound.
        """
        rest = [0.0] * (n - len(readings))
        values = [
            ([x.loss - full.loss for x, full in readings], self.within),
            ([x.last_quarter - full.last_quarter for x, full in readings], self.last_quarter),
            ([1 - x.agreement for x, _ in readings], None if self.agreement is None else 1 - self.agreement),
        ]
        return max(_share([*of, *rest], limit, spread) for of, limit in values if limit is not None)


def _share(values: Sequence[float], limit: float, spread: bool) -> float:
    bound = fmean(values) + (standard_error(values) if spread else 0.0)
    return bound / limit if limit else math.inf if bound > 0 else 0.0


class Search:
    """The steps of a calibration, run in order by `run`."""

    def __init__(self, meter: Meter, space: Space, limits: Limits, search: Sequence[int], held_out: Sequence[int]) -> None:
        self.meter, self.space, self.limits = meter, space, limits
        self.search, self.held_out = list(search), list(held_out)
        self.ranked: list[int] = []  # texts on which layers were ranked
        self.gains: dict[int, float] = {}  # nats recovered by each layer, summed over these texts
        self.together: list[tuple[tuple[int, ...], float, float]] = []  # layers, nats that they recover, sum of each alone
        self.deciding: dict[int, float] = {}  # texts on which settings are tried first, with the share of the limits allowed there
        self.failed: list[MobaConfig] = []  # settings that failed the check
        self.seen: dict[MobaConfig, dict[int, Reading]] = {}
        self.full: dict[int, Reading] = {}
        self.checked: set[MobaConfig] = set()  # settings checked on the held-out texts

    def measure_full(self) -> None:
        """Measure full attention on all texts, the baseline of every comparison."""
        for text in [*self.search, *self.held_out]:
            if text not in self.full:
                self.full[text] = self.meter.read(None, text, timed=True)

    def run(self, costs: Costs, extra: Callable[[MobaConfig], bool]) -> MobaConfig | None:
        """The cheapest setting that keeps all limits on the held-out texts, or None. `extra`: one more condition, checked last."""
        variant = self.choose_variant()
        blocks = self.space.blocks(variant)
        if not blocks:
            return None
        costs.prepare(blocks)
        for text in self.search:
            self.read(variant, text)
        self.decide_by(variant, self.search)
        cheapest, *_ = left = self.by_cost(blocks, costs.of)
        best: MobaConfig | None = None  # layers are ranked later, when the deciding text is known best
        while True:
            found = self.cheapest(left) or (self.cheapest(left, strict=False) if best is None else None)
            if found is not None and self.check(found, extra):
                best = found
            if best == cheapest or (found is None and self.ranked):
                return best
            self.rank_layers(with_full_layers(self.failed[-1] if self.failed else variant))
            order = sorted(self.gains, key=lambda n: -self.gains[n])
            every = [with_full_layers(config, order[:n]) for config in blocks for n in self.space.full_counts()]
            left = [config for config in self.by_cost(every, costs.of) if self.may_win(config, best, costs.of)]

    def by_cost(self, configs: Iterable[MobaConfig], cost: Callable[[MobaConfig], float]) -> list[MobaConfig]:
        return sorted(configs, key=lambda config: (rounded(cost(config)), self.space.share(config), config.block_size))

    def may_win(self, config: MobaConfig, best: MobaConfig | None, cost: Callable[[MobaConfig], float]) -> bool:
        """Whether it costs less than the best so far, and is not below settings that failed."""
        cheaper = best is None or rounded(cost(config)) < rounded(cost(best))
        return cheaper and not any(is_dominated_by(config, other) for other in self.failed)

    def choose_variant(self) -> MobaConfig:
        """The reference or the variant of it (sinks, recent blocks, shared selection) that loses least on the first search text."""
        reference = self.space.reference()
        return min([reference, *variants(reference)], key=lambda config: self.lost(config, self.search[0]))

    def cheapest(self, ordered: Iterable[MobaConfig], strict: bool = True) -> MobaConfig | None:
        """The first of `ordered` that passes on the deciding texts, found by bisection. What a failure or a success rules out is not
        measured.

        `strict`: the share of the limits allowed on a text is estimated from how the losses of all texts related so far. Otherwise it is
        the largest share that can pass.
        """
        most = {text: share if strict else self.most(text) for text, share in reversed(self.deciding.items())}

        def fails(config: MobaConfig, texts: Iterable[int]) -> bool:
            return any(self.used(config, [text]) > most[text] for text in texts)

        known = [config for config, readings in self.seen.items() if fails(config, most.keys() & readings.keys())]
        left, best = [config for config in ordered if not any(is_dominated_by(config, other) for other in known)], None
        while left:
            probe = left[(len(left) - 1) // 2]
            if fails(probe, most):
                left = [config for config in left if not is_dominated_by(config, probe)]
            else:
                best, left = probe, left[: left.index(probe)]
        return best

    def check(self, config: MobaConfig, extra: Callable[[MobaConfig], bool]) -> bool:
        """Whether settings pass on the search texts, and on the held-out texts with their spread. If not, the worst text becomes the
        deciding one.
        """
        for texts, spread in ((self.search, False), (self.held_out, True)):
            if spread:
                self.checked.add(config)
            if self.used(config, texts, spread) > 1:
                self.decide_by(config, texts, spread)
                self.failed.append(config)
                return False
        if not extra(config):
            self.failed.append(config)
            return False
        return True

    def decide_by(self, config: MobaConfig, texts: Sequence[int], spread: bool = False) -> None:
        """Make the text on which `config` did worst the first to try settings on, with the share of the limits allowed there."""
        used = {text: self.used(config, [text]) for text in texts if text in self.seen[config]}
        text, most = max(used, key=lambda i: used[i]), math.inf
        whole = self.limits.used([(self.seen[config][i], self.full[i]) for i in used], len(texts), spread)
        if 0 < whole < math.inf:
            most = used[text] / whole
        self.deciding[text] = min(most, self.most(text), self.deciding.pop(text, math.inf))

    def most(self, text: int) -> float:
        """The largest share of the limits that settings can use on one text and still pass, if they lose nothing on the others."""
        if text in self.search:
            return len(self.search)
        return max(1.0, len(self.held_out) / 2)  # a single loss adds as much to the standard error as to the mean

    def rank_layers(self, blocks: MobaConfig) -> None:
        """Measure what layers recover with full attention on the deciding text, unless that is done.

        Groups of neighbouring layers come first, then halves of the group that recovers most. The last layers come first, because passes
        share the layers before their group.
        """
        text = next(reversed(self.deciding))
        if text in self.ranked or len(self.ranked) == MOST_RANKED:
            return
        self.ranked.append(text)
        lost, layers = self.lost(blocks, text), self.space.layers

        def gain(group: Sequence[int]) -> float:
            return lost - self.lost(with_full_layers(blocks, group), text)

        size = group_size(len(layers))
        gains = {group: gain(group) for group in reversed([layers[i : i + size] for i in range(0, len(layers), size)])}
        for _ in range(MOST_HALVED):
            group = max((group for group in gains if len(group) > 1), key=lambda group: gains[group], default=())
            if not group or gains[group] <= self.limits.within / 20:  # the other groups change almost nothing
                break
            whole, half = gains.pop(group), len(group) // 2
            gains[group[half:]] = gain(group[half:])
            gains[group[:half]] = whole - gains[group[half:]]
        alone = {n: gains[group] / len(group) for group in gains for n in group}
        best = sorted(alone, key=lambda n: -alone[n])[: min(MOST_TOGETHER, len(layers) // 2)]
        if best:
            self.together.append((tuple(sorted(best)), gain(best), sum(alone[n] for n in best)))
        self.gains = {n: self.gains.get(n, 0.0) + alone[n] for n in layers}

    def used(self, config: MobaConfig, texts: Sequence[int], spread: bool = False) -> float:
        """`Limits.used` over `texts`. Stops as soon as it must exceed 1: texts with the largest losses so far are read first."""
        used, readings = 0.0, []
        for text in sorted(texts, key=lambda i: -self.most_lost(i)) if len(texts) > 1 else texts:
            readings.append((self.read(config, text), self.full[text]))
            used = self.limits.used(readings, len(texts), spread)
            if used > 1:
                break
        return used

    def most_lost(self, text: int) -> float:
        return max((readings[text].loss - self.full[text].loss for readings in self.seen.values() if text in readings), default=0.0)

    def lost(self, config: MobaConfig, text: int) -> float:
        """At most `MOST_LOST`, so that losses can be subtracted."""
        return min(self.read(config, text).loss - self.full[text].loss, MOST_LOST)

    def read(self, config: MobaConfig, text: int) -> Reading:
        readings = self.seen.setdefault(config, {})
        if text not in readings:
            readings[text] = self.meter.read(config, text, timed=text not in self.ranked)
        return readings[text]

    def passes(self) -> int:
        """The approximate number of forward passes if the check fails once, for the printed estimate."""
        n_search, n_held_out, n_layers = len(self.search), len(self.held_out), len(self.space.layers)
        n_candidates = len(self.space.blocks(self.space.reference())) * len(self.space.full_counts())
        ranking = math.ceil(n_layers / group_size(n_layers)) + MOST_HALVED
        sizes = math.ceil(math.log2(max(2, n_candidates))) + 2
        return n_search + n_held_out + n_search + 4 + ranking + 2 * (sizes + n_search + n_held_out)


def group_size(n_layers: int) -> int:
    """The number of layers measured together at first: about the square root of all."""
    return math.isqrt(n_layers - 1) + 1


class Costs:
    """The cost of settings: the share of keys, or seconds on this device."""

    def __init__(self, meter: Meter, space: Space, kind: str) -> None:
        self._meter, self._space, self._kind = meter, space, kind
        self.times: dict[MobaConfig | None, float] = {}  # settings without full layers; None: full attention

    def prepare(self, blocks: Sequence[MobaConfig]) -> None:
        """Time settings without full layers in turn, together with full attention."""
        if self._kind == "time":
            self.times |= self._meter.times([None, *blocks])

    def of(self, config: MobaConfig) -> float:
        """The cost of settings. For seconds: the time without full layers, corrected for each full layer by the difference to full
        attention.
        """
        if self._kind == "keys":
            return self._space.share(config)
        without = with_full_layers(config)
        if without not in self.times:
            self.prepare([without])
        blocks, full = self.times[without], self.times[None]
        return blocks + (full - blocks) * len(config.full_attention_layers) / len(self._space.layers)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 for one value, for which it is unknown; infinity if a value is."""
    if math.inf in values:
        return math.inf
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def rounded(cost: float) -> int:
    """The cost on a logarithmic scale, rounded so that noise does not decide between nearly equal costs."""
    return round(math.log(max(cost, 1e-9)) / math.log1p(NEAR))
