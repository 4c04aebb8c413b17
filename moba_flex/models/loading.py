"""`moba_flex.AutoModelForCausalLM`: loading and patching in one call."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..config import DEFAULT, SETTINGS, UNSET, MobaConfig, given_settings
from ..core.messages import kind_of, shown
from ..core.validation import check_choice
from .adapters import SETTINGS_FILE, settings_beside_adapter
from .key_conv import KeyConv, set_key_convs
from .layers import full_layers, n_layers_of
from .patch import ATTENTION, find_layers, patch, set_attention
from .upstream import adapter_file, model_class_of, zero_unless_read

# The arguments that say where a model's files are.
_WHERE = (
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code", "code_revision"),
    "gguf_file",
)


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` with two kinds of extra arguments: `attn`, and the settings of MoBA."""

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *args: Any,
        attn: str = "moba",
        block_size: int = UNSET,
        top_k: int = UNSET,
        sink_blocks: int = UNSET,
        recent_blocks: int = UNSET,
        share_selection: bool = UNSET,
        key_conv: int = UNSET,
        full_attention_layers: Iterable[int] = UNSET,
        decode: str = UNSET,
        implementation: str = UNSET,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a causal language model and let it use MoBA.

        Args:
            name: a hub name or a local folder, of a model or of a PEFT adapter.
            attn: "moba", "moba_naive" (the dense reference implementation) or "full".
            block_size, top_k, ...: the settings, as for `patch`. If some are given, the others have their defaults. If none is given, the
                settings saved with the adapter or the model apply, or else the defaults.
            args, kwargs: as for `transformers.AutoModelForCausalLM.from_pretrained`. Layers with full attention use `attn_implementation`.

        Returns:
            The patched model. With `attn="full"` the model as transformers loads it, unless it was saved with a `key_conv`.

        Raises:
            ValueError: there is no such `attn`, a setting is out of range or is given with `attn="full"`, or the model has no layer that
                MoBA can replace. Only the last is found after loading.
            TypeError: `config` is a `MobaConfig`, `name` is not a name, or neither transformers nor MoBA knows an argument.

        Warns:
            UserWarning: an adapter has no saved settings, its model has none either, and none are given: the defaults apply.

        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from moba_flex import AutoModelForCausalLM, patch
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> folder = tempfile.mkdtemp()
        >>> patch(LlamaForCausalLM(tiny), block_size=16, top_k=2).save_pretrained(folder)
        >>> AutoModelForCausalLM.from_pretrained(folder).config.moba
        MobaConfig(block_size=16, top_k=2)
        >>> AutoModelForCausalLM.from_pretrained(folder, attn="moba", block_size=8, top_k=3).config.moba
        MobaConfig(block_size=8, top_k=3)
        """
        given = _checked(
            attn,
            block_size=block_size,
            top_k=top_k,
            sink_blocks=sink_blocks,
            recent_blocks=recent_blocks,
            share_selection=share_selection,
            key_conv=key_conv,
            full_attention_layers=full_attention_layers,
            decode=decode,
            implementation=implementation,
        )
        if not isinstance(name, (str, Path)):
            raise TypeError(f"name must be a name on the hub or a local folder, but is {shown(name)}")
        loader: type[transformers.AutoModelForCausalLM | PreTrainedModel] = transformers.AutoModelForCausalLM
        config = kwargs.get("config")
        if isinstance(config, MobaConfig):
            raise TypeError(f"config must be the model's configuration, but is {shown(config)}: give its settings by name, **config")
        if not isinstance(config, transformers.PreTrainedConfig):  # or the path of one
            config = _saved_config(name if config is None else config, kwargs)
        settings = given or _settings_of_adapter(name, attn, config, kwargs)
        model_class = None if config is None else model_class_of(config, transformers.AutoModelForCausalLM)
        _check_layers(given, config, model_class)
        original = None
        if config is not None and (settings or _settings(config)).key_conv:
            original = model_class
            loader = loader if original is None else _with_key_convs(original, settings)  # the loader raises the error for an unknown class
        with _unknown_arguments_named():
            loaded = loader.from_pretrained(name, *args, **kwargs)
        model, *more = loaded if isinstance(loaded, tuple) else (loaded,)  # a tuple with `output_loading_info=True`
        if original is not None:
            model.__class__ = original
        model = _use(model, attn, settings)
        return (model, *more) if more else model  # type: ignore[return-value]  # the pair, which transformers' own type leaves out too

    @classmethod
    def from_config(
        cls,
        config: transformers.PreTrainedConfig,
        attn: str = "moba",
        *,
        block_size: int = UNSET,
        top_k: int = UNSET,
        sink_blocks: int = UNSET,
        recent_blocks: int = UNSET,
        share_selection: bool = UNSET,
        key_conv: int = UNSET,
        full_attention_layers: Iterable[int] = UNSET,
        decode: str = UNSET,
        implementation: str = UNSET,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build a new model with random weights and let it use MoBA.

        Args:
            config: the model's configuration.
            attn: "moba", "moba_naive" (the dense reference implementation) or "full".
            block_size, top_k, ...: the settings, as for `from_pretrained`.
            kwargs: as for `transformers.AutoModelForCausalLM.from_config`.

        Raises:
            ValueError: as `from_pretrained`, or `config` is not of a causal language model.
            TypeError: `config` is not a configuration of transformers, or neither it nor MoBA knows an argument.
        """
        given = _checked(
            attn,
            block_size=block_size,
            top_k=top_k,
            sink_blocks=sink_blocks,
            recent_blocks=recent_blocks,
            share_selection=share_selection,
            key_conv=key_conv,
            full_attention_layers=full_attention_layers,
            decode=decode,
            implementation=implementation,
        )
        loader = transformers.AutoModelForCausalLM
        if not isinstance(config, transformers.PreTrainedConfig):
            raise TypeError(f"config must be a configuration of transformers, but is {shown(config)}")
        model_class = model_class_of(config, loader)
        if model_class is None and not hasattr(config, "auto_map"):  # custom code that comes with the model
            raise ValueError(
                f"config must be of a causal language model, but is {kind_of(config)}, for which transformers' {loader.__name__} "
                "knows no class"
            )
        _check_layers(given, config, model_class)
        with _unknown_arguments_named():
            model = loader.from_config(config, **kwargs)
        settings = given or _settings(model.config)
        return _use(patch(model, settings) if settings.key_conv else model, attn, given)


