"""The results of `benchmark.py`: a JSON file that a later run continues, tables, and a plot.

The file is a list of runs. A run is one setting on one machine with one set of versions:

    {"title": ..., "settings": {...}, "environment": {...}, "date": ..., "results": [{"system", "pass", "tokens", ...}, ...]}

A result has `milliseconds` (the median; `least`, `most`, `repeats`) and `peak_gb`, or `skipped` ("out of memory", or "too long" with an
`estimate` in milliseconds), or `failed` with the error.
"""

from __future__ import annotations

import json
import os
import textwrap
from datetime import datetime, timezone
from pathlib import Path

from shared.command_line import UserError

OURS = "moba_flex"
TRITON = "moba_flex-triton"
PACKED = "moba_flex-packed"
LEFT_OUT = "no-attention"
TRAINING = "training"  # a workload whose results are shown in tokens per second
FULL, TOO_LONG, TIME_UP = "out of memory", "too long", "time is up"
AGAIN = TOO_LONG, TIME_UP  # may be measured under another limit
IN_WORDS = {  # names of systems in figures
    TRITON: 'moba_flex, implementation="triton"',
    PACKED: "moba_flex, eight packed sequences",
    "moba_flex-flash": "moba_flex, FlashAttention-4",
    "dense-cudnn": "dense, cuDNN",
    "dense-fa2": "dense, FlashAttention-2",
    "dense-flex": "dense, FlexAttention",
    "dense-sdpa": "dense, PyTorch's choice",
    "flash-moba": "FlashMoBA",
    "moonshot-moba": "MoonshotAI/MoBA",
    "sdpa": "full attention (sdpa)",
    LEFT_OUT: "attention left out",
}


def check_writable(**files: Path | None) -> None:
    """Raise UserError before anything is measured. Files are given by the names of their flags."""
    for flag, file in files.items():
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(file if file.exists() else file.parent, os.W_OK) and not file.is_dir()
        except OSError:
            writable = False
        if not writable:
            raise UserError(f"argument {flag}: cannot write to {file}")


class Results:
    """The runs in a file, which is rewritten after each measurement."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.runs: list[dict] = load(file) if file.exists() else []

    def run(self, title: str, settings: dict, environment: dict) -> dict:
        """The run with these settings and versions: the one in the file, without results that depend on a limit, or a new one."""
        for run in self.runs:
            if (run["settings"], run["environment"]) == (settings, environment):
                run["results"] = [r for r in run["results"] if r.get("skipped") not in AGAIN]
                return run
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        run = {"title": title, "settings": settings, "environment": environment, "date": date, "results": []}
        self.runs.append(run)
        return run

    def save(self) -> None:
        """Write the file atomically: a killed run leaves it unchanged."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        part.write_text(json.dumps(self.runs, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)


def load(file: Path) -> list[dict]:
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))
        for run in runs:
            for key in ("title", "settings", "environment", "date"):
                run[key]
            for result in run["results"]:
                result["system"], result["pass"], result["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} as results of this benchmark: {type(error).__name__}: {error}") from error
    return runs


def of(run: dict, name: str) -> list:
    """All values of a field in a run's results, in order of appearance; token counts in ascending order."""
    values = list(dict.fromkeys(result[name] for result in run["results"]))
    return sorted(values) if name == "tokens" else values


def find(run: dict, system: str, pass_: str, tokens: int) -> dict | None:
    wanted = system, pass_, tokens
    return next((r for r in run["results"] if (r["system"], r["pass"], r["tokens"]) == wanted), None)


def describe(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["environment"].items() if name != "device")
    return f"{run['title']}\n{run['environment']['device']}, {versions}, {run['date'][:10]}"


def tables(run: dict) -> str:
    """Milliseconds (for training: tokens per second) and peak gigabytes for each pass, as Markdown; then the errors of failed systems."""
    parts = [describe(run)]
    for pass_ in of(run, "pass"):
        systems = [s for s in of(run, "system") if any(find(run, s, pass_, n) for n in of(run, "tokens"))]
        rivals = [s for s in systems if not s.startswith(OURS)]
        ratio = ["fastest other / ours" if len(rivals) > 1 else f"{rivals[0]} / ours"] if rivals and OURS in systems else []
        times, memory = [["tokens", *systems, *ratio]], [["tokens", *systems]]
        for n in of(run, "tokens"):
            results = [find(run, s, pass_, n) or {} for s in systems]
            times.append([f"{n:,}", *map(time_cell, results), *([ratio_cell(dict(zip(systems, results)))] if ratio else [])])
            memory.append([f"{n:,}", *(f"{r['peak_gb']:.2f}" if "peak_gb" in r else "" for r in results)])
        if run["settings"].get("workload") == TRAINING:
            parts.append(f"{pass_}, tokens a second\n{markdown(speeds(run, systems, pass_))}")
        else:
            parts.append(f"{pass_}, milliseconds\n{markdown(times)}")
        parts += [f"{pass_}, peak memory in GB, inputs included\n{markdown(memory)}"]
    failed = [r for r in run["results"] if "failed" in r]
    parts += [f"failed: {r['system']}, {r['pass']}, {r['tokens']:,} tokens: {r['failed']}" for r in failed]
    return "\n\n".join(parts)


