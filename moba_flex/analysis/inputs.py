"""Validation of what a model is run with: token ids, which it uses as indices, and its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.validation import check_values
from ..models.upstream import is_offloaded


def check_ids(call: str, name: str, ids: Tensor, model: nn.Module) -> None:
    """`ids` must have values, and each must be a token that the model has an embedding of."""
    check_values(call, **{name: ids})
    n = _n_tokens(model)
    least, most = int(ids.min()), int(ids.max())
    if n is not None and (least < 0 or most >= n):
        wrong = least if least < 0 else most
        raise ValueError(f"{name} must be token ids from 0 to {n - 1:,}, those of {type(model).__name__}, but has {wrong:,}")


def _n_tokens(model: nn.Module) -> int | None:
    """The number of embeddings of a model, or of the model in a wrapper; None if it does not say."""
    inner: Any = next((module for module in model.modules() if hasattr(module, "get_input_embeddings")), None)
    try:
        return getattr(None if inner is None else inner.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers' answer for models of another kind
        return None


def check_weights(model: nn.Module) -> None:
    """A model's weights must have values. Those that accelerate has offloaded are on the meta device between calls."""
    if not is_offloaded(model.modules()) and any(weight.is_meta for weight in model.parameters()):
        raise ValueError(f"{type(model).__name__} must have weights, but is on the meta device: load it on a CPU or GPU")
