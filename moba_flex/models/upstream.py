"""Private and undocumented API of transformers and its kin, each entry with the reason why it is used.

No other file of the package reaches for it. `tests/models/test_upstream.py` fails with a sentence that names the entry when transformers
changes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,  # builds the mask that a layer with full attention always had
    bidirectional_mask_function,  # tells encoders' requests
    causal_mask_function,  # tells plain causal requests from those of packed sequences and custom masks
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import find_adapter_config_file, is_peft_available

__all__ = [
    "DRAFTED_POSITIONS",
    "FULL_LAYER_TYPES",
    "GROWING_LAYERS",
    "MASK_REQUEST",
    "adapter_file",
    "attention_by_name",
    "bidirectional_mask_function",
    "cache_in",
    "causal_mask_function",
    "implementation_of",
    "is_offloaded",
    "looks_up_attention",
    "mask_builder",
    "model_class_of",
    "mtp_offset",
    "prefixes_of_peft",
    "reads_as_it_lies",
    "set_implementation",
    "supports_sdpa",
]

# Arguments with which `create_causal_mask` and its like call a mask function, beyond those that transformers documents.
MASK_REQUEST = ("q_offset", "kv_offset", "mask_function", "attention_mask", "allow_is_causal_skip", "use_vmap", "device")
# The argument of a model by which assisted generation asks for the logits of all positions that it drafted, and of one more.
DRAFTED_POSITIONS = "logits_to_keep"
# Entries of `config.layer_types` that mean full attention: "attention" before 5.18; "hybrid" layers have a state-space part beside it.
FULL_LAYER_TYPES = ("full_attention", "attention", "hybrid")
# Kinds of cache layers that only grow. The second is that of hybrid models, and is not in all versions.
GROWING_LAYERS: tuple[type[CacheLayerMixin], ...] = (
    DynamicLayer,
    getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", DynamicLayer),
)


def implementation_of(config: PreTrainedConfig) -> str | None:
    """The name under which layers look their attention up: no public attribute says it."""
    return config._attn_implementation


def set_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Set that name in one configuration and in no part of it: `set_attn_implementation` sets vision parts too."""
    config._attn_implementation = {"": name}


def looks_up_attention(layer_class: type) -> ModuleType | None:
    """The Python module of a class whose `forward` mentions transformers' registry: no list says which modules are attention layers."""
    for cls in layer_class.__mro__:
        forward = cls.__dict__.get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return sys.modules.get(cls.__module__)
    return None


def attention_by_name(source: ModuleType | None, implementation: str) -> Callable | None:
    """The function behind a name, as a layer of that source finds it: eager attention is the source's own, and in no registry."""
    registry = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager = getattr(source, "eager_attention_forward", None)
    return None if implementation == "eager" and eager is None else registry.get_interface(implementation, eager)


def mask_builder(implementation: str) -> Callable | None:
    """The function that builds an implementation's masks; None: transformers gives it none."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)


def supports_sdpa(source: ModuleType | None) -> bool:
    """Whether transformers would choose "sdpa" for the models of a source: it decides by a private attribute of their classes."""
    models = [m for m in vars(source).values() if inspect.isclass(m) and issubclass(m, PreTrainedModel)] if source else []
    models = [m for m in models if m is not PreTrainedModel]
    return bool(models) and all(m._supports_sdpa for m in models)


def cache_in(kwargs: dict) -> Cache | None:
    """The cache among the keyword arguments of a layer or a model: "cache" since transformers 5.24, "past_key_values" before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def reads_as_it_lies(cache: Cache, cache_layer: CacheLayerMixin, key: Tensor) -> bool:
    """Whether `key` is what a cache layer holds. A layer of an offloaded cache has moved its keys on by the time that it is asked."""
    return cache_layer.keys is key or cache.offloading


def mtp_offset(layer_idx: int) -> int:
    """The `kv_offset` of masks for a layer of multi-token prediction: its `MtpCache` counts positions ahead, and no argument says so.

    Such layers are built from the configuration of the model for which they draft, and belong to none that could be patched.
    """
    return layer_idx + 1


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate loads a module's weights with each call: it says so by an attribute alone."""
    return any(hasattr(module, "_hf_hook") for module in modules)


def model_class_of(config: PreTrainedConfig, auto_class: type) -> type[PreTrainedModel] | None:
    """The class that an auto class would build, which it does not tell."""
    return auto_class._model_mapping.get(type(config), None)


def adapter_file(name: str, where: dict) -> str | None:
    """The file of PEFT's adapter in a folder or repository, as transformers finds it, or None."""
    if not is_peft_available():
        return None
    return find_adapter_config_file(name, **{k: where[k] for k in ("cache_dir", "local_files_only", "token", "revision") if k in where})


def prefixes_of_peft(model: nn.Module) -> bool:
    """Whether a model is PEFT's, whose prompts only its own `forward` adds."""
    return getattr(model, "active_peft_config", None) is not None
