"""What a model does with one text under one setting: loss, agreement with full attention, facts found, and the time that it takes.

N tokens of a text, V vocabulary.
"""

from __future__ import annotations

import inspect
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

CHUNK = 1024  # positions whose logits are float32 at once: all of a long text would take gigabytes
WARM_UP, ROUNDS = 3, 5  # passes on a GPU before any is timed, and those that are


@dataclass(frozen=True)
class Reading:
    """One text under one setting.

    Attributes:
        loss: mean negative log-likelihood, nats per token.
        last_quarter: the same of the last quarter of the text.
        agreement: share of the positions whose likeliest next token is that of full attention.
        seconds: of the forward pass; of the process on all cores where the model is on a CPU, else by the clock; None if some of its layers
            were those of the last pass.
    """

    loss: float
    last_quarter: float
    agreement: float
    seconds: float | None


class Meter:
    """Reads texts with a model, whose settings it changes as it goes; `done` is called after each pass."""

    def __init__(self, model: nn.Module, texts: Sequence[Tensor], saved: Saved, done: Callable[[], None]) -> None:
        self._model, self._texts, self._saved, self._done = model, texts, saved, done
        self._likeliest: dict[int, Tensor] = {}  # of full attention, by text: [N - 1]
        self._device = next(model.parameters()).device
        self._prefix: Prefix | None = None

    def reuse_layers(self) -> None:
        """From now on passes skip layers that the last one over the same text has computed: on a CPU, where a model allows it."""
        prefix = Prefix(self._model)
        if self._device.type == "cpu" and prefix.possible:
            few = self._texts[0][:PROBE]
            self._prefix = prefix if prefix.works(lambda: self._whole(few)) else None

    def read(self, config: MobaConfig | None, text: int, timed: bool = False) -> Reading:
        """`config` None: full attention. `timed`: no layer is skipped."""
        result = self._saved.get(f"{name_of(config)} | text {text}", lambda: self._read(config, text, timed))
        self._done()
        return Reading(**result)

    def _read(self, config: MobaConfig | None, text: int, timed: bool) -> Measured:
        if config is not None and text not in self._likeliest:  # a file goes on: what full attention chose is not in it
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
        """How many facts of a text are found, and of how many: every token of an answer is the likeliest one at its place."""

        def measured() -> Measured:
            self.use(config)
            chosen = self._logits(text.ids)[0].argmax(-1).cpu()
            right = [bool((chosen[first - 1 : end - 1] == text.ids[first:end]).all()) for first, end in text.answers]
            return {"found": sum(right), "of": len(right)}

        result = self._saved.get(f"{name_of(config)} | facts {name}", measured)
        self._done()
        return int(result["found"]), int(result["of"])

    def times(self, configs: Sequence[MobaConfig | None]) -> dict[MobaConfig | None, float]:
        """Median seconds of a prefill on a GPU: all are timed in turn, in `ROUNDS` rounds, after a warm-up of each."""
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
        """Let the model use these settings."""
        if config is None:
            set_attention(self._model, "full")
        else:
            patch(self._model, config)

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> tuple[Tensor, float]:
        """`[N, V]` of one text, in the model's dtype, and how long they took."""
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
            return time.process_time()  # other programs on the machine do not count
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def name_of(config: MobaConfig | None) -> str:
    """A setting in the file of measurements."""
    if config is None:
        return "full attention"
    layers = ",".join(map(str, config.full_attention_layers))
    shared = ", shared" if config.share_selection else ""
    return (
        f"block {config.block_size}, top-{config.top_k}, sink {config.sink_blocks}, recent {config.recent_blocks}{shared}, full ({layers})"
    )


def _keeps_logits(model: nn.Module) -> bool:
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # PEFT's forward names nothing
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
