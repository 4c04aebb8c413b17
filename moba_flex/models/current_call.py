"""What the call of a model says about its tokens, for the masks that are made during the call.

Not all models pass extra keyword arguments down to their attention layers, but all pass the mask. Hooks on the models, see `call_hooks.py`,
record here what a call says; each `MobaMask` takes it from here when it is made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor, nn

from .recomputation import ForwardPass


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of a model."""

    drafts: int = 0  # how many of the last tokens are drafts, which may share the call with a prompt
    packed: tuple[Tensor | None, Tensor | None] = (None, None)  # `cu_seq_lens_q` and `cu_seq_lens_k`
    all_real: bool = False  # the mask of the call was added by a hook: no token is padding
    this_pass: ForwardPass | None = None  # with gradients, outside of graphs

    def is_plain(self) -> bool:
        """Whether the call says nothing that a mask made before it would have to know."""
        return not self.drafts and self.packed[0] is None and self.this_pass is None


PLAIN = ModelCall()


@dataclass(frozen=True, eq=False)
class _Running:
    """A model that is being called."""

    model: nn.Module
    call: ModelCall


class _OfThread(threading.local):
    def __init__(self) -> None:
        # Calls are nested: a model with a head calls its stack of layers. A list, since torch.compile loses attributes that it sets here.
        self.running: list[_Running] = []


_HERE = _OfThread()


def current_call() -> ModelCall:
    """The innermost call of a patched model in this thread."""
    return _HERE.running[-1].call if _HERE.running else PLAIN


def begin_call(model: nn.Module, call: ModelCall) -> None:
    """To be called before a model's `forward`."""
    _HERE.running.append(_Running(model, call))


def end_call(model: nn.Module) -> None:
    """To be called after a model's `forward`, also if it raises; also if `begin_call` was not reached."""
    if _HERE.running and _HERE.running[-1].model is model:
        _HERE.running.pop()


def forget_interrupted(model: nn.Module) -> None:
    """Forget calls that a KeyboardInterrupt has ended, after which no hook runs: a model that is called again was not left."""
    if any(running.model is model for running in _HERE.running):
        _HERE.running.clear()
