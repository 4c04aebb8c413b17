"""Measurements of one text under one setting: loss, agreement with full attention, facts found, and time.

N tokens of a text, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import MobaConfig
from ...models.patch import patch, set_attention
from .prefix import PROBE, Prefix
from .saved import Measured, Saved
from .texts import FactText

CHUNK = 1024  # positions whose logits are cast to float32 at a time: those of a long text would take gigabytes
WARM_UP, ROUNDS = 3, 5  # on a GPU: passes before each timed one, and rounds of timing


@dataclass(frozen=True)
class Reading:
    """Measurements of one text under one setting.

    Attributes:
        loss: mean negative log-likelihood, nats per token; infinity where it is not finite, which no limit allows.
        last_quarter: the same for the last quarter of the text.
        agreement: share of positions with the same most likely next token as full attention.
        seconds: of the forward pass: process time over all cores on a CPU, else wall-clock time; None if outputs of an earlier pass were
            reused.
    """

    loss: float
    last_quarter: float
    agreement: float
    seconds: float | None


class Meter:
    """Runs a model on texts, and changes its settings as needed; `done` is called after each pass."""

    def __init__(self, model: nn.Module, texts: Sequence[Tensor], saved: Saved, done: Callable[[], None]) -> None:
        self._model, self._texts, self._saved, self._done = model, texts, saved, done
        self._likeliest: dict[int, Tensor] = {}  # of full attention, per text: [N - 1]
        self._device = next(model.parameters()).device
        self._prefix: Prefix | None = None

    def reuse_layers(self) -> None:
        """From now on passes reuse layer outputs of earlier passes over the same text: on a CPU, if the model allows it."""
        prefix = Prefix(self._model)
        if self._device.type == "cpu" and prefix.possible:
            few = self._texts[0][:PROBE]
            self._prefix = prefix if prefix.works(lambda: self._whole(few)) else None

    def read(self, config: MobaConfig | None, text: int, timed: bool = False) -> Reading:
        """Measure one text. `config` None: full attention. `timed`: no layer outputs are reused."""
        result = self._saved.get(f"{name_of(config)} | text {text}", lambda: self._read(config, text, timed))
        self._done()
        for name in ("loss", "last_quarter"):
            if not math.isfinite(result[name]):
                result[name] = math.inf
        if config is None and math.isinf(result["loss"]):
            raise ValueError(
                f"the loss of full attention on texts[{text}] is not finite: load the model in bfloat16 or float32 if it is in float16, "
                "whose range is small, and check its weights"
            )
        return Reading(**result)

    def _read(self, config: MobaConfig | None, text: int, timed: bool) -> Measured:
        if config is not None and text not in self._likeliest:  # a continued file does not contain full attention's choices
            self._read(None, text, timed)
        self.use(config)
        if self._prefix is None or timed:
            logits, seconds = self._logits(self._texts[text])
            skipped = 0
        else:
            with self._prefix.reused(config, text) as skipped:
                logits, seconds = self._logits(self._texts[text])
        target = self._texts[text][1:].to(logits.device)
        losses, likeliest = [], []
        for part, wanted in zip(logits[:-1].split(CHUNK), target.split(CHUNK)):
            losses.append(F.cross_entropy(part.float(), wanted.to(part.device), reduction="none"))
            likeliest.append(part.argmax(-1))
        loss, chosen = torch.cat(losses).double(), torch.cat(likeliest).cpu()
        if config is None:
            self._likeliest[text] = chosen
        agreement = (chosen == self._likeliest[text]).double().mean().item()
        last = loss[-(len(loss) // 4) :]
        return {
            "loss": loss.mean().item(),
            "last_quarter": last.mean().item(),
            "agreement": agreement,
            "seconds": None if skipped else seconds,
        }

    def find(self, config: MobaConfig | None, text: FactText, name: str) -> tuple[int, int]:
        """The number of facts found in a text, and of all facts. A fact is found if each token of its answer is the most likely one."""

        def measured() -> Measured:
            self.use(config)
            chosen = self._logits(text.ids)[0].argmax(-1).cpu()
            right = [bool((chosen[first - 1 : end - 1] == text.ids[first:end]).all()) for first, end in text.answers]
            return {"found": sum(right), "of": len(right)}

        result = self._saved.get(f"{name_of(config)} | facts {name}", measured)
        self._done()
        return int(result["found"]), int(result["of"])

    def times(self, configs: Sequence[MobaConfig | None]) -> dict[MobaConfig | None, float]:
        """Median seconds of a prefill on a GPU. All settings are timed in turn, in `ROUNDS` rounds, with a warm-up before each."""
        found: dict[MobaConfig | None, list[float]] = {config: [] for config in configs}

        def one(config: MobaConfig | None) -> Measured:
            self.use(config)
            for _ in range(WARM_UP):
                self._prefill()
            return {"seconds": self._prefill()}

        for turn in range(ROUNDS):
            for config in configs:
                result = self._saved.get(f"{name_of(config)} | time {turn}", lambda config=config: one(config))  # type: ignore[misc]
                found[config].append(float(result["seconds"]))
                self._done()
        return {config: median(times) for config, times in found.items()}

    def use(self, config: MobaConfig | None) -> None:
        """Apply these settings to the model; None: full attention."""
        if config is None:
            set_attention(self._model, "full")
        else:
            patch(self._model, config)

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> tuple[Tensor, float]:
        """`[N, V]` logits of one text, in the model's dtype, and the seconds that they took."""
        begin = self._now()
        logits = self._whole(ids)
        return logits, self._now() - begin

    @torch.no_grad()
    def _whole(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids[None].to(self._device), use_cache=False).logits[0]

    @torch.no_grad()
    def _prefill(self) -> float:
        last_only: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(self._model) else {}
        ids, begin = self._texts[0][None].to(self._device), self._now()
        self._model(input_ids=ids, use_cache=False, **last_only)
        return self._now() - begin

    def _now(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()  # excludes other programs on the machine
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def name_of(config: MobaConfig | None) -> str:
    """The name of a setting in the file of measurements."""
    if config is None:
        return "full attention"
    layers = ",".join(map(str, config.full_attention_layers))
    shared = ", shared" if config.share_selection else ""
    return (
        f"block {config.block_size}, top-{config.top_k}, sink {config.sink_blocks}, recent {config.recent_blocks}{shared}, full ({layers})"
    )


def _keeps_logits(model: nn.Module) -> bool:
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # PEFT's forward does not name its arguments
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
