"""Hooks that pass extra information to attention functions: the cache, the number of drafts, the mask given to the layer's own code.

Those of layers add keyword arguments, which reach the attention function unchanged. Those of models record what the call says, which the
masks of the call carry. They store nothing on the model, except that a model whose `forward` has no `logits_to_keep` gets a
`prepare_inputs_for_generation` that returns it: transformers then says how many tokens are drafts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .current_call import ModelCall, begin_call, end_call, forget_ended, outer_call
from .layers import (
    MOBA,
    accepts_kwargs,
    attention_layers,
    is_replaceable,
    mask_argument_index,
    mask_use_of,
    original_implementation,
    takes_any_keyword,
)
from .masks import MobaMask, raise_switched
from .recomputation import ForwardPass, check_not_switched
from .state import call_hooks_of, set_call_hooks
from .upstream import (
    DRAFTED_POSITIONS,
    MaskUse,
    attention_by_name,
    cache_in,
    complete_inputs,
    completes_inputs,
    implementation_of,
    leave_inputs,
)

if TYPE_CHECKING:
    from .upstream import AttentionLayer

T = TypeVar("T")
_Changed = tuple[tuple[Any, ...], dict[str, Any]] | None  # a call's new arguments; None: unchanged
_Hook = Callable[..., _Changed]

# Keyword arguments that hooks add and the attention function removes.
CACHE_KEY, MASK_KEY, PASS_KEY = "moba_cache", "moba_mask", "moba_pass"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")


def pass_cache(layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed:
    """Forward pre-hook of attention layers: pass the cache to the attention function of MoBA."""
    cache = cache_in(kwargs) if implementation_of(layer.config) in MOBA else None
    return (args, {**kwargs, CACHE_KEY: cache}) if cache is not None else None


def pass_mask(layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed:
    """Forward pre-hook of attention layers whose code inspects the mask.

    The layer gets the mask that it would have without MoBA. If `forward` takes extra keyword arguments, the attention function gets both
    masks and the cache.
    """
    place = mask_argument_index(type(layer))
    mask = args[place] if len(args) > place else kwargs.get("attention_mask")
    if implementation_of(layer.config) not in MOBA:
        if isinstance(mask, MobaMask):
            raise_switched(type(layer).__name__)
        return None
    more: dict[str, Any] = {CACHE_KEY: cache_in(kwargs)} if accepts_kwargs(type(layer)) else {}
    if not isinstance(mask, MobaMask):
        return args, {**kwargs, **more}
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    original = mask.original(original_implementation(layer), next(tensors).device)
    if len(args) > place:
        args = (*args[:place], original, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "attention_mask": original}
    if more:
        more[MASK_KEY] = HandedMask(original, mask)
    return args, {**kwargs, **more}


@dataclass(frozen=True)
class HandedMask:
    """The mask that a layer was given in place of the model's mask."""

    given: object
    of_model: MobaMask

    def restore(self, mask: T) -> T | MobaMask:
        """The model's mask, unless the layer has replaced the one that it was given."""
        return self.of_model if mask is self.given else mask


