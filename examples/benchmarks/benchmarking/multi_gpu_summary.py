"""The results of multi_gpu_check.py's parts, compared with the predictions of docs/scaling.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

LINK = 450e9  # bytes per second that a GPU sends inside a host, by the datasheet
DENSE = 570e12  # operations per second of cuDNN's dense causal attention on one H200, from its 247 ms in README.md
GATE = 185e12  # operations per second of the gate's extra work for longer inputs, one H200, from 32,768 and 131,072 tokens: docs/scaling.md
HEADS, KEY_HEADS, WIDTH = 32, 8, 128  # of prefill_scaling.py
GOAL = 0.9  # share of linear scaling, for a prefill with exchange="keys"
ROUNDING = 0.02  # relative to the loss: bfloat16 has 8 bits, 0.4 %, and after some steps weights differ by that too
APART = 0.01  # allowed share of queries that read other blocks, which were equally good within rounding
A_MINUTE, KILLED = 60, 137  # seconds in which the other processes must end; 128 plus the number of the signal
Results = Mapping[str, dict[str, Any]]


def summary(results: Results) -> tuple[list[str], dict[str, Any]]:
    """The lines to print, and a dict with their rows and what is wrong: losses that differ, a killed process that was not named in time,
    outputs that differ from float64.
    """
    found: list[tuple[str, str | None, dict[str, Any]]] = [*losses(results), *resumed(results), *tests(results)]
    found += [*prefills(results), *speeds(results), *models(results)]
    lines = [line for line, _, _ in found]
    return lines, {"wrong": [wrong for _, wrong, _ in found if wrong], "rows": [row for _, _, row in found]}


def losses(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Losses on several GPUs compared with one GPU."""
    found = []
    expected = results.get("losses-one", {}).get("loss")
    for how in ("ddp", "fsdp2", "fsdp2-cp"):
        losses = results.get(f"losses-{how}", {}).get("loss")
        if expected is None or losses is None:
            continue
        off, bound = apart(losses, expected), ROUNDING * max(expected)
        line = f"{how}: losses of {len(losses)} steps differ from one GPU's by at most {off:.4f} (allowed: {bound:.4f})"
        wrong = None if off <= bound else f"losses of {how} differ from one GPU's"
        found.append((line, wrong, {"what": f"losses {how}", "largest_difference": off, "allowed": bound}))
    return found


def apart(some: list[float], others: list[float]) -> float:
    """The largest difference; NaN if any is NaN."""
    return max((abs(a - b) for a, b in zip(some, others, strict=True)), key=lambda x: (math.isnan(x), x))


def resumed(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """A run of which a process was killed: which processes named it, and the steps done twice, the second time on one process fewer."""
    if "resume" not in results:
        return []
    x = results["resume"]
    n, before, after = x["processes"], x["loss_before"], x["loss"]
    off, bound = apart(before, after[: len(before)]), ROUNDING * max(before)
    twice = len(before) - x["resumed_at"]
    row = {key: x[key] for key in ("processes", "exit_code", "seconds_until_all_ended", "processes_that_named_it", "resumed_at", "steps")}
    row |= {"what": "resume", "steps_done_twice": twice, "largest_difference": off, "allowed": bound}
    line = f"resume: one of {n} processes was killed, {x['processes_that_named_it']} named it, and all had ended after "
    line += f"{x['seconds_until_all_ended']:.1f} s; {n - 1} went on from step {x['resumed_at']} to {len(after)} of {x['steps']}; losses of "
    line += f"{twice} steps that were done twice differ by at most {off:.4f} (allowed: {bound:.4f})"
    wrong = None
    if x["processes_that_named_it"] < n - 1 or x["seconds_until_all_ended"] > A_MINUTE:
        wrong = "a killed process was not named by all others within a minute"
    elif x["exit_code"] != KILLED:
        wrong = f"a run of which a process was killed ended with exit code {x['exit_code']}, not {KILLED}"
    elif len(after) != x["steps"] or not off <= bound:
        wrong = "a run that goes on after a process was killed has other losses, or not all steps"
    return [(line, wrong, row)]


def tests(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    if "tests" not in results:
        return []
    x = results["tests"]
    counts = {key: x[key] for key in ("passed", "skipped", "failed", "error") if x.get(key)}
    line = f"tests: {', '.join(f'{n} {what}' for what, n in counts.items())}{', then the time was up' if x.get('cut') else ''}"
    wrong = "tests failed before the time was up" if x.get("failed") or x.get("error") else None
    return [(line, wrong, {"what": "tests", "cut": bool(x.get("cut")), **counts})]


def prefills(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Prefills of one layer: times, and errors of checked outputs."""
    found = []
    of_one = results.get("prefill-1")
    for name, x in layers(results):
        n, alone = x["processes"], of_one and of_one["rows"][0]
        row = {"what": name, **{key: x[key] for key in ("processes", "tokens", "milliseconds", "GB_sent_by_each", "peak_GB")}}
        row["dense_ms_by_arithmetic"] = 1000 * 2 * HEADS * WIDTH * x["tokens"] ** 2 / DENSE / n
        line = f"{name}: {x['milliseconds']:.1f} ms, {x['GB_sent_by_each']:.2f} GB sent by each, {x['peak_GB']:.1f} GB at peak"
        if alone is not None:
            row["predicted_ms"] = predicted_ms(x, alone)
            row["share_of_linear"] = alone["milliseconds"] * x["tokens"] / alone["tokens"] / n / x["milliseconds"]
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


def layers(results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    for part, result in results.items():
        if part.startswith(("prefill-", "ten-million-")):
            for row in result["rows"]:
                yield f"{part}-{row['exchange']}" if len(result["rows"]) > 1 else part, row


def predicted_ms(x: Mapping[str, Any], alone: Mapping[str, Any]) -> float:
    """The predicted time, from that of one process: a part linear in the tokens, the gate's products, which are quadratic, and the
    exchange.

    With an exchange of keys the last slice has the most products: its queries are compared with the means of all blocks before them.
    """
    n = x["processes"]
    linear = (alone["milliseconds"] - gate_ms(alone)) * x["tokens"] / alone["tokens"] / n
    of_slowest = (2 * n - 1) / n if x["exchange"] == "keys" else 1
    return linear + gate_ms(x) / n * of_slowest + visible_ms(x)


def gate_ms(x: Mapping[str, Any]) -> float:
    """Time of the products of queries with the means of preceding blocks, tokens / block_size / 2 on average, on one process."""
    return 1000 * HEADS * WIDTH * x["tokens"] ** 2 / x["block_size"] / GATE


def visible_ms(x: Mapping[str, Any]) -> float:
    """Time of the exchange that is not overlapped: for keys the first of one message per key head, for heads all."""
    sent = 1000 * x["GB_sent_by_each"] * 1e9 / LINK
    return sent / KEY_HEADS if x["exchange"] == "keys" else sent


def speeds(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Speeds of training."""
    found = []
    measured = {int(name.removeprefix("speed-")): x["tokens_per_second"][2:] for name, x in results.items() if name.startswith("speed-")}
    rates = {n: statistics.median(measured[n]) for n in sorted(measured)}
    for n, rate in rates.items():
        share = rate / rates[1] / n if 1 in rates else None
        linear = "" if share is None else f", {share:.2f} of linear"
        line = f"training, {n} processes: {rate:,.0f} tokens a second{linear}"
        found.append((line, None, {"what": f"speed-{n}", "processes": n, "tokens_per_second": rate, "share_of_linear": share}))
    return found


def models(results: Results) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Results of whole models."""
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
