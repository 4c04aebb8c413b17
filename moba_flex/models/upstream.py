"""Private and undocumented API of transformers, PEFT and accelerate, each entry with the reason for its use.

No other file of the package uses such API. `tests/models/test_transformers_api.py` fails with a sentence that names the entry when a
library changes it.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils, initialization
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedLayer
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching import utils as paged_utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache  # layers of continuous batching are called with it
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager  # starts continuous batching
from transformers.generation.continuous_batching.requests import RequestState  # the state of a request
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,  # builds the original masks of layers with full attention
    bidirectional_mask_function,  # identifies requests of encoders
    causal_mask_function,  # tells plain causal requests from packed sequences and custom masks
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

    class Configured(nn.Module):
        """A module with a configuration. For type checkers any attribute of an `nn.Module` is a tensor or a module."""

        config: PreTrainedConfig

    class AttentionLayer(Configured):
        """An attention layer of transformers: these have no common base class."""

        layer_idx: int  # of those that MoBA can replace
        k_proj: nn.Module  # of most
        key_conv: nn.Module  # of layers to which `key_conv.py` has added one


__all__ = [
    "ADAPTER_SAVER",
    "BATCHES_CONTINUOUSLY",
    "DECODER_LAYER",
    "DRAFTED_POSITIONS",
    "FULL_LAYER_TYPES",
    "GROWING_LAYERS",
    "MASK_REQUEST",
    "PAGED_CALL",
    "ContinuousBatchingManager",
    "MaskUse",
    "PagedAttentionCache",
    "RequestState",
    "adapter_configs_of",
    "adapter_file",
    "attention_by_name",
    "bidirectional_mask_function",
    "cache_argument",
    "cache_in",
    "causal_mask_function",
    "complete_inputs",
    "completes_inputs",
    "file_of_repository",
    "fill_paged_mask",
    "global_value",
    "holds_config",
    "implementation_of",
    "is_cached_tensor",
    "is_offloaded",
    "is_peft_model",
    "leave_inputs",
    "looks_up_attention",
    "mask_builder",
    "mask_use",
    "model_class_of",
    "mtp_offset",
    "pages_of_full_attention",
    "pages_of_layer",
    "passes_to_attention",
    "prompt_length",
    "quantized_keys",
    "saving_module",
    "set_implementation",
    "skip_forward",
    "supports_sdpa",
    "unsuited_options",
    "use_manager",
    "window_of",
    "zero_unless_read",
]

# Undocumented arguments with which `create_causal_mask` and similar functions call a mask function.
MASK_REQUEST = ("q_offset", "kv_offset", "mask_function", "attention_mask", "allow_is_causal_skip", "use_vmap", "device")
# The model argument with which assisted generation asks for the logits of all drafted positions and one more.
DRAFTED_POSITIONS = "logits_to_keep"
# Values of `config.layer_types` that mean full attention: "attention" before 5.18; "hybrid" layers also have a state-space part.
FULL_LAYER_TYPES = ("full_attention", "attention", "hybrid")
# The base class of all decoder layers, whose single output is the next one's input. No list names these modules.
DECODER_LAYER = GradientCheckpointingLayer
# The method of PEFT's `PeftConfig` that writes `adapter_config.json`. PEFT models call it after `state_dict`.
ADAPTER_SAVER = "save_pretrained"
# Cache layer classes that only grow. The second is for hybrid models, and does not exist in all versions.
GROWING_LAYERS: tuple[type[CacheLayerMixin], ...] = (
    DynamicLayer,
    getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", DynamicLayer),
)


class _CompletedInputs:
    """A model's `prepare_inputs_for_generation` that also returns `DRAFTED_POSITIONS`.

    Only if it is among a model's inputs does assisted generation set it to the number of drafted tokens and one. Models whose `forward`
    lacks the argument do not return it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return _CompletedInputs, (self._model(),)  # a copied or unpickled model gets its own

    @property
    def _original(self) -> Callable[..., dict[str, Any]]:
        model: Any = self._model()
        return type(model).prepare_inputs_for_generation.__get__(model)

    @property
    def __signature__(self) -> inspect.Signature:  # `generate` checks its arguments by it
        return inspect.signature(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {DRAFTED_POSITIONS: 1, **self._original(*args, **kwargs)}


def complete_inputs(model: PreTrainedModel) -> None:
    """Let a model's `prepare_inputs_for_generation` return `DRAFTED_POSITIONS`, which a hook must then take out of the call."""
    model.__dict__["prepare_inputs_for_generation"] = _CompletedInputs(model)


def completes_inputs(model: nn.Module) -> bool:
    """Whether `complete_inputs` was called for a model."""
    return isinstance(model.__dict__.get("prepare_inputs_for_generation"), _CompletedInputs)


def leave_inputs(model: nn.Module) -> None:
    """Undo `complete_inputs`."""
    if completes_inputs(model):
        del model.__dict__["prepare_inputs_for_generation"]


def implementation_of(config: PreTrainedConfig) -> str:
    """The name under which layers look up their attention. No public attribute has it; building a model sets it."""
    return config._attn_implementation


def set_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Set that name in one configuration, but not in its sub-configurations: `set_attn_implementation` also sets vision parts."""
    config._attn_implementation = {"": name}


def global_value(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a configuration, or None. Plain access raises RuntimeError if layers differ in it, as in Gemma 4's `head_dim`."""
    return config._getattr_without_heterogeneous_validation(name, None)


def holds_config(module: nn.Module) -> TypeGuard[Configured]:
    """Whether a module has its own configuration. Wrappers such as PEFT's expose the inner model's as if it were theirs."""
    return isinstance(module.__dict__.get("config"), PreTrainedConfig)


def looks_up_attention(layer_class: type) -> ModuleType | None:
    """The Python module of the class whose `forward` uses transformers' attention registry. No list names the attention layers."""
    for cls in layer_class.__mro__:
        forward = cls.__dict__.get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return sys.modules.get(cls.__module__)
    return None


class MaskUse(Enum):
    """What the code of an attention layer does with its mask, besides passing it to the attention function."""

    NOTHING = 0
    LOOKS = 1  # it tests whether there is a mask, or its class
    CHANGES = 2  # it reads values, or builds another mask
    NAMES = 3  # it reads the implementation's name, which is MoBA's as long as any layer uses MoBA


# Code that runs only if the layer has a true attribute of this name: GPT-2's own attention with upcasting.
OPTIONAL_CODE = {"reorder_and_upcast_attn": "_upcast_and_reordered_attn"}


def mask_use(layer_class: type) -> MaskUse:
    """What the `forward` of a layer does with its mask, determined from its source: layers do not declare it."""
    tree = _forward_tree(layer_class)
    uses = [] if tree is None else [_use_of(node, tree) for node in ast.walk(tree)]
    return max(uses, key=lambda use: use.value, default=MaskUse.NOTHING)


def passes_to_attention(layer_class: type) -> frozenset[str]:
    """The names of the arguments that a layer's `forward` passes to its attention function as keywords."""
    tree = _forward_tree(layer_class)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    return frozenset(
        word.arg for call in calls if ast.unparse(call.func).endswith("attention_interface") for word in call.keywords if word.arg
    )


def _forward_tree(layer_class: type) -> ast.AST | None:
    for cls in layer_class.__mro__:
        if "forward" in cls.__dict__:
            try:
                return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.__dict__["forward"]))))
            except (OSError, TypeError, SyntaxError):
                return None
    return None