@contextmanager
def _unknown_arguments_named() -> Iterator[None]:
    """Says which settings MoBA has where transformers does not know an argument, which may be a mistyped one."""
    try:
        yield
    except TypeError as error:
        if (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        raise TypeError(
            f"{found[1]!r} is neither an argument that transformers takes for this model nor a setting of MoBA: those are "
            f"{', '.join(SETTINGS)}"
        ) from error


def _checked(attn: str, **settings: object) -> MobaConfig | None:
    """The given settings; None if there are none."""
    check_choice("attn", attn, ATTENTION)
    given = given_settings(**settings)
    if given and attn == "full":
        names = ", ".join(given)
        raise ValueError(f'attn="full" loads without MoBA, but has settings of it ({names}): use attn="moba", or leave them out')
    return MobaConfig.from_dict(given) if given else None


def _check_layers(given: MobaConfig | None, config: transformers.PreTrainedConfig | None, model_class: type | None) -> None:
    """Raise ValueError, before anything is loaded, if `full_attention_layers` names a layer that does not exist."""
    if given is not None and config is not None and model_class is not None:
        full_layers(given, n_layers_of(config.get_text_config(decoder=True)), model_class)


def _saved_config(name: str, kwargs: dict[str, Any]) -> transformers.PreTrainedConfig | None:
    """The configuration of the model or of the adapter's base model; None if there is none, for which the loader raises the error."""
    where = _where(kwargs)
    with suppress(OSError, ValueError):
        return transformers.AutoConfig.from_pretrained(name, **where)
    with suppress(OSError, ValueError):
        if base := _base_of_adapter(name, where):
            return transformers.AutoConfig.from_pretrained(base, **where)
    return None


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: kwargs[k] for k in _WHERE if k in kwargs}


def _base_of_adapter(name: str, where: dict[str, Any]) -> str | None:
    """The name of the base model of a PEFT adapter, as transformers finds it."""
    file = adapter_file(name, where)
    return file and json.loads(Path(file).read_text()).get("base_model_name_or_path")


def _settings_of_adapter(name: str, attn: str, config: transformers.PreTrainedConfig | None, kwargs: dict[str, Any]) -> MobaConfig | None:
    """The settings saved with an adapter; None for models. Warns if neither the adapter nor its model has settings."""
    where, file = _where(kwargs), None
    with suppress(OSError, ValueError):  # loading the adapter raises the error
        file = adapter_file(name, where)
    if file is None:
        return None
    settings = settings_beside_adapter(name, where)
    if attn == "full":
        return settings if settings is not None and settings.key_conv else None
    if settings is None and getattr(config and config.get_text_config(decoder=True), "moba", None) is None:
        warnings.warn(
            f"the adapter {shown(str(name))} has no {SETTINGS_FILE} with the settings of MoBA that it was trained with, so the defaults "
            f"apply, {DEFAULT}: give them, from_pretrained(..., block_size=..., top_k=...)",
            stacklevel=3,
        )
    return settings


def _settings(config: transformers.PreTrainedConfig) -> MobaConfig:
    """The settings saved with a model; a composite model has them in its language model's configuration."""
    return MobaConfig.of(config.get_text_config(decoder=True))


def _use(model: PreTrainedModel, attn: str, settings: MobaConfig | None) -> PreTrainedModel:
    if attn == "full" and not (settings or _settings(model.config)).key_conv:
        return model
    return set_attention(patch(model, settings), attn)


def _with_key_convs(original: type[PreTrainedModel], settings: MobaConfig | None) -> type[PreTrainedModel]:
    """A model class that creates its key convolutions before the weights are read."""

    class WithKeyConvs(original):  # type: ignore[misc, valid-type]  # the class is known only at run time
        def __init__(self, config: transformers.PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _, replaceable = find_layers(self)
            set_key_convs(replaceable, settings or MobaConfig.of(replaceable[0].config))

        def initialize_weights(self) -> None:  # for weights that no file holds; an `_init_weights` would be that of one inner model only
            super().initialize_weights()
            for module in self.modules():
                if isinstance(module, KeyConv):
                    zero_unless_read(module.weight)

    WithKeyConvs.__name__ = original.__name__
    return WithKeyConvs
