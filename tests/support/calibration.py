"""What tests of `calibrate` share: a model's loss, and a stop in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moba_flex.analysis.calibration.measure import Meter


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Mean nats per token of one text `[N]`."""
    return cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()


@contextmanager
def stopped_after(n_passes: int) -> Iterator[None]:
    """Within the block Ctrl-C comes in the pass after so many."""
    logits, left = Meter._logits, iter(range(n_passes))

    def stopped(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return logits(*args)

    with patch.object(Meter, "_logits", stopped):
        yield
