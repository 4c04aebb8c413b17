"""The result of a calibration: `Calibration`, with a table, a figure and a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...config import MobaConfig
from ...core.messages import shown
from ...core.validation import check_count
from ..tables import runs, table
from .saved import file_named, said_of, write
from .texts import split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "moba_flex calibration 1"


@dataclass(frozen=True)
class Part:
    """Means over the search texts, or over the held-out texts.

    Attributes:
        n_texts: how many texts were read; the search stops early for settings that cannot win.
        difference: nats per token behind full attention on the same texts, negative if ahead.
        spread: the standard error of that mean over texts; 0 for one text, for which it is unknown.
        last_quarter: nats behind full attention in the last quarter of the texts.
        agreement: share of positions with the same most likely next token as full attention, 0 to 1.
    """

    n_texts: int
    difference: float
    spread: float
    last_quarter: float
    agreement: float


@dataclass(frozen=True)
class Candidate:
    """Settings that were measured; an element of `Calibration.candidates`.

    Attributes:
        config: the settings, for `moba_flex.patch`.
        share_of_keys: the keys of a text that all layers read, divided by those of full attention, 0 to 1.
        seconds: the median time of a forward pass over one text; None if it was not timed.
        search: a `Part`, means over the search texts; None if none was read.
        held_out: a `Part`, means over the held-out texts; None if none was read.
        texts: nats per token behind full attention for each text that was read, by its index.
    """

    config: MobaConfig
    share_of_keys: float
    seconds: float | None
    search: Part | None
    held_out: Part | None = None
    texts: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Calibration:
    """Settings for a model, found without training; returned by `calibrate`. Printed as a table.

    Attributes:
        model: the name of the model's class.
        device: "cpu" or the GPU's name.
        length: tokens of each text.
        limits: the limits by name: "within", and "last_quarter", "agreement" and "retrieval" if given.
        cost: what was minimised, "time" or "keys".
        n_search, n_held_out: the numbers of search texts and held-out texts.
        full_loss: mean negative log-likelihood of full attention on the held-out texts, nats per token.
        full_seconds: the median time of a forward pass over one text with full attention.
        chosen: the index of the chosen settings in `candidates`; None if none keeps the limits.
        candidates: all `Candidate`s, the cheapest first.
        deciding: the index of the text on which settings were last tried, one with a large loss; None in files of older versions.
        layers: nats recovered by full attention in each layer, summed over the texts on which layers were ranked. Layers measured as a
            group share the group's value. Empty if layers were not ranked.
        ranked: the indices of these texts; held-out texts among them count less as evidence.
        together: the best layers of each ranking as (layers, nats that they recover together, sum of the nats that each recovers alone).
        facts: how many facts "full" and "moba" found, and "of" how many; None without a tokenizer, or if nothing was chosen.
        n_checked: how many settings were tried on the held-out texts.
        measured: how many measurements were made, each of one text.
        seconds: their wall-clock time, including that of earlier calls with the same file.
        warnings: sentences about the limits of the result.
    """

    model: str
    device: str
    length: int
    limits: Mapping[str, float]
    cost: str
    n_search: int
    n_held_out: int
    full_loss: float
    full_seconds: float
    chosen: int | None
    candidates: tuple[Candidate, ...]
    deciding: int | None = None
    layers: Mapping[int, float] = field(default_factory=dict)
    ranked: tuple[int, ...] = ()
    together: tuple[tuple[tuple[int, ...], float, float], ...] = ()
    facts: Mapping[str, int] | None = None
    n_checked: int = 0
    measured: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def config(self) -> MobaConfig | None:
        """The chosen settings: `patch(model, report.config)`. None if none keeps the limits."""
        return None if self.chosen is None else self.candidates[self.chosen].config

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values. `from_dict` is the inverse."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "candidates"}
        plain["candidates"] = [
            {f.name: getattr(c, f.name) for f in fields(c)}
            | {"config": c.config.to_dict()}
            | {name: None if part is None else asdict(part) for name, part in (("search", c.search), ("held_out", c.held_out))}
            for c in self.candidates
        ]
        return dict(json.loads(json.dumps({"format": FORMAT, **plain})))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`. Raises ValueError if `plain` is not a calibration."""
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            raise ValueError(f'this is no calibration, whose "format" is {FORMAT!r}, but {shown(plain)}')
        try:
            report = cls._made_of(plain)
            report.table()  # uses every field
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise ValueError(f"this is no calibration: it lacks values, or they do not fit together ({type(error).__name__})") from error
        return report

    @classmethod
    def _made_of(cls, plain: Mapping[str, Any]) -> Calibration:
        values = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        values["candidates"] = tuple(_candidate(c) for c in plain["candidates"])
        values["layers"] = {int(n): x for n, x in plain["layers"].items()}
        values["together"] = tuple((tuple(layers), gain, alone) for layers, gain, alone in plain["together"])
        values |= {name: tuple(plain.get(name, ())) for name in ("ranked", "warnings")}
        if plain["chosen"] is not None:
            check_count("chosen", plain["chosen"], 0)
        return cls(**values)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a JSON file, atomically. Raises OSError, and TypeError or ValueError if `file` is no name of a file."""
        write(file_named("file", file), self.to_dict())

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Calibration:
        """Read a file written by `save`.

        Raises OSError, ValueError if the file contains something else, and TypeError if `file` is no name of a file.
        """
        path = file_named("file", file)
        try:
            with said_of(path):
                plain = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{file} is no JSON file") from None
        try:
            return cls.from_dict(plain)
        except ValueError:
            raise ValueError(f"{file} holds no calibration: name a file that Calibration.save has written") from None

    def figure(self) -> Figure:
        """A matplotlib figure: nats behind full attention against cost, with the frontier and the chosen settings.

        Raises ImportError if matplotlib is not installed; it comes with the extra `viz`.
        """
        from .figure import calibration_figure

        return calibration_figure(self)

    def table(self) -> str:
        """The settings on the frontier and the chosen ones, one line each, and sentences about them.

        Losses are nats per token behind full attention: on the deciding text, on the search texts, and on the held-out texts.
        """
        columns = ["", "block", "top-k", "sink", "recent", "shared", "full layers", "keys read", "time"]
        columns += ["" if self.deciding is None else f"text {self.deciding}", "search", "set aside"]
        rows = [["", "full attention", *[""] * 4, "all", "100.0%", _seconds(self.full_seconds), "", "", f"loss {self.full_loss:.4f}"]]
        shown_ones = sorted({*self.frontier(), *([] if self.chosen is None else [self.chosen])})
        rows += [self._row(i) for i in shown_ones]
        asked = ", ".join(f"{name} {x:g}" for name, x in self.limits.items())
        head = (
            f"{self.model}, {self.length:,} tokens, on {self.device}: {self.n_search} texts to search with, {self.n_held_out} set aside; "
            f"asked for: {asked}; least {'time' if self.cost == 'time' else 'keys read'}"
        )
        return "\n".join([head, *table(columns, rows), *self._sentences()])

    __repr__ = table

    def frontier(self) -> list[int]:
        """Indices of the candidates that no cheaper one beats on the deciding text, cheapest first."""
        found: list[int] = []
        least = math.inf
        for i, candidate in enumerate(self.candidates):
            lost = math.inf if self.deciding is None else candidate.texts.get(self.deciding, math.inf)
            if lost < least:
                found.append(i)
                least = lost
        return found

    def _row(self, i: int) -> list[str]:
        c = self.candidates[i]
        lost = c.texts.get(-1 if self.deciding is None else self.deciding)
        numbers = [c.config.block_size, c.config.top_k, c.config.sink_blocks, c.config.recent_blocks]
        return [
            *("*" if i == self.chosen else "", *map(str, numbers), "yes" if c.config.share_selection else "no"),
            *(runs(c.config.full_attention_layers) or "none", f"{c.share_of_keys:.1%}", _seconds(c.seconds)),
            *("" if lost is None else f"{lost:+.4f}", _mean(c.search, self.n_search), _mean(c.held_out, self.n_held_out)),
        ]

    def _ranked_again(self) -> list[str]:
        """The held-out texts on which layers were ranked, and the loss on the other held-out texts."""
        searched, held_out = split(self.n_search + self.n_held_out)
        again = sorted(set(self.ranked) - set(searched))
        if not again:
            return []
        lost = [x for i, x in self.candidates[self.chosen or 0].texts.items() if i in held_out and i not in again]
        others = f"; on the other {len(lost)} set aside {fmean(lost):+.4f}" if lost else ""
        return [f"layers were ranked again on text {runs(again)}, which was set aside and on which settings failed{others}"]

    def _sentences(self) -> list[str]:
        said = []
        if self.config is None:
            said.append(f"No settings keep the limits: {len(self.candidates)} were measured. Allow more, or train the model with MoBA.")
        else:
            part = self.candidates[self.chosen or 0].held_out
            assert part is not None, "what is chosen was checked"
            said.append(
                f"* {self.config}: {part.difference:+.4f} ± {part.spread:.4f} nats behind full attention on {part.n_texts} texts set "
                f"aside, {part.last_quarter:+.4f} in their last quarter; {part.agreement:.1%} of next tokens agree"
            )
            said += self._ranked_again()
        if self.facts is not None:
            said.append(f"facts found of {self.facts['of']}: full attention {self.facts['full']}, with MoBA {self.facts['moba']}")
        for layers, gain, alone in self.together:
            said.append(
                f"full attention in layer {runs(layers)} gives back {gain:.4f} nats on one text; the sum of each alone is {alone:.4f}"
            )
        said.append(f"{self.measured} measurements, {duration(self.seconds)}, {self.n_checked} settings checked on the texts set aside")
        return [*said, *(f"warning: {sentence}" for sentence in self.warnings)]


def _candidate(plain: Mapping[str, Any]) -> Candidate:
    parts = [None if plain[name] is None else Part(**plain[name]) for name in ("search", "held_out")]
    lost = {int(i): x for i, x in plain.get("texts", {}).items()}
    return Candidate(MobaConfig.from_dict(plain["config"]), plain["share_of_keys"], plain["seconds"], parts[0], parts[1], lost)


def _mean(part: Part | None, n_texts: int) -> str:
    """The mean over all texts with its spread; "" if some were not read."""
    if part is None or part.n_texts < n_texts:
        return ""
    return f"{part.difference:+.4f}" + (f" ± {part.spread:.4f}" if n_texts > 1 else "")


def duration(seconds: float) -> str:
    """Seconds in words: "12 seconds", "3.4 minutes"."""
    if seconds < 60:
        return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
