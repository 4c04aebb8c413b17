"""What `pretrain.py` trains with: Muon for the matrices of the layers, AdamW for everything else.

Muon (Keller Jordan, 2024) makes the momentum of a matrix orthogonal before it adds it, with as large an update as AdamW's (Moonlight,
arXiv 2502.16982), so that both take the same learning rate and weight decay. Small models learn in it to copy from what they read before
in far fewer tokens.
"""

from __future__ import annotations

import torch
from torch import nn


class MuonAndAdamW:
    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        matrices = {name for name, x in model.named_parameters() if x.ndim == 2 and "key_conv" not in name}
        of_layers = {name for name in matrices if ".layers." in name}

        def named(names: set[str]) -> list[nn.Parameter]:
            return [x for name, x in model.named_parameters() if name in names]

        others = {name for name, _ in model.named_parameters()} - matrices  # norms and convolutions of keys: no weight decay
        groups = [
            {"params": named(matrices - of_layers), "weight_decay": weight_decay},
            {"params": named(others), "weight_decay": 0.0},
        ]
        self._optimizers = [
            torch.optim.Muon(named(of_layers), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True),
        ]

    def step(self, learning_rate: float) -> None:
        """Change the model's weights by their gradients, and forget these."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
