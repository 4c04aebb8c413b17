"""`moba_flex.AutoModelForCausalLM`: loading and patching in one call."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel

from ..config import MobaConfig
from ..core.validation import check_choice
from .key_conv import KeyConv, set_key_convs
from .patch import ATTENTION, find_layers, patch, set_attention
from .upstream import adapter_file, model_class_of

# The arguments that say where a model's files are.
_WHERE = (
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code", "code_revision"),
    "gguf_file",
)


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` with one more argument, `attn`."""

    @classmethod
    def from_pretrained(cls, name: str, *args, attn: str = "moba", **kwargs) -> PreTrainedModel:
        """Load a causal language model and let it use MoBA.

        Args:
            name: a name on the hub or a local folder, of a model or of PEFT's adapter to one.
            attn: "moba", "moba_naive" (the dense specification) or "full". Settings that were saved with the model
                apply, else those of `MobaConfig()`; `patch` replaces them.
            args, kwargs: as for `transformers.AutoModelForCausalLM.from_pretrained`. `attn_implementation` is what
                layers with full attention use.

        Raises:
            ValueError: there is no such `attn`, or the model has no layer that MoBA can replace.

        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from moba_flex import AutoModelForCausalLM, patch
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> folder = tempfile.mkdtemp()
        >>> patch(LlamaForCausalLM(tiny), block_size=16, top_k=2).save_pretrained(folder)
        >>> AutoModelForCausalLM.from_pretrained(folder).config.moba.block_size
        16
        """
        _check(attn)
        loader = transformers.AutoModelForCausalLM
        config = kwargs.get("config")
        if not isinstance(config, transformers.PreTrainedConfig):  # or the place of one
            config = _saved_config(name if config is None else config, kwargs)
        original = None
        if config is not None and _settings(config).key_conv:
            original = model_class_of(config, loader)
            loader = loader if original is None else _with_key_convs(original)  # which says what it does not know
        loaded = loader.from_pretrained(name, *args, **kwargs)
        model, *more = loaded if isinstance(loaded, tuple) else (loaded,)  # with `output_loading_info=True`
        if original is not None:
            model.__class__ = original
        model = _use(model, attn)
        return (model, *more) if more else model

    @classmethod
    def from_config(cls, config: transformers.PreTrainedConfig, attn: str = "moba", **kwargs) -> PreTrainedModel:
        """The same for a new model with random weights."""
        _check(attn)
        model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
        settings = _settings(model.config)
        return _use(patch(model, settings) if settings.key_conv else model, attn)


def _check(attn: str) -> None:
    check_choice("attn", attn, ATTENTION)


def _saved_config(name: str, kwargs: dict) -> transformers.PreTrainedConfig | None:
    """The configuration of the model, or of the one that an adapter is to; None for what is not there: the loader then says why."""
    where = {k: kwargs[k] for k in _WHERE if k in kwargs}
    with suppress(OSError, ValueError):
        return transformers.AutoConfig.from_pretrained(name, **where)
    with suppress(OSError, ValueError):
        if base := _base_of_adapter(name, where):
            return transformers.AutoConfig.from_pretrained(base, **where)
    return None


def _base_of_adapter(name: str, where: dict) -> str | None:
    """The name of the model that PEFT's adapter is to, as transformers finds it."""
    file = adapter_file(name, where)
    return file and json.loads(Path(file).read_text()).get("base_model_name_or_path")


def _settings(config: transformers.PreTrainedConfig) -> MobaConfig:
    """Those saved with a model; of a model of several parts they lie in its language model's configuration."""
    return MobaConfig.of(config.get_text_config(decoder=True))


def _use(model: PreTrainedModel, attn: str) -> PreTrainedModel:
    if attn == "full" and not _settings(model.config).key_conv:
        return model
    return set_attention(patch(model), attn)


def _with_key_convs(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of models that have their convolutions of keys before their weights are read."""

    class WithKeyConvs(original):
        def __init__(self, config: transformers.PreTrainedConfig, *args, **kwargs) -> None:
            super().__init__(config, *args, **kwargs)
            _, replaceable = find_layers(self)
            set_key_convs(replaceable, MobaConfig.of(replaceable[0].config))

        def _init_weights(self, module: nn.Module) -> None:  # of what the files do not hold
            if isinstance(module, KeyConv):
                nn.init.zeros_(module.weight)
            else:
                super()._init_weights(module)

    WithKeyConvs.__name__ = original.__name__
    return WithKeyConvs
