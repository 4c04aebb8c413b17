"""Which attention each layer of a model uses now, and why: `describe`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import MobaConfig, changed_settings
from ..core.validation import check_count
from ..models.by_name import settings_to_come
from ..models.layers import MOBA, attention_layers, attention_of, check_served, is_replaceable, keeps_full, window_of_layer
from ..models.patch import check_module, find_layers
from ..models.sizes import without_effect
from ..models.state import choice_of, context_of
from ..models.upstream import FULL_LAYER_TYPES, implementation_of
from .explain import share_of_keys
from .tables import runs, table

if TYPE_CHECKING:
    from ..models.upstream import AttentionLayer

_CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder", re.IGNORECASE)


@dataclass(frozen=True)
class LayerDescription:
    """Which attention one layer uses now; an element of `Description.layers`.

    Attributes:
        index: the layer's index in its stack, None if it has none.
        name: the attention module's path in the model.
        attention: "moba", "moba_naive", "full", or the layer's own kind: "sliding window", "chunked", "cross", "bidirectional"; "none" if a
            call raises an error.
        reason: why it uses that attention.
        block_size: tokens per block; None for layers without MoBA, as are the next two.
        top_k: the number of blocks that a query reads, including its own block.
        decode: what generated tokens read: "full", all keys; "sparse", their `top_k` blocks.
        share_of_keys: in a prompt of `Description.length` tokens, the keys that all queries read, divided by the keys that they see, 0 to
            1; None without a length, and for layers with their own kind of attention.
        sparse: whether any query of that prompt reads fewer keys than it sees; None in the same cases.
    """

    index: int | None
    name: str
    attention: str
    reason: str
    block_size: int | None = None
    top_k: int | None = None
    decode: str | None = None
    share_of_keys: float | None = None
    sparse: bool | None = None


@dataclass(frozen=True, repr=False)
class Description:
    """Which attention the layers of a model use now; returned by `describe`. Printed as a table in which equal layers share a line.

    Attributes:
        model: the name of the model's class.
        layers: one `LayerDescription` for each attention layer that uses transformers' registry, in the model's order.
        length: the number of tokens that `share_of_keys` and `sparse` refer to, or None.
        notes: sentences about the whole model: other settings, settings without effect, why it cannot use MoBA.
    """

    model: str
    layers: tuple[LayerDescription, ...]
    length: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values. `pandas.DataFrame(description.to_dict()["layers"])` has one row per layer."""
        layers = [asdict(layer) for layer in self.layers]
        return {"model": self.model, "length": self.length, "layers": layers, "notes": list(self.notes)}

    def __repr__(self) -> str:
        n_moba = sum(layer.attention in MOBA for layer in self.layers)
        of = f"{len(self.layers)} attention layer{'s' * (len(self.layers) != 1)}"
        lines = [f"{self.model}: {of}, {n_moba or 'none'} with MoBA"]
        if self.layers:
            lines += table(self._columns(), self._rows())
        return "\n".join([*lines, *self.notes])

    def _columns(self) -> list[str]:
        read = [] if self.length is None else [f"keys read of {self.length:,}"]
        where = ["module"] if self._n_stacks() > 1 else []
        return ["layers", *where, "attention", "block size", "top-k", "decode", *read, "why"]

    def _rows(self) -> list[list[str]]:
        groups: dict[tuple[str, ...], list[int]] = {}
        for layer in self.layers:
            where = [_stack(layer.name)] if self._n_stacks() > 1 else []
            read = [] if self.length is None else [_percent(layer.share_of_keys)]
            blocks = (_number(layer.block_size), _number(layer.top_k), layer.decode or "")
            row = (*where, layer.attention, *blocks, *read, layer.reason)
            groups.setdefault(row, []).extend([] if layer.index is None else [layer.index])
        return [[runs(indices) or "-", *row] for row, indices in groups.items()]

    def _n_stacks(self) -> int:
        return len({_stack(layer.name) for layer in self.layers})


def describe(model: nn.Module, length: int | None = None) -> Description:
    """Report which attention each layer of a model uses now, and why. Computes and changes nothing.

    Args:
        model: a transformers model, patched or not, loaded by name, or wrapped (PEFT, DistributedDataParallel).
        length: a number of tokens. The description then says which share of the keys a prompt of that length reads, and whether MoBA has an
            effect on it.

    Returns:
        A `Description`: print it, or use its `layers` and `to_dict()`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `length` is not an int of at least 1.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import describe, patch
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
    >>> model = patch(LlamaForCausalLM(tiny), block_size=64, top_k=3, full_attention_layers=[-1])
    >>> print(describe(model, length=1024))
    LlamaForCausalLM: 4 attention layers, 3 with MoBA
    layers  attention  block size  top-k  decode  keys read of 1,024  why
    0-2     moba       64          3      full    29.0%               configured
    3       full                                  100.0%              full_attention_layers
    >>> describe(model).layers[3].reason
    'full_attention_layers'
    """
    check_module(model)
    if length is not None:
        check_count("length", length, 1)
    try:
        find_layers(model)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    names = {id(module): name for name, module in model.named_modules()}
    every = attention_layers(model)
    layers = tuple(_describe(layer, names[id(layer)], length, refusal) for layer in every)
    return Description(type(model).__name__, layers, length, tuple(_notes(every, layers, length, refusal)))