def _use_of(node: ast.AST, tree: ast.AST) -> MaskUse:
    """What one expression does with the mask, or with the implementation's name."""
    children = [child.value if isinstance(child, ast.keyword) else child for child in ast.iter_child_nodes(node)]
    inside = [child.id for child in children if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load)]
    if isinstance(node, ast.Compare) and "_attn_implementation" in ast.unparse(node):
        optional = any(f"self.{name}" in ast.unparse(tree) for name in OPTIONAL_CODE)
        return MaskUse.NOTHING if optional else MaskUse.NAMES
    if "attention_mask" not in inside:
        return MaskUse.NOTHING
    if isinstance(node, ast.Compare):
        plain = all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
        return MaskUse.LOOKS if plain else MaskUse.CHANGES
    if isinstance(node, (ast.BoolOp, ast.If)) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"):
        return MaskUse.LOOKS
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        handed_on = name.endswith("attention_interface") or name.removeprefix("self.") in OPTIONAL_CODE.values()
        return MaskUse.NOTHING if handed_on else MaskUse.CHANGES
    return MaskUse.CHANGES if isinstance(node, (ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp)) else MaskUse.NOTHING


@contextmanager
def skip_forward(layers: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Within the block the layers return `output` and compute nothing.

    No hook can skip a module's `forward`. PyTorch looks it up on the instance before the class; accelerate also sets an instance attribute.
    """
    with ExitStack() as stack:
        for layer in layers:
            before = {name: x for name, x in layer.__dict__.items() if name == "forward"}
            layer.__dict__["forward"] = lambda *args, **kwargs: output
            stack.callback(layer.__dict__.update, before)
            stack.callback(layer.__dict__.pop, "forward")
        yield


def attention_by_name(source: ModuleType | None, implementation: str) -> Callable[..., Any] | None:
    """The function behind a name, as a layer of that source finds it: eager attention is defined in the source, not in the registry."""
    registry = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager = getattr(source, "eager_attention_forward", None)
    if implementation == "eager" and eager is None:
        return None
    return registry.get_interface(implementation, eager)  # type: ignore[arg-type]  # the default may be None only for "eager"


def mask_builder(implementation: str) -> Callable[..., Any] | None:
    """The function that builds an implementation's masks; None: transformers builds none for it."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)


def supports_sdpa(source: ModuleType | None) -> bool:
    """Whether transformers would choose "sdpa" for the models of a source, which depends on a private attribute of their classes."""
    models = [m for m in vars(source).values() if inspect.isclass(m) and issubclass(m, PreTrainedModel)] if source else []
    models = [m for m in models if m is not PreTrainedModel]
    return bool(models) and all(m._supports_sdpa for m in models)


def cache_in(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the keyword arguments of a layer or a model: "cache" since transformers 5.24, "past_key_values" before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def cache_argument(model: nn.Module) -> str:
    """The name of the cache argument of a model's `forward`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def quantized_keys(layer: QuantizedLayer) -> object | None:
    """An object that identifies the older keys of a quantized cache layer until it quantizes again; None: the next keys will differ.

    The layer quantizes the first keys at once, and later whenever `residual_length` new keys have accumulated. The call that quantizes
    returns the unquantized keys.
    """
    as_they_were = layer.keys is None or layer.keys.numel() == 0
    return None if as_they_were or getattr(layer, "_pending_beam_idx", None) is not None else layer._quantized_keys


def is_cached_tensor(cache: Cache, cache_layer: CacheLayerMixin, key: Tensor) -> bool:
    """Whether `key` is the tensor that a cache layer holds. Assumed for offloaded caches, whose layers may have moved their keys."""
    return cache_layer.keys is key or cache.offloading


def mtp_offset(layer_idx: int) -> int:
    """The `kv_offset` of masks for a multi-token prediction layer: its `MtpCache` counts positions ahead, and no argument says so.

    These layers are built from the configuration of the model for which they draft. They belong to no model that could be patched.
    """
    return layer_idx + 1


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate loads a module's weights on each call, which only a private attribute says."""
    return any(hasattr(module, "_hf_hook") for module in modules)


def zero_unless_read(weight: nn.Parameter) -> None:
    """Zero a weight that `from_pretrained` found in no file. Weights that it found have a private mark, which `initialization` respects.

    To be called from `PreTrainedModel.initialize_weights`, which is undocumented.
    """
    initialization.zeros_(weight)


def model_class_of(config: PreTrainedConfig, auto_class: type[AutoModelForCausalLM]) -> type[PreTrainedModel] | None:
    """The class that an auto class would build, which is not public."""
    found = auto_class._model_mapping.get(type(config), None)
    return found if isinstance(found, type) else None  # some tasks have a tuple of classes


def adapter_file(name: str, where: dict[str, Any]) -> str | None:
    """The file of a PEFT adapter in a folder or repository, as transformers finds it, or None."""
    if not is_peft_available():
        return None
    return find_adapter_config_file(name, **_place(where))


def file_of_repository(name: str, file: str, where: dict[str, Any]) -> str | None:
    """A file of a folder or repository, or None. Only private arguments of `cached_file` turn off errors, which loading raises anyway."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(name, file, **_place(where), **quiet)


def _place(where: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {k: where[k] for k in names if where.get(k) is not None}


def adapter_configs_of(module: nn.Module) -> list[Any]:
    """The `PeftConfig` of each adapter of a model. PEFT stores them on the wrapped model, undocumented."""
    configs = module.__dict__.get("peft_config") or module.__dict__.get("_peft_config")  # the second: of prefix tuning, on PEFT's own model
    return list(configs.values()) if isinstance(configs, dict) else []


def saving_module() -> nn.Module | None:
    """The model whose `save_pretrained` saves an adapter's configuration with the calling function: PEFT does not say whose it is."""
    frame = sys._getframe(1).f_back
    saver = None if frame is None else frame.f_locals.get("self")
    return saver if isinstance(saver, nn.Module) else None


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is a PEFT model: only its own `forward` adds the virtual tokens of prompt and prefix tuning."""
    return getattr(model, "active_peft_config", None) is not None


# Whether layers, not attention functions, read the cache of continuous batching: since transformers 5.24.
BATCHES_CONTINUOUSLY = Version(transformers.__version__).release >= (5, 24)
# An argument that only calls of continuous batching pass to the attention function.
PAGED_CALL = "write_index"


def use_manager(manager: type[ContinuousBatchingManager]) -> None:
    """Let `generate_batch` and similar methods use this class. They take it from their module; no argument selects another."""
    continuous_api.ContinuousBatchingManager = manager  # type: ignore[misc]


def unsuited_options(config: ContinuousBatchingConfig) -> list[str]:
    """The enabled options under which batches are padded, or prepared before the preceding one has finished."""
    wanted = {"use_cuda_graph": any(config.cuda_graph_booleans), "use_async_batching": config.use_async_batching}
    compiled = {name: getattr(config, name) is not None for name in ("varlen_compile_config", "decode_compile_config")}
    return [name for name, in_force in {**wanted, **compiled}.items() if in_force]


def prompt_length(state: RequestState) -> int:
    """The length of a request's prompt. A request that lost its pages restarts with its generated tokens appended to the prompt."""
    return state._true_initial_tokens or len(state.initial_tokens)


def pages_of_full_attention(cache: PagedAttentionCache) -> FullAttentionCacheAllocator:
    """The allocator of pages for layers with full attention, which is only an entry of a dict."""
    return cast("FullAttentionCacheAllocator", cache.cache_allocators["full_attention"])


def pages_of_layer(cache: PagedAttentionCache, layer_idx: int) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer as tokens, `[slots, G, D]`. The public method returns whole pages, in views of fewer tokens."""
    return cast("FullAttentionCacheAllocator", cache.layer_to_allocator[layer_idx])._kv_token_views[layer_idx]


def window_of(cache: PagedAttentionCache, layer_idx: int) -> int:
    """The number of tokens that a layer sees; 1: all, as in `fill_paged_mask`."""
    return getattr(cache.layer_to_allocator[layer_idx], "sliding_window", 1)


def fill_paged_mask(mask: Tensor, cu_seqlens_q: list[int], cu_seqlens_k: list[int], window: int) -> None:
    """Fill the mask that "sdpa" and "eager" add to scores in continuous batching; a window of 1 means none."""
    paged_utils.build_attention_mask(mask, cu_seqlens_q, cu_seqlens_k, window)