def speeds(run: dict, systems: list[str], pass_: str) -> list[list[str]]:
    """Tokens per second, and each system's ratio to full attention."""
    others = [s for s in systems if s != "sdpa"] if "sdpa" in systems else []
    rows = [["tokens", *systems, *(f"{s} / sdpa" for s in others)]]
    for n in of(run, "tokens"):
        results = {s: find(run, s, pass_, n) or {} for s in systems}
        found = {s: speed(r) for s, r in results.items() if "milliseconds" in r}
        cells = [f"{found[s]:,.0f}" if s in found else time_cell(r) for s, r in results.items()]
        rows.append([f"{n:,}", *cells, *(f"{found[s] / found['sdpa']:.2f}" if {s, "sdpa"} <= found.keys() else "" for s in others)])
    return rows


def speed(result: dict) -> float:
    """Tokens per second."""
    return result["tokens"] / result["milliseconds"] * 1000


def time_cell(result: dict) -> str:
    if "milliseconds" in result:
        return number(result["milliseconds"])
    if "estimate" in result:
        return f"skipped (about {number(result['estimate'])})"
    return "failed" if "failed" in result else result.get("skipped", "")


def number(milliseconds: float) -> str:
    """Three significant digits."""
    return f"{milliseconds:,.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def ratio_cell(results: dict[str, dict]) -> str:
    times = {system: result["milliseconds"] for system, result in results.items() if "milliseconds" in result}
    others = [time for system, time in times.items() if not system.startswith(OURS)]
    return f"{min(others) / times[OURS]:.2f}x" if OURS in times and others else ""


def markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def skewed_over_uniform(runs: list[dict]) -> str:
    """The ratio of times with skewed and uniform keys; empty without such a pair of runs."""
    lines = []
    for skewed in (run for run in runs if run["settings"].get("keys") == "skewed"):
        like = {**skewed["settings"], "keys": "uniform"}
        for uniform in (run for run in runs if (run["settings"], run["environment"]) == (like, skewed["environment"])):
            for result in skewed["results"]:
                other = find(uniform, result["system"], result["pass"], result["tokens"]) or {}
                if "milliseconds" in result and "milliseconds" in other:
                    ratio = result["milliseconds"] / other["milliseconds"]
                    lines.append(f"skewed / uniform: {result['system']}, {result['pass']}, {result['tokens']:,} tokens: {ratio:.2f}x")
    return "\n".join(lines)


def plot(runs: list[dict], file: Path) -> None:
    """Time (for training: tokens per second) against tokens, on logarithmic axes: one line per system, one panel per pass, one row of
    panels per run.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    n_columns = max(len(of(run, "pass")) for run in runs)
    figure = pyplot.figure(figsize=(5.6 * n_columns, 5.2 * len(runs)), layout="constrained")
    every = [s for s in dict.fromkeys(s for run in runs for s in of(run, "system")) if s != OURS]
    style = {s: {"color": f"C{i + 1}", "marker": "os^Dv<>p"[i % 8], "markersize": 5} for i, s in enumerate(every)}
    style[OURS] = {"color": "black", "marker": "o", "markersize": 6, "linewidth": 2.5, "zorder": 3}
    for run, row in zip(runs, figure.subfigures(len(runs), 1, squeeze=False)[:, 0]):
        for pass_, panel in zip(of(run, "pass"), row.subplots(1, n_columns, squeeze=False)[0]):
            draw(panel, run, pass_, style)
        for panel in row.axes[len(of(run, "pass")) :]:
            panel.set_axis_off()
        caption = "\n".join(textwrap.wrap(run["title"], 80 * n_columns))
        caption += f"\n{run['environment']['device']}, PyTorch {run['environment']['torch']}, {run['date'][:10]}"
        row.suptitle(caption, fontsize=9, color="0.3")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw(panel, run: dict, pass_: str, style: dict) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    lengths, training = of(run, "tokens"), run["settings"].get("workload") == TRAINING
    for system in of(run, "system"):
        results = [r for n in lengths if (r := find(run, system, pass_, n))]
        points = [(r["tokens"], speed(r) if training else r["milliseconds"]) for r in results if "milliseconds" in r]
        full = [r["tokens"] for r in results if r.get("skipped") == FULL]
        label = IN_WORDS.get(system, system) + (f" (out of memory at {short(full[0])})" if full else "")
        if points or full:
            panel.plot(*zip(*points or [(lengths[0], float("nan"))]), label=label, **style[system])
    panel.set(xscale="log", yscale="log", title=pass_, xlabel="tokens", ylabel="tokens a second" if training else "milliseconds")
    panel.set_xticks(lengths, [short(n) for n in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(True, alpha=0.3)
    if panel.get_lines():
        panel.legend(fontsize=8, loc="best")


def short(tokens: int) -> str:
    """131072 -> 128K"""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
