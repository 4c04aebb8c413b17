"""Tables and a plot of what `pretrain.py` logged: each run beside full attention of the same model, context and seed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev

from .runs import complete

COLUMNS = ("held-out", "minus full", "trailing", "minus full", "tokens/s", "seeds")
# Runs are compared if all else is equal.
_OF_A_RUN = ("run", "seed", "block_size", "top_k", "full_attention_layers", "key_conv")


def compare(files: list[Path], plot: Path | None = None) -> None:
    """Print a table for each setting, and plot them if a file is named.

    Raises SystemExit, in one line, if a log cannot be read or no run is done.
    """
    done = [log for log in map(_read, files) if log["done"]]
    if not done:
        raise SystemExit(f"none of the {len(files)} runs is done: the same command that began them goes on")
    settings = group(done)
    for title, runs in settings.items():
        print(title, *table(runs), "", sep="\n")
    if plot is not None:
        draw(settings, plot)


def group(logs: list[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """Title of a setting -> name of a run -> seed -> log."""
    settings = defaultdict(lambda: defaultdict(dict))
    for log in logs:
        rule = complete(log["settings"])
        title = ", ".join(f"{name} {x}" for name, x in rule.items() if name not in _OF_A_RUN)
        name = rule["run"] if rule["run"] == "full" else f"{rule['run']} ({rule['block_size']}, top-{rule['top_k']})"
        settings[title][name][rule["seed"]] = log
    return settings


def table(runs: dict[str, dict[int, dict]]) -> list[str]:
    """The lines of a Markdown table. Differences are means over the seeds that full attention has too, ± their standard deviation."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, by_seed in sorted(runs.items(), key=lambda item: (item[0] != "full", item[0])):
        cells = []
        for loss in (held_out, trailing):
            cells += [f"{fmean(map(loss, by_seed.values())):.4f}", "" if name == "full" else _spread(differences(runs, name, loss))]
        speeds = [median(log["tokens_per_second"]) for log in by_seed.values() if log["tokens_per_second"]]
        cells += [f"{fmean(speeds):,.0f}" if speeds else "", ", ".join(map(str, sorted(by_seed)))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def held_out(log: dict) -> float:
    return log["held_out"][-1][1]


def trailing(log: dict) -> float:
    return log["trailing"]


def differences(runs: dict[str, dict[int, dict]], name: str, loss) -> list[float]:
    """Of each seed that full attention was trained with too."""
    return [loss(log) - loss(runs["full"][seed]) for seed, log in runs[name].items() if seed in runs.get("full", {})]


def _spread(values: list[float]) -> str:
    if not values:
        return "no full run"
    return f"{fmean(values):+.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def draw(settings: dict[str, dict[str, dict[int, dict]]], file: Path) -> None:
    """For each setting: the loss in training, held-out loss by position less that of full attention, and that by number of blocks."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(16, 4.5 * len(settings)), layout="constrained")
    rows = figure.subplots(len(settings), 3, squeeze=False)
    for (title, runs), (training, positions, blocks) in zip(settings.items(), rows):
        context = next(iter(next(iter(runs.values())).values()))["settings"]["context"]
        full = runs.get("full", {})
        training.set(title=", ".join(title.split(", ")[:2]), xlabel="step", ylabel="loss in training, nats a token")
        positions.set(xlabel="position, tokens", ylabel="held-out loss minus that of full attention")
        blocks.set(xlabel="blocks in a context", ylabel=positions.get_ylabel())
        blocks.set_xscale("log", base=2)
        for name, by_seed in sorted(runs.items()):
            log = next(iter(by_seed.values()))
            training.plot(*zip(*log["train"]), label=name, linewidth=1)
            both = [seed for seed in by_seed if seed in full and name != "full"]
            if both:
                curves = [[x - y for x, y in zip(by_seed[seed]["by_position"], full[seed]["by_position"])] for seed in both]
                mean = [fmean(values) for values in zip(*curves)]
                positions.plot([(i + 0.5) * context / len(mean) for i in range(len(mean))], mean, marker=".", label=name)
        sweep = {
            context // next(iter(by_seed.values()))["settings"]["block_size"]: fmean(less)
            for name, by_seed in runs.items()
            if "-blocks" in name and (less := differences(runs, name, held_out))
        }
        if sweep:
            blocks.plot(*zip(*sorted(sweep.items())), marker="o", label="MoBA, a quarter of the blocks read")
            blocks.axhline(0, color="black", linestyle="--", label="full")
        for axes in (training, positions, blocks):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _read(file: Path) -> dict:
    try:
        log = json.loads(file.read_text())
        log["settings"]["run"], log["done"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise SystemExit(f"{file} is no log of pretrain.py: {problem}") from None
    return log
