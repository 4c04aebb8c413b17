"""The figure of a calibration: quality against cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..figures import _figure as new_figure
from ..tables import runs
from .texts import split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Calibration, Candidate

_TEXTS, _FRONTIER, _CHOSEN, _LIMIT = ("#9ab3cc", "#e0a458", "#8fbc8f", "#b39ddb"), "#1f4e79", "#d1495b", "#666666"
_MOST_TEXTS = len(_TEXTS)


def calibration_figure(report: Calibration) -> Figure:
    """One panel: nats behind full attention against cost, a point per text and setting, and the chosen settings on the held-out texts."""
    figure = new_figure((9.5, 4.8))
    panel: Axes = figure.subplots()
    panel.set_yscale("symlog", linthresh=max(1e-4, report.limits["within"] / 2))
    frontier = [report.candidates[i] for i in report.frontier()]
    if report.deciding is not None:
        name = f"least on text {report.deciding}, which decided"
        panel.plot(*_places(report, frontier, report.deciding), color=_FRONTIER, linewidth=1.4, label=name)
    searched, _ = split(report.n_search + report.n_held_out)
    read = Counter(text for candidate in report.candidates for text in candidate.texts)
    for (text, _), color in zip(read.most_common(_MOST_TEXTS), _TEXTS):
        of = [candidate for candidate in report.candidates if text in candidate.texts]
        name = f"text {text}, searched with" if text in searched else f"text {text}, set aside"
        panel.scatter(*_places(report, of, text), color=color, s=24, label=name, zorder=3)
    panel.axhline(
        report.limits["within"], color=_LIMIT, linestyle="--", linewidth=1, label=f"asked for: within {report.limits['within']:g}"
    )
    panel.axhline(0, color=_LIMIT, linewidth=0.8)
    if report.chosen is not None:
        _draw_chosen(panel, report, report.candidates[report.chosen])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("time of full attention = 100 %" if report.cost == "time" else "keys read, full attention = 100 %", fontsize=11)
    panel.xaxis.set_major_formatter("{x:.0f} %")
    panel.set_ylabel("nats per token behind full attention", fontsize=11)
    panel.set_title(f"{report.model}, {report.length:,} tokens, {report.device}", fontsize=12)
    panel.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    return figure


def _places(report: Calibration, candidates: list[Candidate], text: int) -> tuple[list[float], list[float]]:
    return [_cost(report, c) for c in candidates], [c.texts[text] for c in candidates]


def _cost(report: Calibration, candidate: Candidate) -> float:
    if report.cost == "time" and candidate.seconds is not None:
        return 100 * candidate.seconds / report.full_seconds
    return 100 * candidate.share_of_keys


def _draw_chosen(panel: Axes, report: Calibration, chosen: Candidate) -> None:
    """Draw the chosen settings with their spread on the held-out texts, and a label."""
    assert chosen.held_out is not None, "what is chosen was checked"
    x, y = _cost(report, chosen), chosen.held_out.difference
    panel.errorbar([x], [y], yerr=[chosen.held_out.spread], color=_CHOSEN, marker="*", markersize=13, capsize=3, linestyle="none",
                   label="chosen, mean of the texts set aside")  # fmt: skip
    layers = runs(chosen.config.full_attention_layers)
    words = f"block {chosen.config.block_size}, top-{chosen.config.top_k}\n" + (f"full layers {layers}" if layers else "no full layer")
    left, right = panel.get_xlim()
    on_left = x > (left + right) / 2
    panel.annotate(words, (x, y), (-10 if on_left else 10, -24), textcoords="offset points", fontsize=10, color=_CHOSEN,
                   horizontalalignment="right" if on_left else "left")  # fmt: skip
