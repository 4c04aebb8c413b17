"""Tables and a plot of the logs of `pretrain.py`: each run compared with full attention of the same model, context and seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev

from shared.command_line import UserError, one_line

from .runs import complete

COLUMNS = ("held-out", "minus full", "trailing", "minus full", "tokens/s", "device", "seeds")
LESS_FULL = "loss minus that of full attention, nats per token"
WORDS = {
    "full": "full attention",
    "moba": "MoBA",
    "moba-then-full": "MoBA, then full attention",
    "moba-last-3-full": "MoBA, last 3 layers full",
    "moba-conv-3": "MoBA, key convolution of 3",
    "moba-conv-5": "MoBA, key convolution of 5",
    "full-conv-3": "full attention, key convolution of 3",
    "full-conv-5": "full attention, key convolution of 5",
}
# Settings that may differ between compared runs.
_OF_A_RUN = ("run", "seed", "block_size", "top_k", "full_attention_layers", "key_conv")


def compare(files: list[Path], plot: Path | None = None) -> None:
    """Print a table for each setting, and plot them if `plot` is given.

    Raises UserError if a log cannot be read, no run is done, or two logs are of the same run.
    """
    logs = [_read(file) for file in files]
    done = [log for log in logs if log["done"]]
    if not done:
        raise UserError(f"none of the {len(files)} runs is done: the same command that began them goes on")
    settings = group(done)
    for title, runs in settings.items():
        print(title, *table(runs), "", sep="\n")
    if len(done) < len(logs):
        print(f"left out, since they are not done: {len(logs) - len(done)} of the {len(logs)} runs")
    if plot is not None:
        draw(settings, plot)


def group(logs: list[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """Title of a setting -> name of a run -> seed -> log. Full attention is the first run, a sweep comes last.

    Raises UserError if two different logs are of the same run and seed.
    """
    settings = defaultdict(lambda: defaultdict(dict))
    for log in sorted(logs, key=_place):
        rule = complete(log["settings"])
        title = ", ".join(f"{name} {x}" for name, x in rule.items() if name not in _OF_A_RUN)
        name = f"{rule['run']} ({rule['block_size']}, top-{rule['top_k']})" if "block_size" in rule else rule["run"]
        if settings[title][name].setdefault(rule["seed"], log) != log:
            raise UserError(f"two logs are of {name}, seed {rule['seed']}, with {title}: name one of them")
    return settings


def _place(log: dict) -> tuple:
    rule = log["settings"]
    sweep = is_sweep(rule["run"])
    return rule["run"] != "full", sweep, rule["top_k"] if sweep else 0, rule["run"], rule.get("block_size", 0)


def is_sweep(name: str) -> bool:
    """Whether it is a run of `--blocks`."""
    return "-blocks" in name


def table(runs: dict[str, dict[int, dict]]) -> list[str]:
    """The lines of a Markdown table. Means over seeds, ± their standard deviation; differences for seeds that full attention has too."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, by_seed in runs.items():
        cells = []
        for loss in (held_out, trailing):
            cells.append(_spread(list(map(loss, by_seed.values())), ".4f"))
            cells.append("" if name == "full" else _spread(differences(runs, name, loss), "+.4f") or "no full run")
        speeds = speeds_of(by_seed.values())
        cells += ["; ".join(_spread(of_device, ",.0f") or "-" for of_device in speeds.values()), "; ".join(speeds)]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, sorted(by_seed)))} |")
    return lines


def speeds_of(logs: Iterable[dict]) -> dict[str, list[float]]:
    """The runs' tokens per second, grouped by the device that they ended on."""
    speeds = defaultdict(list)
    for log in logs:
        speeds[log["environment"]["device"]] += [median(log["tokens_per_second"])] if log["tokens_per_second"] else []
    return speeds


def held_out(log: dict) -> float:
    return log["held_out"][-1][1]


def trailing(log: dict) -> float:
    return log["trailing"]


def differences(runs: dict[str, dict[int, dict]], name: str, loss) -> list[float]:
    """Differences to full attention, for the seeds that it was trained with too."""
    return [loss(log) - loss(runs["full"][seed]) for seed, log in runs[name].items() if seed in runs.get("full", {})]


def _spread(values: list[float], form: str) -> str:
    """The mean, and for several values their standard deviation; "" without values."""
    if not values:
        return ""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


