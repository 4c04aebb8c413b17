"""`moba_flex.AutoModelForCausalLM`: loading and patching in one call."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel

from .patch import ATTENTION, patch, set_attention


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` with one more argument, `attn`."""

    @classmethod
    def from_pretrained(cls, name: str, *args, attn: str = "moba", **kwargs) -> PreTrainedModel:
        """Load a causal language model and let it use MoBA.

        Args:
            name: a name on the hub or a local folder.
            attn: "moba", "moba_naive" (the dense specification) or "full". Settings that were saved with the model
                apply, else those of `MobaConfig()`; `patch` replaces them.
            args, kwargs: as for `transformers.AutoModelForCausalLM.from_pretrained`. `attn_implementation` is what
                layers with full attention use.

        Raises:
            ValueError: there is no such `attn`, or the model has no layer that MoBA can replace.
        """
        _check(attn)
        return _use(transformers.AutoModelForCausalLM.from_pretrained(name, *args, **kwargs), attn)

    @classmethod
    def from_config(cls, config: transformers.PreTrainedConfig, attn: str = "moba", **kwargs) -> PreTrainedModel:
        """The same for a new model with random weights."""
        _check(attn)
        return _use(transformers.AutoModelForCausalLM.from_config(config, **kwargs), attn)


def _check(attn: str) -> None:
    if attn not in ATTENTION:
        raise ValueError(f"attn must be one of {', '.join(ATTENTION)}, but is {attn!r}")


def _use(model: PreTrainedModel, attn: str) -> PreTrainedModel:
    return model if attn == "full" else set_attention(patch(model), attn)
