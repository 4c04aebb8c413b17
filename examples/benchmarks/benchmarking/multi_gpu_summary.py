"""What the parts of multi_gpu_check.py found, beside what docs/scaling.md predicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

LINK = 450e9  # bytes per second that a GPU sends inside a host, by the datasheet
DENSE = 570e12  # operations per second of cuDNN's dense causal attention on one H200, from its 247 ms in README.md
HEADS, KEY_HEADS, WIDTH = 32, 8, 128  # of prefill_scaling.py
GOAL = 0.9  # of linear, for a prefill by keys
ROUNDING = 0.02  # of a loss: bfloat16 has 8 bits, 0.4 %, and after some steps weights differ by that too
APART = 0.01  # share of queries that may read other blocks, which were as good to within rounding
Results = Mapping[str, dict[str, Any]]


def summary(results: Results) -> tuple[list[str], dict[str, Any]]:
    """Lines to print; and the rows that they are made of, with what is wrong: losses that differ, outputs that are not those in float64."""
    found: list[tuple[str, str | None, dict[str, Any]]] = [*losses(results), *prefills(results), *speeds(results), *models(results)]
    lines = [line for line, _, _ in found]
    return lines, {"wrong": [wrong for _, wrong, _ in found if wrong], "rows": [row for _, _, row in found]}


def losses(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Of several GPUs against those of one."""
    found = []
    expected = results.get("losses-one", {}).get("loss")
    for how in ("ddp", "fsdp2", "fsdp2-cp"):
        losses = results.get(f"losses-{how}", {}).get("loss")
        if expected is None or losses is None:
            continue
        differences, bound = [abs(a - b) for a, b in zip(losses, expected, strict=True)], ROUNDING * max(expected)
        off = max(differences, key=lambda x: (math.isnan(x), x))
        line = f"{how}: losses of {len(losses)} steps differ from one GPU's by at most {off:.4f} (allowed: {bound:.4f})"
        wrong = None if off <= bound else f"losses of {how} differ from one GPU's"
        found.append((line, wrong, {"what": f"losses {how}", "largest_difference": off, "allowed": bound}))
    return found


def prefills(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Of one layer: times, and outputs where they were checked."""
    found = []
    for name, x in results.items():
        if not name.startswith(("prefill-", "ten-million-")):
            continue
        n, alone = x["processes"], results.get(f"prefill-{x['exchange']}-1")
        row = {"what": name, **{key: x[key] for key in ("processes", "tokens", "milliseconds", "GB_sent_by_each", "peak_GB")}}
        row["dense_ms_by_arithmetic"] = 1000 * 2 * HEADS * WIDTH * x["tokens"] ** 2 / DENSE / n
        line = f"{name}: {x['milliseconds']:.1f} ms, {x['GB_sent_by_each']:.2f} GB sent by each, {x['peak_GB']:.1f} GB at peak"
        if alone is not None:
            attention = alone["milliseconds"] * x["tokens"] / alone["tokens"] / n
            row["predicted_ms"] = attention + visible_ms(x)
            row["share_of_linear"] = attention / x["milliseconds"]
            goal = f", goal {GOAL}" if n > 1 and x["exchange"] == "keys" else ""
            line += f"; predicted {row['predicted_ms']:.1f} ms; {row['share_of_linear']:.2f} of linear{goal}"
        line += f"; dense attention, by arithmetic: {row['dense_ms_by_arithmetic']:.0f} ms"
        wrong = None
        if "largest_error" in x:
            row |= {key: x[key] for key in ("queries_checked", "largest_error", "median_error", "share_that_chose_other_blocks")}
            line += f"; {x['queries_checked']} outputs against float64: off by {x['largest_error']:.4f} at most"
            line += f", {100 * x['share_that_chose_other_blocks']:.2f} % read other blocks"
            good = x["share_that_chose_other_blocks"] <= APART and math.isfinite(x["largest_error"])
            wrong = None if good else f"{name}: outputs are not those in float64"
        found.append((line, wrong, row))
    return found


def visible_ms(x: Mapping[str, Any]) -> float:
    """The exchange that nothing hides: of keys the first of one message per key head, of heads all."""
    sent = 1000 * x["GB_sent_by_each"] * 1e9 / LINK
    return sent / KEY_HEADS if x["exchange"] == "keys" else sent


def speeds(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Of training."""
    found, rates = [], {}
    for name, x in results.items():
        if name.startswith("speed-"):
            n = int(name.removeprefix("speed-"))
            rates[n] = statistics.median(x["tokens_per_second"][2:])
            share = rates[n] / rates[1] / n if 1 in rates else None
            linear = "" if share is None else f", {share:.2f} of linear"
            line = f"training, {n} processes: {rates[n]:,.0f} tokens a second{linear}"
            found.append((line, None, {"what": name, "processes": n, "tokens_per_second": rates[n], "share_of_linear": share}))
    return found


def models(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Whole models."""
    found = []
    for name, x in results.items():
        if not name.startswith("model-"):
            continue
        if x.get("out_of_memory"):
            found.append((f"{name}: {x['tokens']:,} tokens do not fit: {x['said']}", None, {"what": name, "out_of_memory": True}))
            continue
        keys = ("processes", "tokens", "seconds_to_first_token", "milliseconds_per_new_token", "peak_GB_of_process_0")
        line = f"{name}: {x['tokens']:,} tokens, the first new one after {x['seconds_to_first_token']:.1f} s, others "
        line += f"{x['milliseconds_per_new_token']:.1f} ms each, {x['peak_GB_of_process_0']:.1f} GB at peak"
        found.append((line, None, {"what": name, **{key: x[key] for key in keys}}))
    return found