def _describe(layer: AttentionLayer, name: str, length: int | None, refusal: str | None) -> LayerDescription:
    attention, reason, settings = _used(layer, name, refusal)
    if context_of(layer) is not None:
        reason += ", context-parallel"
    share = sparse = None
    if length is not None and attention == "full":
        share, sparse = 1.0, False
    elif length is not None and settings is not None:
        share = share_of_keys(length, length, settings.block_size, settings.top_k)
        sparse = length > settings.block_size * settings.top_k
    index = _index(layer, name)
    if settings is None:
        return LayerDescription(index, name, attention, reason, share_of_keys=share, sparse=sparse)
    return LayerDescription(index, name, attention, reason, settings.block_size, settings.top_k, settings.decode, share, sparse)


def _used(layer: AttentionLayer, name: str, refusal: str | None) -> tuple[str, str, MobaConfig | None]:
    """A layer's attention, the reason, and the settings if it is MoBA."""
    if not is_replaceable(layer):
        return *_own_kind(layer, name), None
    config, choice = layer.config, choice_of(layer)
    named = implementation_of(config)
    if choice is None and named not in MOBA:
        saved = getattr(config, "moba", None) is not None
        why = "not patched; settings of MoBA are in its configuration" if saved else "not patched"
        return "full", why if refusal is None else "MoBA cannot replace it", None
    try:
        settings = MobaConfig.of(config) if choice is not None else settings_to_come(config, MOBA)
        if choice is None:
            check_served(layer)
    except ValueError as error:
        return "none", f"raises an error when it is called: {error}", None
    attention = attention_of(layer, settings)
    if choice is not None and choice.attention is not None and not (keeps_full(layer, settings) and attention == "full"):
        return attention, "set_attention or MobaSchedule", settings if attention in MOBA else None
    if attention not in MOBA:
        kept = keeps_full(layer, settings)
        return "full", "full_attention_layers" if kept else f'its configuration names "{attention}"', None
    if choice is not None:
        return attention, "configured", settings
    source = "saved settings" if getattr(config, "moba", None) is not None else "no saved settings"
    return attention, f'loaded with attn_implementation="{named}", {source}', settings


def _own_kind(layer: AttentionLayer, name: str) -> tuple[str, str]:
    """The kind of attention of a layer that MoBA cannot replace, and the reason."""
    if getattr(layer, "is_cross_attention", False) or _CROSS.search(name.rpartition(".")[2]):
        return "cross", "it reads the keys of others"
    if not getattr(layer, "is_causal", True):
        return "bidirectional", "it is not causal"
    index, types = getattr(layer, "layer_idx", None), getattr(layer.config, "layer_types", None)
    if types is not None and index is not None and index < len(types) and types[index] not in FULL_LAYER_TYPES:
        kind = {"sliding_attention": "sliding window", "chunked_attention": "chunked"}.get(types[index], types[index].replace("_", " "))
        return kind, "layer_types"
    window = window_of_layer(layer)
    if window is not None:
        return "sliding window", f"sliding_window={window}"
    return "full", "MoBA cannot replace it"


def _notes(every: Iterable[AttentionLayer], layers: Sequence[LayerDescription], length: int | None, refusal: str | None) -> list[str]:
    notes = []
    if refusal is not None:
        notes.append(refusal)
    used: dict[str, MobaConfig] = {}
    for module, layer in zip(every, layers):
        if layer.attention in MOBA:
            settings = settings_to_come(module.config, MOBA)
            used.setdefault(str(settings), settings)
    for settings in used.values():
        other = [f"{name}={value!r}" for name, value in changed_settings(settings).items() if name not in _IN_TABLE]
        if other:
            notes.append(f"other settings: {', '.join(other)}")
        if length is not None and length <= settings.block_size * settings.top_k:
            notes.append(without_effect(length, settings))
    return notes


_IN_TABLE = ("block_size", "top_k", "decode", "full_attention_layers")


def _index(layer: AttentionLayer, name: str) -> int | None:
    index = getattr(layer, "layer_idx", None)
    if isinstance(index, int):
        return index
    numbers = re.findall(r"\.(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else None


def _stack(name: str) -> str:
    """A module's path with * for numbers: "model.layers.*.self_attn"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