def enter_stack(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed:
    """`enter_model` for models that call attention layers themselves.

    With gradients the call also has a `ForwardPass`. If all layers use full attention, there are no masks of MoBA, and it is passed as an
    argument. Under full attention a mask that was built for MoBA is replaced.
    """
    this_pass = None
    if not torch.compiler.is_compiling():
        check_not_switched(model)
        if torch.is_grad_enabled():
            this_pass = ForwardPass()
    args, kwargs = _enter(model, args, {**kwargs, **(whole := _whole(model, args, kwargs))}, bool(whole), this_pass)
    if this_pass is not None and accepts_kwargs(type(model)) and _passes_on(implementation_of(model.config)):
        kwargs[PASS_KEY] = this_pass
    return args, kwargs


def _passes_on(implementation: str) -> bool:
    """Whether the function behind a name takes more arguments than it names. The original one of a user may not: it then gets no
    `ForwardPass`, and recomputation by MoBA after a switch is an error.
    """
    attention = attention_by_name(None, implementation)  # None for "eager": each model has its own, which takes more
    return attention is None or takes_any_keyword(attention)


def enter_model(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed:
    """Forward pre-hook of models: record what only the model's call says, such as the number of drafts, see `current_call.py`."""
    whole = {} if getattr(model.config, "is_encoder_decoder", False) else _whole(model, args, kwargs)  # the mask would be the encoder's
    return _enter(model, args, {**kwargs, **whole}, bool(whole), None)


def leave_model(model: PreTrainedModel, _args: tuple[Any, ...], _out: Any) -> None:
    """Forward hook of models: undo `enter_model`. It is also called if `forward` raises."""
    end_call(model)


def _enter(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], all_real: bool, this_pass: ForwardPass | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Begin a call with these arguments, which are a copy. What an inner model's call does not say is what the outer model's call says."""
    forget_ended()
    outer, drafts, weights = outer_call(model), _drafts(model, kwargs), kwargs.get("output_attentions")
    packed = kwargs.get(_PACKED[0]), kwargs.get(_PACKED[1])
    call = ModelCall(
        outer.drafts if drafts is None else drafts,
        outer.packed if packed[0] is None else packed,
        outer.all_real or all_real,
        this_pass,
        outer.wants_weights if weights is None else bool(weights),
    )
    if completes_inputs(model):  # `forward` does not take the argument
        kwargs.pop(DRAFTED_POSITIONS, None)
    kwargs.update(_masks_made_before(model, kwargs, call))
    begin_call(model, call)
    return args, kwargs


def _masks_made_before(model: PreTrainedModel, kwargs: dict[str, Any], call: ModelCall) -> dict[str, Any]:
    """The masks of a call that were made for MoBA before it: with what the call says, or those of the original attention if all layers use
    full attention.
    """

    def of_call(mask: object) -> object:
        if not isinstance(mask, MobaMask):
            return mask
        # The mask is that of the language model, which in a model of several parts has a configuration of its own.
        name = implementation_of(model.config if mask.config is None else mask.config)
        return mask.of_call(call) if name in MOBA else mask.original(name, model.device)

    masks = kwargs.get("attention_mask")
    if isinstance(masks, MobaMask):
        return {"attention_mask": of_call(masks)}
    if isinstance(masks, dict) and any(isinstance(mask, MobaMask) for mask in masks.values()):  # one mask per layer type
        return {"attention_mask": {kind: of_call(mask) for kind, mask in masks.items()}}
    return {}


def _drafts(model: PreTrainedModel, kwargs: dict[str, Any]) -> int | None:
    """How many of the last tokens are drafts; None: the call does not say.

    Assisted and prompt-lookup generation verify n drafted tokens by asking for the logits of the last n + 1 positions. Drafts may share a
    call with a prompt; only this number tells them apart.
    """
    keep = kwargs.get(DRAFTED_POSITIONS)
    if not isinstance(keep, int):
        return None
    trains = model.training and torch.is_grad_enabled()  # PEFT's prefix tuning trains prefixes as a cache
    return 0 if trains or cache_in(kwargs) is None else max(keep - 1, 0)


def _whole(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """In a compiled graph: declare each row one sequence without padding, if the call passes neither a mask nor positions.

    Without a cache, transformers searches for packed sequences in the positions that it created itself, and in a graph it cannot see that
    there are none. A mask of ones prevents the search.
    """
    if not torch.compiler.is_compiling() or len(args) > 1:
        return {}
    given = [cache_in(kwargs), *(kwargs.get(name) for name in ("attention_mask", "position_ids", *_PACKED))]
    if any(x is not None for x in given):
        return {}
    use_cache = kwargs.get("use_cache")
    if getattr(model.config, "use_cache", True) if use_cache is None else use_cache:
        return {}
    tokens = kwargs.get("inputs_embeds")
    tokens = (args[0] if args else kwargs.get("input_ids")) if tokens is None else tokens
    if tokens is None:
        return {}
    return {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}


def add_hooks(model: nn.Module, layers: list[AttentionLayer], with_cache: list[AttentionLayer]) -> None:
    """Register hooks on a model and on its attention layers that inspect their mask or need the cache. Existing hooks stay."""
    wanted: list[tuple[nn.Module, _Hook]] = [(layer, pass_mask) for layer in layers if mask_use_of(layer) is not MaskUse.NOTHING]
    wanted += [(layer, pass_cache) for layer in with_cache]
    for module, hook in wanted:
        if call_hooks_of(module) is None and (hook is pass_mask or accepts_kwargs(type(module))):
            set_call_hooks(module, (module.register_forward_pre_hook(hook, with_kwargs=True),))
    for part, hook in _of_models(model):
        if call_hooks_of(part) is None:
            before = part.register_forward_pre_hook(hook, with_kwargs=True)
            set_call_hooks(part, (before, part.register_forward_hook(leave_model, always_call=True)))
            if part.can_generate() and not _takes(part, DRAFTED_POSITIONS):
                complete_inputs(part)


def _of_models(model: nn.Module) -> list[tuple[PreTrainedModel, _Hook]]:
    """The models that a call goes through, with their hooks: those with a head, and the stacks of layers, which may be called alone."""
    return [*((part, enter_model) for part in heads_of(model)), *((part, enter_stack) for part in stacks_of(model))]


def stacks_of(model: nn.Module) -> list[PreTrainedModel]:
    """The models within a model that call replaceable attention layers themselves."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and _is_stack(part)]


def heads_of(model: nn.Module) -> list[PreTrainedModel]:
    """The models within a model that have a head and call a stack of replaceable layers."""
    stacks = set(stacks_of(model))
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part not in stacks]
    heads = [part for part in parts if _takes(part, DRAFTED_POSITIONS) or part.can_generate()]
    return [part for part in heads if not stacks.isdisjoint(part.modules())]


def _is_stack(model: PreTrainedModel) -> bool:
    """Whether a model calls replaceable attention layers itself, not through another model, and takes a mask for them."""
    if not _takes(model, "attention_mask") or not any(is_replaceable(layer) for layer in attention_layers(model)):
        return False
    return not any(
        isinstance(part, PreTrainedModel)
        and part is not model
        and attention_layers(part)
        and any(map(is_replaceable, attention_layers(part)))
        for part in model.modules()
    )


def modules_with_hooks(model: nn.Module) -> set[nn.Module]:
    """The modules that have a hook of `add_hooks`."""
    return {module for module in model.modules() if call_hooks_of(module) is not None}


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    """Undo `add_hooks` for these modules, see `modules_with_hooks`."""
    for module in modules:
        for handle in call_hooks_of(module) or ():
            handle.remove()
        set_call_hooks(module, None)
        leave_inputs(module)


def _takes(module: nn.Module, name: str) -> bool:
    """Whether a module's `forward` has an argument of this name."""
    return name in inspect.signature(module.forward).parameters
