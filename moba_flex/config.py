"""The settings of a model's MoBA layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch

from .core import validation
from .core.messages import shown

DECODING = ("full", "sparse")
KERNEL_SIZES = (0, 3, 5)
MOST_LAYERS = 100_000  # maximum that can be named, so that an endless iterator is rejected


@dataclass(frozen=True, repr=False)
class MobaConfig(dict[str, Any]):
    """How a model's full-attention layers use MoBA. `moba_flex.patch` accepts it in place of keywords.

    It is stored in the configuration of the patched model, `model.config.moba`. It is a read-only dict of its own fields,
    so that transformers writes it to `config.json` and reads it back like any other entry. Its repr shows `block_size`, `top_k`
    and the settings that differ from the defaults.

    Args:
        block_size: tokens per block, at least 1.
        top_k: number of blocks that a query reads, its own block included.
        sink_blocks: number of blocks at the start of the sequence that are always among the `top_k`.
        recent_blocks: number of blocks just before the own block that are always among the `top_k`.
        share_selection: whether the query heads of a key head choose blocks together, by the sum of their scores.
        key_conv: kernel size, 3 or 5, of a causal convolution over keys, for training (FlashMoBA, arXiv 2511.11571); 0 means none.
        full_attention_layers: the layers that keep full attention; negative numbers count from the last.
        decode: what generated tokens read: "full", all keys, as in the report; "sparse", only their `top_k` blocks.
        implementation: "flex", "triton", "eager", "naive" or "auto", see `moba_flex.moba_attention`.

    `key_conv` adds a depthwise convolution over keys that helps the gate. Its weights are saved with the model and start as zeros, which
    leave keys unchanged; `moba_flex.AutoModelForCausalLM` loads such a model. The report keeps full attention in the last three layers
    (section 2.2, layer-wise hybrid). Except with "eager" and "naive", a prompt of at most `top_k` blocks uses the attention that the
    model had before.

    Raises:
        ValueError: a setting is invalid; the message says which, what it was and what it must be.

    >>> from moba_flex import MobaConfig
    >>> MobaConfig(block_size=128, top_k=8, full_attention_layers=[-1])["full_attention_layers"]
    [-1]
    """

    block_size: int = 4096
    top_k: int = 12
    sink_blocks: int = 0
    recent_blocks: int = 0
    share_selection: bool = False
    key_conv: int = 0
    full_attention_layers: tuple[int, ...] = ()
    decode: str = "full"
    implementation: str = "auto"

    def __post_init__(self) -> None:
        validation.check_blocks(self.block_size, self.top_k, self.sink_blocks, self.recent_blocks, share_selection=self.share_selection)
        _check_choice("key_conv", self.key_conv, KERNEL_SIZES)
        _check_choice("decode", self.decode, DECODING)
        _check_choice("implementation", self.implementation, validation.IMPLEMENTATIONS)
        layers = layer_indices("full_attention_layers", self.full_attention_layers)
        object.__setattr__(self, "full_attention_layers", layers)
        super().__init__({**vars(self), "full_attention_layers": list(layers)})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of JSON values."""
        return dict(self)

    def __repr__(self) -> str:
        shown_ones = {"block_size": self.block_size, "top_k": self.top_k, **changed_settings(self)}
        return f"MobaConfig({', '.join(f'{name}={value!r}' for name, value in shown_ones.items())})"

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MobaConfig:
        """The inverse of `to_dict`. Missing settings have their defaults.

        Raises ValueError for an unknown name, and for invalid values, as the class itself does.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings of MoBA must be a dict of them by name, as in config.json, but are {shown(settings)}")
        _check_names(settings)
        return cls(**settings)

    @classmethod
    def of(cls, config: object) -> MobaConfig:
        """The settings in a model's configuration, or the defaults if it has none.

        A plain dict, as read from `config.json`, is replaced by a `MobaConfig`.
        """
        settings = getattr(config, "moba", None)
        if settings is None:
            return DEFAULT
        if not isinstance(settings, cls):
            settings = cls.from_dict(settings)
            setattr(config, "moba", settings)  # noqa: B010  the static type has no such attribute
        return settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_dict, (self.to_dict(),)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a MobaConfig cannot be changed: make a new one and patch the model with it")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = clear = popitem = _refuse


SETTINGS = tuple(field.name for field in fields(MobaConfig))


def _check_names(settings: Mapping[str, Any]) -> None:
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(f"{shown(name)} is no setting of MoBA: there are {', '.join(SETTINGS)}")


def _from_dict(settings: dict[str, Any]) -> MobaConfig:
    return MobaConfig.from_dict(settings)


# `torch.load(weights_only=True)`, the default, calls only allowlisted functions: a checkpoint may contain `model.config.to_dict()`.
torch.serialization.add_safe_globals([_from_dict])


def layer_indices(name: str, layers: object) -> tuple[int, ...]:
    """`layers` as a tuple of ints. Raises ValueError, which names the argument `name`, for anything but an iterable of ints."""
    listed: tuple[Any, ...] | None = None
    if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes, Mapping, torch.Tensor)) and getattr(layers, "ndim", 1) != 0:
        listed = tuple(itertools.islice(layers, MOST_LAYERS + 1))
    if listed is None or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed):
        hint = f": write ({layers},)" if isinstance(layers, int) and abs(layers) < MOST_LAYERS and not isinstance(layers, bool) else ""
        raise ValueError(f"{name} must be a list or tuple of ints, but is {shown(layers)}{hint}")
    if len(listed) > MOST_LAYERS:
        raise ValueError(f"{name} must have at most {MOST_LAYERS} entries, but is {shown(layers)}")
    return listed


def changed_settings(settings: MobaConfig) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def given_settings(**settings: object) -> dict[str, Any]:
    """The keywords that were given, even with None."""
    return {name: value for name, value in settings.items() if value is not UNSET}


class _Unset:
    """The default of keywords for which None is a valid value."""

    def __repr__(self) -> str:
        return "(not given)"


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if type(value) not in (int, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, but is {shown(value)}")


DEFAULT = MobaConfig()
UNSET: Any = _Unset()
