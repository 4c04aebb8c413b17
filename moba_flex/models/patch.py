"""Switching a model's attention to MoBA and back: `patch`, `unpatch`, `set_attention`, `full_attention`."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from ..config import UNSET, MobaConfig, given_settings, layer_indices
from ..core.messages import kind_of, shown
from ..core.validation import check_choice
from . import full_blocks
from .adapters import modules_with_save_hooks, save_adapters_alone, save_settings_with_adapters
from .by_name import settings_by_name
from .call_hooks import add_hooks, modules_with_hooks, remove_hooks
from .key_conv import check_key_conv, new_key_convs, remove_key_convs, set_key_convs
from .layers import (
    MOBA,
    attention_layers,
    attention_of,
    config_of_layer,
    configs_of,
    format_layers,
    full_layers,
    is_patched,
    is_replaceable,
    keeps_full,
    keeps_full_by_config,
    mask_use_of,
    n_layers,
    name_attention,
    original_implementation,
    resolve_layers,
)
from .recomputation import before_switch
from .state import Choice, choice_of, context_of, set_choice
from .upstream import MaskUse, holds_config, implementation_of, set_implementation

if TYPE_CHECKING:
    from .upstream import AttentionLayer

ATTENTION = (*MOBA, "full")
Model = TypeVar("Model", bound=nn.Module)
_BLOCKS_CHANGE = threading.RLock()  # held while a `full_attention` block is entered or left


def patch(
    model: Model,
    config: MobaConfig | Mapping[str, Any] | None = None,
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
    **unknown: NoReturn,
) -> Model:
    """Let a transformers model's full-attention layers use MoBA. The weights are neither changed nor moved.

    Args:
        model: a transformers model, or a module that contains one. Not a part of a model: saving the whole would lose the settings.
        config: the settings, a `MobaConfig` or a dict. None: the keywords; without any, the settings in `model.config.moba`, which loading
            a saved model restores, or else the defaults.
        block_size: tokens per block, at least 1.
        top_k: the number of blocks that a query reads, including its own block.
        sink_blocks: the number of blocks at the start of the sequence that are always among the `top_k`.
        recent_blocks: the number of blocks just before the query's own block that are always among the `top_k`.
        share_selection: whether the query heads of a key head choose together, by the sum of their scores.
        key_conv: the kernel size, 3 or 5, of a causal convolution over keys, for training; 0: none.
        full_attention_layers: the layers that keep full attention; negative indices count from the last layer.
        decode: what generated tokens read: "full", all keys; "sparse", only their `top_k` blocks.
        implementation: "flex", "triton", "eager", "naive" or "auto", see `moba_attention`.

    If some settings are given, the others have the defaults of `MobaConfig`: `block_size=4096, top_k=12`, and so on.

    Returns:
        The same model. Layers that are not full causal self-attention, such as sliding-window layers, are unchanged. The settings are
        stored in `model.config.moba` (in composite models, such as vision-language models, in the language model's configuration). The
        model gets its own copy of the configuration, because other models may share it. Patching again replaces the settings and undoes
        `set_attention`. A layer whose `key_conv` is then removed or has another size loses that module's weights.

    Raises:
        ValueError: a setting is out of range, no attention layer can be replaced, `full_attention_layers` has an index that does not exist,
            or a sharded or context-parallel model would get a `key_conv`. The model is left unchanged.
        TypeError: both `config` and keywords are given, or `model` is not a module.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import patch
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = patch(LlamaForCausalLM(tiny), block_size=16, top_k=2, full_attention_layers=[-1])
    >>> model.config.moba.full_attention_layers
    (-1,)
    """
    settings = given_settings(
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        key_conv=key_conv,
        full_attention_layers=full_attention_layers,
        decode=decode,
        implementation=implementation,
        **unknown,
    )
    every, replaceable = find_layers(model)
    if config is not None and settings:
        raise TypeError(f"config and settings exclude each other, but got both: config={shown(config)} and {', '.join(settings)}")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config must be a MobaConfig or a dict of its settings, but is {shown(config)}")
    if config is None and not settings:
        config = MobaConfig.of(replaceable[0].config)
        for layer in replaceable:
            check_key_conv(layer, config)
    elif not isinstance(config, MobaConfig):
        config = MobaConfig.from_dict(settings if config is None else config)
    full_layers(config, n_layers(replaceable[0]), model)  # raises if a layer does not exist
    choices = [_choice(layer, config) for layer in every]
    if new_key_convs(replaceable, config):
        _check_not_wrapped(model, config.key_conv)
    before_switch(model)
    set_key_convs(replaceable, config)
    if any(choice_of(layer) is None for layer in replaceable):
        _own_configs(model, replaceable)

    for layer, choice in zip(every, choices):
        set_choice(layer, choice)
    save_settings_with_adapters(model)
    add_hooks(model, every, _with_own_cache_layer(replaceable) if config.decode == "sparse" else [])
    for model_config in configs_of(replaceable):
        model_config.moba = config
        set_implementation(model_config, "moba")
    name_attention(every)
    return model


def _choice(layer: AttentionLayer, config: MobaConfig) -> Choice:
    used = implementation_of(layer.config)
    original = original_implementation(layer) if used in MOBA else used
    is_fixed = not is_replaceable(layer)
    return Choice(original, "full" if is_fixed else None, keeps_full_by_config(layer, config), is_fixed)


def _with_own_cache_layer(layers: list[AttentionLayer]) -> list[AttentionLayer]:
    """The layers that have a cache layer of their own: HRM runs stacks of layers several times, each time with another cache layer."""
    indices = Counter((id(layer.config), layer.layer_idx) for layer in layers)
    return [layer for layer in layers if indices[id(layer.config), layer.layer_idx] == 1]


def _check_not_wrapped(model: nn.Module, key_conv: int) -> None:
    """Raise ValueError if the model is wrapped: DDP would not average the gradients of new weights, and PEFT would not save them."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    for wrapper, advice in (("DistributedDataParallel", ""), ("PeftModel", ', and name them in modules_to_save=["key_conv"]')):
        if wrapper in names:
            raise ValueError(f"key_conv={key_conv} gives the model new weights, which must be there before {wrapper}: patch first{advice}")


def unpatch(model: Model) -> Model:
    """Undo `patch` and `set_attention`: restore the model's attention and remove the settings of MoBA from its configuration.

    A model that was loaded with `attn_implementation="moba"` gets the attention that transformers would have chosen. A model that is not
    patched is unchanged. Returns the same model.

    Raises ValueError if the model is context-parallel, see `moba_flex.distributed`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import patch, unpatch
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = unpatch(patch(LlamaForCausalLM(tiny), block_size=16, top_k=2))
    >>> hasattr(model.config, "moba")
    False
    """
    check_module(model)
    layers = attention_layers(model)
    if any(context_of(layer) is not None for layer in layers):
        raise ValueError(f"{type(model).__name__} is context-parallel, which it can only be with MoBA: call ContextParallel.remove() first")
    before_switch(model)
    ours = [layer for layer in layers if hasattr(layer.config, "moba") or implementation_of(layer.config) in MOBA]
    if any(choice_of(layer) is None for layer in ours):
        _own_configs(model, ours)
    original = {id(layer.config): original_implementation(layer) for layer in layers}
    # In a composite model that was loaded with "moba", the enclosing configurations have that name too.
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if isinstance(config, PreTrainedConfig) and implementation_of(config) in MOBA:
            set_implementation(config, original.get(id(config), next(iter(original.values()), None)))
        if hasattr(config, "moba"):
            del config.moba
    for layer in layers:
        set_choice(layer, None)
    remove_hooks(modules_with_hooks(model))
    save_adapters_alone(modules_with_save_hooks(model))
    remove_key_convs(layers)
    return model


def set_attention(model: Model, attention: str, layers: Iterable[int] | None = None) -> Model:
    """Change which attention a model's layers use. Possible at any time.

    Args:
        model: a transformers model. A model that is not patched is patched, with the settings in its configuration or else the defaults,
            unless `attention` is "full".
        attention: "full" (the original attention), "moba" or "moba_naive" (the dense reference implementation).
        layers: indices of the layers; negative ones count from the last. None: all that MoBA can replace; with "moba" and "moba_naive" the
            layers in `full_attention_layers` stay full.

    Returns:
        The same model.

    Raises:
        ValueError: no such attention, or a layer that MoBA cannot replace. The model is left unchanged.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import patch, set_attention
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = patch(LlamaForCausalLM(tiny), block_size=16, top_k=2)
    >>> model = set_attention(model, "full", layers=[-1])  # the last layer
    >>> model = set_attention(model, "moba")  # all layers again
    """
    check_choice("attention", attention, ATTENTION)
    every, replaceable = find_layers(model)
    chosen = replaceable
    if layers is not None:
        found = sorted({layer.layer_idx for layer in replaceable})
        wanted = resolve_layers("layers", layer_indices("layers", layers), n_layers(replaceable[0]), found, model)
        chosen = [layer for layer in replaceable if layer.layer_idx in wanted]
    before_switch(model)
    if not is_patched(replaceable):
        if attention == "full":
            return model
        patch(model)
        if layers is not None:  # the other layers keep their attention
            _use(replaceable, "full")
    elif any(choice_of(layer) is None for layer in replaceable):
        _adopt(model, replaceable)
    if layers is None and attention != "full":
        for config in configs_of(replaceable):
            set_implementation(config, attention)
        _use(chosen, None)
    else:
        _use(chosen, attention)
    name_attention(every)
    return model


@contextmanager
def full_attention(model: Model) -> Iterator[Model]:
    """Let all layers use full attention within a `with` block, and restore their attention afterwards, also after an exception.

    Layers that are switched within the block keep that change. Blocks may be nested or overlap, as those of several tasks do: layers use
    full attention until the last block is left. A model that does not use MoBA, such as one whose attention `set_attn_implementation` has
    changed, stays as it is.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import full_attention, patch
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = patch(LlamaForCausalLM(tiny), block_size=16, top_k=2)
    >>> with full_attention(model):
    ...     logits = model(torch.arange(32)[None]).logits
    """
    every, replaceable = find_layers(model)
    block = object()
    with _BLOCKS_CHANGE:
        if is_patched(replaceable):
            before_switch(model)
            if any(choice_of(layer) is None for layer in replaceable):
                _adopt(model, replaceable)
            full_blocks.enter(block, replaceable)
            name_attention(every)
    try:
        yield model
    finally:
        with _BLOCKS_CHANGE:
            if full_blocks.within(block, every):
                before_switch(model)
                full_blocks.leave(block, every)


def _adopt(model: nn.Module, replaceable: list[AttentionLayer]) -> None:
    """Patch a model that was loaded with "moba" or "moba_naive", keeping that name. It may share its configuration with another model."""
    named = implementation_of(replaceable[0].config)
    _own_configs(model, replaceable)
    for config in configs_of(replaceable):
        settings_by_name(config, MOBA)  # stores the settings in the config
    patch(model)
    for config in configs_of(replaceable):
        if implementation_of(config) in MOBA:
            set_implementation(config, named)


def moba_layers(model: nn.Module) -> dict[int, str]:
    """The attention of each layer that MoBA can replace, except those in `full_attention_layers`: "moba", "moba_naive" or "full".

    Raises ValueError if the model is not patched or MoBA can replace none of its layers.
    """
    _, replaceable = find_layers(model)
    if not is_patched(replaceable):
        raise ValueError(f"{type(model).__name__} is not patched: call moba_flex.patch(model, ...) first")
    now = {}
    for layer in replaceable:
        settings = MobaConfig.of(layer.config)
        if not keeps_full(layer, settings):
            now[layer.layer_idx] = attention_of(layer, settings)
    return now


def find_layers(model: nn.Module) -> tuple[list[AttentionLayer], list[AttentionLayer]]:
    """All attention layers that share a configuration with a replaceable one, and the replaceable ones.

    Raises ValueError if there is none, or if the code of such a layer depends on the attention name. Raises TypeError if `model` is not a
    module.
    """
    check_module(model)
    every = attention_layers(model)
    replaceable = [layer for layer in every if is_replaceable(layer)]
    if not replaceable:
        found = format_layers(sorted({layer.layer_idx for layer in every if getattr(layer, "layer_idx", None) is not None}))
        kinds = ", ".join(sorted({type(layer).__name__ for layer in every}))
        layers = (
            f"its attention layers: {found} ({kinds})" if every else "none of its modules asks transformers' registry for its attention"
        )
        raise ValueError(
            f"{type(model).__name__} has no layer that MoBA can replace, which must be full causal self-attention without a position bias: "
            f"{layers}{_windows(every)}"
        )
    shared = {id(layer.config) for layer in replaceable}
    every = [layer for layer in every if id(layer.config) in shared]
    if by_name := [layer for layer in every if mask_use_of(layer) is MaskUse.NAMES]:
        raise ValueError(
            f"{type(model).__name__} cannot use MoBA: the code of its {type(by_name[0]).__name__} depends on the name of the attention "
            "implementation, and would do something else under MoBA's"
        )
    return every, replaceable


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = ": moba_flex.AutoModelForCausalLM.from_pretrained loads one by its name" if isinstance(model, str) else ""
        raise TypeError(f"model must be a transformers model, but is {kind_of(model)}{hint}")


def _windows(layers: list[AttentionLayer]) -> str:
    """For the message: some models have a window that is longer than any of their inputs, and can be loaded without it."""
    windows = [window for layer in layers if isinstance(window := getattr(config_of_layer(layer), "sliding_window", None), int)]
    advice = f"; the configuration has a sliding_window of {max(windows, default=0)}: if no text gets that long, load the model with "
    return f"{advice}sliding_window=None" if windows else ""


def _own_configs(model: nn.Module, layers: list[AttentionLayer]) -> None:
    """Give a model its own copies of its layers' configurations and of those that contain them, which other models may share."""
    holders = [module for module in model.modules() if holds_config(module)]
    copies = {id(config): copy.copy(config) for config in configs_of(layers)}

    def own(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copies:
            parts = {name: own(part) for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
            changed = any(part is not getattr(config, name) for name, part in parts.items())
            copies[id(config)] = copy.copy(config) if changed else config
            if changed:
                vars(copies[id(config)]).update(parts)
        return copies[id(config)]

    for module in holders:
        module.config = own(module.config)


def _use(layers: list[AttentionLayer], attention: str | None) -> None:
    for layer in layers:
        set_choice(layer, Choice(original_implementation(layer), attention, keeps_full(layer, MobaConfig.of(layer.config))))
