"""Find settings for a pretrained model without training: `calibrate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from ...config import MobaConfig, layer_indices
from ...core.messages import shown
from ...core.validation import check_choice, check_count, is_number
from ...models.layers import is_patched
from ...models.patch import find_layers
from ...models.state import context_of
from ..inputs import check_ids, check_weights
from ..trace import left_as_it_was
from .measure import ROUNDS, Meter, Reading, name_of
from .report import Calibration, Candidate, Part, duration
from .saved import Saved, fingerprint
from .search import Costs, Limits, Search, standard_error
from .space import Space, default_block_sizes, default_budgets
from .texts import sequences, split, with_facts

COSTS = ("auto", "time", "keys")
FEW_TEXTS, SHORT = 4, 1024  # with fewer held-out texts, or shorter ones, the result is unreliable


def calibrate(
    model: nn.Module,
    texts: Iterable[str] | Iterable[Iterable[int]] | Tensor,
    *,
    within: float = 0.02,
    tokenizer: Any = None,
    length: int | None = None,
    last_quarter: float | None = None,
    agreement: float | None = None,
    retrieval: float | None = None,
    cost: str = "auto",
    block_sizes: Iterable[int] | None = None,
    budgets: Iterable[int] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Find the cheapest settings of MoBA whose loss is within `within` nats per token of full attention, without training.

    One text in three is used for the search, and the others are held out. The chosen settings have been checked on the held-out texts: the
    mean difference to full attention plus its standard error is at most `within`. If a check fails, the text that did worst there is
    added to the search. The search covers block sizes, key budgets, sink and recent blocks, a shared selection, and which layers keep full
    attention. The model is restored afterwards, also after an exception. An estimate of the time is printed first, and a progress bar
    counts the passes; `transformers.utils.logging.disable_progress_bar()` turns both off.

    Args:
        model: a transformers model with a language-model head, patched or not, on the device whose time counts.
        texts: at least 2, better 12 or more, of the kind and length that the model is for: strings, or rows of token ids `[N]`.
        within: the largest difference to full attention in nats per token, above 0; on held-out texts the mean plus one standard error.
        tokenizer: for strings, and for the retrieval of facts that are put into texts.
        length: number of tokens to which each text is cut; None: that of the shortest.
        last_quarter: the largest difference to full attention in the last quarter of a text, in nats per token; None: no limit.
        agreement: the smallest share of positions with the same most likely next token as full attention, 0 to 1; None: no limit.
        retrieval: the smallest share of the facts found by full attention that must be found, 0 to 1; None: no limit.
        cost: what is minimised: "time" of a forward pass, "keys" read, or "auto", time on a GPU and keys elsewhere. Costs within 2 % count
            as equal; for "time" the keys read then decide.
        block_sizes: block sizes to search, in tokens; None: three powers of two that depend on the length.
        budgets: key budgets to search, the largest number of keys that a query reads; None: 1/16, 1/8, 1/4 and 3/8 of the length.
        file: a file for measurements. Each is written as soon as it is made; the same call continues from there.

    Returns:
        A `Calibration`: `report.config` is for `moba_flex.patch`, or None if no settings keep the limits. Print it for a table.

    Raises:
        ValueError: a limit, a size or a text is out of range, the model cannot use MoBA or has no head, its loss is not finite, or `file`
            belongs to another calibration.
        TypeError: `model` is not a module, `texts` are neither strings nor token ids, or `tokenizer` or `file` is something else.
        OSError: `file` cannot be written.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import calibrate, patch
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(tiny)
    >>> report = calibrate(model, torch.randint(32, (6, 256)), within=0.05)
    >>> report.config.block_size, report.config.top_k, report.n_held_out
    (4, 4, 4)
    >>> model = patch(model, report.config)
    """
    limits = limits_of(within, last_quarter, agreement, retrieval)
    check_choice("cost", cost, COSTS)
    if length is not None:
        check_count("length", length, 1)
    layers, template = _layers(model)
    device = next(model.parameters()).device
    check_weights(model)
    ids = sequences(texts, tokenizer, length, model)
    if retrieval is not None and tokenizer is None:
        raise ValueError("retrieval puts facts into the texts, which needs a tokenizer: give tokenizer=, or leave retrieval out")
    space = _space(template, layers, len(ids[0]), block_sizes, budgets)
    cost = cost if cost != "auto" else "time" if device.type == "cuda" else "keys"
    about = fingerprint(model, ids) | {"torch": torch.__version__, "transformers": transformers.__version__, "device": _name(device)}
    run = _Run(model, ids, tokenizer, space, limits, cost, Saved(file, about))
    with left_as_it_was(model):
        model.eval()
        return run.report()