def draw(settings: dict[str, dict[str, dict[int, dict]]], file: Path) -> None:
    """One row per setting: the training loss, and held-out loss minus that of full attention, by position and by number of blocks.

    The first two exclude the runs of a sweep. A panel without content is left out. Bands and bars are one standard deviation over seeds.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(layout="constrained")
    names = list(dict.fromkeys(name for runs in settings.values() for name in runs if not is_sweep(name) and name != "full"))
    colors = {"full": "black", **{name: f"C{i}" for i, name in enumerate(names)}}
    rows, most = figure.subfigures(len(settings), 1, squeeze=False)[:, 0], 0
    for (title, runs), row in zip(settings.items(), rows):
        named = {name: by_seed for name, by_seed in runs.items() if not is_sweep(name)}
        compared = {name: less for name in runs if name != "full" and (less := differences(runs, name, held_out))}
        sweep = {name: (runs[name], less) for name, less in compared.items() if is_sweep(name)}
        curves = len(named) > 1 or not sweep  # full attention alone adds nothing to a sweep
        panels = row.subplots(1, curves + (len(compared) > len(sweep)) + bool(sweep), squeeze=False)[0]
        others, most = panels[curves:], max(most, len(panels))
        if curves:
            draw_training(panels[0], named, colors)
            row.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        if len(compared) > len(sweep):
            draw_positions(others[0], named, colors)
        if sweep:
            draw_sweep(others[-1], sweep)
        row.suptitle(title_in_words(title, {seed for by_seed in runs.values() for seed in by_seed}))
    figure.set_size_inches(8 * most, 5 * len(settings))
    with one_line(f"cannot draw {file}"):
        figure.savefig(file, dpi=120)


def title_in_words(title: str, seeds: set[int]) -> str:
    """The title of a setting in words: what is trained, on what and how often."""
    rule = dict(part.split(" ", 1) for part in title.split(", "))
    words = [f"Llama of {rule['size']} parameters, {int(rule['context']):,} tokens"]
    words += [f"{int(rule['steps']):,} steps"] if "steps" in rule else []
    words += [f"{float(rule['needle_share']):.0%} of the text with facts"] if float(rule.get("needle_share", 0)) else []
    return ", ".join(words) + (f"; bands: one standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "; one seed")


def in_words(name: str) -> str:
    """moba-last-3-full (512, top-3) -> MoBA, last 3 layers full (block 512, top-3)"""
    run, _, blocks = name.partition(" (")
    words = WORDS.get(run, run)
    return f"{words} (block {blocks}" if blocks else words


def draw_training(axes, runs: dict[str, dict[int, dict]], colors: dict[str, str]) -> None:
    """Plot the first seed. Losses above those reached after a tenth of the steps are cut off: they would flatten the rest."""
    lowest, highest = float("inf"), 0.0
    for name, by_seed in runs.items():
        steps, losses = zip(*by_seed[min(by_seed)]["train"])
        axes.plot(steps, losses, label=in_words(name), color=colors[name], linewidth=1)
        lowest, highest = min(lowest, *losses), max(highest, losses[len(losses) // 10])
    margin = 0.05 * (highest - lowest)
    axes.set(title="training", xlabel="step", ylabel="loss, nats per token")
    if runs and margin:
        axes.set_ylim(lowest - margin, highest + margin)


def draw_positions(axes, runs: dict[str, dict[int, dict]], colors: dict[str, str]) -> None:
    full = runs.get("full", {})
    for name, by_seed in runs.items():
        both = [seed for seed in by_seed if seed in full and name != "full"]
        if both:
            curves = [[x - y for x, y in zip(by_seed[seed]["by_position"], full[seed]["by_position"])] for seed in both]
            mean = [fmean(values) for values in zip(*curves)]
            width = by_seed[both[0]]["settings"]["context"] / len(mean)
            places = [(i + 0.5) * width for i in range(len(mean))]
            axes.plot(places, mean, marker=".", color=colors[name])
            if len(both) > 1:
                apart = [stdev(values) for values in zip(*curves)]
                low, high = zip(*((x - y, x + y) for x, y in zip(mean, apart)))
                axes.fill_between(places, low, high, color=colors[name], alpha=0.12, linewidth=0)
    axes.axhline(0, color=colors["full"], linestyle="--", linewidth=1)
    axes.set(title="held-out text, by position", xlabel="position, tokens", ylabel=LESS_FULL)


def draw_sweep(axes, runs: dict[str, tuple[dict[int, dict], list[float]]]) -> None:
    """`runs` has the logs of each run and its differences to full attention."""
    rules = [next(iter(by_seed.values()))["settings"] for by_seed, _ in runs.values()]
    numbers = [rule["context"] // rule["block_size"] for rule in rules]
    less = [values for _, values in runs.values()]
    bars = [stdev(values) if len(values) > 1 else 0.0 for values in less]
    axes.errorbar(numbers, list(map(fmean, less)), yerr=bars if any(bars) else None, marker="o", color="C0", capsize=3)
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, list(map(str, numbers)))
    axes.set(title="held-out text, by number of blocks", xlabel="blocks in a context, of which a query reads a quarter", ylabel=LESS_FULL)


def _read(file: Path) -> dict:
    try:
        log = json.loads(file.read_text())
        log["settings"]["run"], log["done"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is no log of pretrain.py: {problem}") from None
    return log
