"""The optimizers of `pretrain.py`: Muon for the layers' matrices, AdamW for everything else.

Muon (Keller Jordan, 2024) orthogonalises the momentum of a matrix before it adds it. Here the update is scaled to the size of AdamW's
(Moonlight, arXiv 2502.16982), so that both use the same learning rate and weight decay. With it small models learn to copy from earlier
text in far fewer tokens.

L matrices of A rows and B columns.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Keller Jordan's


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, for all matrices of a shape at once. The original launches some 30 kernels
    per matrix, which takes a small model as long as its gradients.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same = defaultdict(list)
            for x in group["params"]:
                same[x.shape].append(x)
            for shape, matrices in same.items():
                self._step(matrices, group["lr"] * 0.2 * max(shape) ** 0.5, 1 - group["lr"] * group["weight_decay"])

    def _step(self, matrices: list[nn.Parameter], rate: float, decay: float) -> None:
        grads = [x.grad for x in matrices]
        for x in matrices:
            if not self.state[x]:
                self.state[x]["momentum_buffer"] = torch.zeros_like(x)
        momenta = [self.state[x]["momentum_buffer"] for x in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        updates = orthogonal(torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM)))
        torch._foreach_mul_(matrices, decay)
        torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype)), alpha=-rate)


def orthogonal(x: Tensor) -> Tensor:
    """`[L, A, B]`: each matrix with singular values near one, by Newton-Schulz iteration in bfloat16."""
    a, b, c = COEFFICIENTS
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class MuonAndAdamW:
    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        matrices = {name for name, x in model.named_parameters() if x.ndim == 2 and "key_conv" not in name}
        of_layers = {name for name in matrices if ".layers." in name}

        def named(names: set[str]) -> list[nn.Parameter]:
            return [x for name, x in model.named_parameters() if name in names]

        others = {name for name, _ in model.named_parameters()} - matrices  # norms and key convolutions: no weight decay
        groups = [
            {"params": named(matrices - of_layers), "weight_decay": weight_decay},
            {"params": named(others), "weight_decay": 0.0},
        ]
        self._optimizers = [
            Muon(named(of_layers), learning_rate, weight_decay),
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True),
        ]

    def step(self, learning_rate: float) -> None:
        """Update the model's weights with their gradients, and clear these."""
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