class _Run:
    """One calibration: its texts, its search, and the report."""

    def __init__(self, model: nn.Module, ids: list[Tensor], tokenizer: Any, space: Space, limits: Limits, cost: str, saved: Saved) -> None:
        self._model, self._ids, self._space, self._limits, self._cost = model, ids, space, limits, cost
        self._bar: Any = None
        self._done = self._expected = 0
        self._saved = saved
        self._meter = Meter(model, ids, saved, self._count)
        search, held_out = split(len(ids))
        self._search = Search(self._meter, space, limits, search, held_out)
        n_facts = 0 if tokenizer is None else 1 if limits.retrieval is None else 2  # number of texts with facts
        fact_texts = {i: with_facts(ids[i], tokenizer, i) for i in held_out[:n_facts]}
        for text in fact_texts.values():
            check_ids("calibrate", "what tokenizer makes of facts", text.ids, model)
        self._facts = {i: text for i, text in fact_texts.items() if text.answers}
        self._found: dict[str, tuple[int, int]] = {}
        self._costs = Costs(self._meter, space, cost)

    def _count(self) -> None:
        self._done += 1
        if self._bar is not None:
            if self._done > self._expected:
                self._bar.total = self._done
            self._bar.update()

    def report(self) -> Calibration:
        passes = self._search.passes() + 2 * len(self._facts)
        if self._cost == "time":
            passes += ROUNDS * (1 + len(self._space.blocks(self._space.reference())))
        self._expected = passes
        self._say_cost(passes)
        with logging.tqdm(total=passes, initial=1, desc="Calibrating", unit="pass") as self._bar:
            self._search.measure_full()
            self._meter.reuse_layers()
            chosen = self._search.run(self._costs, self._keeps_facts)
            if chosen is not None and self._facts and name_of(chosen) not in self._found:
                self._find(chosen)
        return self._made(chosen)

    def _say_cost(self, passes: int) -> None:
        """Estimate the time from one pass of full attention. Print it unless progress bars are off."""
        self._search.full[self._search.search[0]] = first = self._meter.read(None, self._search.search[0], timed=True)
        if logging.is_progress_bar_enabled():
            seconds = passes * (first.seconds or 0.0)
            whose = " of one processor" if _is_cpu(self._model) else ""
            print(
                f"Calibrating: about {passes} forward passes of {self._space.length:,} tokens, {duration(seconds)}{whose} if all took as "
                "long as full attention; several times as long where MoBA is slower than that, less where the search ends early",
                file=sys.stderr,
            )

    def _keeps_facts(self, config: MobaConfig) -> bool:
        """Whether enough facts are found, if there is a limit."""
        if self._limits.retrieval is None:
            return True
        found, _ = self._find(config)
        return found >= self._limits.retrieval * self._find(None)[0]

    def _find(self, config: MobaConfig | None) -> tuple[int, int]:
        counts = [self._meter.find(config, text, str(i)) for i, text in self._facts.items()]
        self._found[name_of(config)] = sum(found for found, _ in counts), sum(of for _, of in counts)
        return self._found[name_of(config)]

    def _made(self, chosen: MobaConfig | None) -> Calibration:
        search = self._search
        configs = sorted(search.seen, key=lambda config: (self._costs.of(config), self._space.share(config)))
        facts = None
        if chosen is not None and name_of(chosen) in self._found:
            full = self._found.get(name_of(None)) or self._find(None)
            facts = {"full": full[0], "moba": self._found[name_of(chosen)][0], "of": full[1]}
        held_out = [search.full[i].loss for i in search.held_out]
        measured, spent = self._saved.spent()
        report = Calibration(
            model=type(self._model).__name__,
            device=_name(next(self._model.parameters()).device),
            length=self._space.length,
            limits={name: x for name, x in vars(self._limits).items() if x is not None},
            cost=self._cost,
            n_search=len(search.search),
            n_held_out=len(search.held_out),
            full_loss=fmean(held_out),
            full_seconds=self._costs.times.get(None) or median(x.seconds or 0.0 for x in search.full.values()),
            chosen=None if chosen is None else configs.index(chosen),
            candidates=tuple(self._candidate(config) for config in configs),
            deciding=next(reversed(search.deciding), search.search[0]),
            layers=search.gains,
            ranked=tuple(search.ranked),
            together=tuple(search.together),
            facts=facts,
            n_checked=len(search.checked),
            measured=measured,
            seconds=spent,
        )
        return replace(report, warnings=tuple([*_warnings(report), *_too_long(self._model, report.length)]))

    def _candidate(self, config: MobaConfig) -> Candidate:
        search, readings = self._search, self._search.seen[config]
        timed = [x.seconds for x in readings.values() if x.seconds is not None]
        seconds = self._costs.of(config) if self._cost == "time" else median(timed) if timed else None
        parts = [_part({i: x for i, x in readings.items() if i in texts}, search.full) for texts in (search.search, search.held_out)]
        lost = {i: x.loss - search.full[i].loss for i, x in sorted(readings.items())}
        return Candidate(config, self._space.share(config), seconds, parts[0], parts[1], lost)


def _part(readings: Mapping[int, Reading], full: Mapping[int, Reading]) -> Part | None:
    if not readings:
        return None
    lost = [x.loss - full[i].loss for i, x in readings.items()]
    last = [x.last_quarter - full[i].last_quarter for i, x in readings.items()]
    return Part(len(lost), fmean(lost), standard_error(lost), fmean(last), fmean(x.agreement for x in readings.values()))


def _warnings(report: Calibration) -> Iterable[str]:
    part = None if report.chosen is None else report.candidates[report.chosen].held_out
    if report.n_held_out < FEW_TEXTS:
        enough = FEW_TEXTS * 3 // 2
        yield f"{report.n_held_out} texts set aside are too few to tell the spread: give at least {enough} texts, better 12 or more"
    if part is not None and part.spread > report.limits["within"] / 2:
        yield f"the spread over texts, {part.spread:.4f}, is more than half of within={report.limits['within']:g}: give more texts"
    if report.length < SHORT:
        yield f"texts of {report.length:,} tokens say little of longer ones: give texts of the length that the model is for"
    chosen = None if report.chosen is None else report.candidates[report.chosen]
    if chosen is not None and chosen.seconds is not None and chosen.seconds >= report.full_seconds:
        yield (
            f"these settings are not faster than full attention at {report.length:,} tokens on this device "
            f"({chosen.seconds / report.full_seconds:.2f}x its time)"
        )
    if report.facts is not None and report.facts["full"] * 2 < report.facts["of"]:
        yield "full attention finds less than half of the facts: retrieval says little of this model"


def _too_long(model: Any, length: int) -> Iterable[str]:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        yield f"texts of {length:,} tokens are longer than the model's context of {context:,}: its loss at the end of them says little"


def limits_of(within: float, last_quarter: float | None, agreement: float | None, retrieval: float | None) -> Limits:
    """The limits, each checked."""
    for name, value in (("within", within), ("last_quarter", last_quarter)):
        if value is not None and not (is_number(value) and 0 < value <= sys.float_info.max):
            raise ValueError(f"{name} must be a number of nats above 0, such as 0.02, but is {shown(value)}")
    if within is None:
        raise ValueError("within must be a number of nats above 0, such as 0.02, but is None")
    for name, value in (("agreement", agreement), ("retrieval", retrieval)):
        if value is not None and not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must be a share from 0 to 1, but is {shown(value)}")
    return Limits(within, last_quarter, agreement, retrieval)


def _layers(model: nn.Module) -> tuple[tuple[int, ...], MobaConfig]:
    """The layers that MoBA can replace, and the settings that are not searched."""
    _, replaceable = find_layers(model)
    if any(context_of(layer) is not None for layer in replaceable):
        raise ValueError(f"{type(model).__name__} is context-parallel, which cannot be calibrated: call ContextParallel.remove() first")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-model head, so that it has no loss: load it with AutoModelForCausalLM")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model, and only decoder-only models can be calibrated")
    of: Any = replaceable[0].config
    now = MobaConfig.of(of) if is_patched(replaceable) and getattr(of, "moba", None) is not None else MobaConfig()
    template = MobaConfig(top_k=4, sink_blocks=1, decode=now.decode, implementation=now.implementation, key_conv=now.key_conv)
    return tuple(sorted({layer.layer_idx for layer in replaceable})), template


def _space(
    template: MobaConfig, layers: tuple[int, ...], length: int, block_sizes: Iterable[int] | None, budgets: Iterable[int] | None
) -> Space:
    sizes = default_block_sizes(length) if block_sizes is None else sizes_of("block_sizes", block_sizes)
    keys = default_budgets(length) if budgets is None else sizes_of("budgets", budgets)
    if length <= min(sizes):
        raise ValueError(
            f"texts have {length:,} tokens, which is no more than one block of {min(sizes):,}: give longer texts, or smaller block_sizes"
        )
    space = Space(template, length, layers, sizes, keys)
    if not space.blocks(space.reference()):
        raise ValueError(
            f"texts have {length:,} tokens, of which block_sizes={list(sizes)} and budgets={list(keys)} read all: give longer texts, or "
            "smaller ones of these"
        )
    return space


def sizes_of(name: str, given: Iterable[int]) -> tuple[int, ...]:
    """The argument `name`, sorted."""
    values = layer_indices(name, given)
    if not values:
        raise ValueError(f"{name} is empty: leave it out, or name some")
    for value in values:
        check_count(f"each of {name}", value, 1)
    return tuple(sorted(set(values)))


def _is_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
