"""Calls of a pass that repeat an earlier layer's call of the original attention.

The layers of a model are usually called alike. What is decided for the first of them then holds for the others, and deciding it again for
each layer takes as much of the host's time as launching the attention: with short prompts and generated tokens the GPU waits for the host.
Only the original attention is repeated, since all that it depends on is compared here.

A pass is its `MobaMask`, or in continuous batching its `PagedBatch`.

Nq queries, Nk keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..config import MobaConfig
from .call_hooks import CACHE_KEY, PASS_KEY
from .decision import LayerCall, LayerPath
from .layers import original_attention, original_implementation
from .masks import MobaMask
from .paged_cache import PAGED, PagedKeys
from .state import Choice, choice_of_plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .upstream import AttentionLayer

Output = tuple[Tensor, Tensor | None]  # [B, Nq, H, Dv], and no weights
Run = Callable[..., Output]  # (layer, query, key, value, arguments), which it may change

_VALUES = (bool, int, float, str)  # types whose equal values mean the same
_MISSING = object()
_PATHS = (LayerPath.FULL, LayerPath.DECODING_FULL, LayerPath.ALL_KEYS)


class OriginalCall(NamedTuple):
    """A layer's call of its original attention, and all that this was decided by."""

    run: Run
    layer_class: type
    config: PreTrainedConfig
    settings: MobaConfig
    choice: Choice
    named: str
    lengths: tuple[int, int]  # Nq, Nk
    kind: tuple[torch.device, torch.dtype]
    arguments: dict[str, Any]

    def is_repeated_by(self, layer: AttentionLayer, query: Tensor, key: Tensor, named: str, arguments: dict[str, Any]) -> bool:
        """Whether another layer's call in the same pass differs in nothing that the decision depends on."""
        choice = choice_of_plain(layer)
        return (
            choice is not None
            and type(layer) is self.layer_class
            and layer.config is self.config
            and (query.shape[2], key.shape[2]) == self.lengths
            and named == self.named
            and (query.device, query.dtype) == self.kind
            and choice == self.choice
            and _equal(arguments, self.arguments)
            and MobaConfig.of(layer.config) is self.settings
        )


def repeated(
    layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, mask: object, named: str, arguments: dict[str, Any]
) -> Run | None:
    """What an earlier layer of the pass ran, if this call repeats its call. `arguments` are all keyword arguments that the layer passes."""
    if torch.compiler.is_compiling():
        return None
    keys: PagedKeys | None = arguments.get(PAGED)
    if keys is not None:
        known = keys.batch.original_call if keys.are_all_of(key, value) else None
    else:
        known = mask.original_call if isinstance(mask, MobaMask) else None
    return known.run if known is not None and known.is_repeated_by(layer, query, key, named, arguments) else None


def remember(call: LayerCall, path: LayerPath, named: str, arguments: dict[str, Any]) -> None:
    """Note a call that took `path`, without attention weights, for the later layers of its pass; not if there are block means to update."""
    mask = call.mask
    if path not in _PATHS or not isinstance(mask, MobaMask) or CACHE_KEY in arguments:
        return
    if (attention := _repeatable_attention(call, arguments)) is None:
        return
    built = mask.original("sdpa", call.query.device)

    def run(layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Output:
        return attention(layer, query, key, value, built, **arguments)

    mask.original_call = _original_call(run, call, named, arguments)


def remember_paged(call: LayerCall, keys: PagedKeys, named: str, arguments: dict[str, Any]) -> None:
    """`remember` for continuous batching: if all tokens of the pass read all their keys."""
    batch, is_full = keys.batch, call.attention == "full"
    part = batch.whole if is_full else batch.parts(call.settings, call.naive, keys.means is not None).full
    if keys.window != 1 or part is None or not part.is_whole or (attention := _repeatable_attention(call, arguments)) is None:
        return
    built = part.mask(part.n_key, keys.window, call.query.dtype)

    def run(layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Output:
        keys: PagedKeys = arguments.pop(PAGED)
        arguments.pop(CACHE_KEY, None)
        if keys.means is not None and not is_full:
            keys.means.update_means(keys)
        return attention(layer, query, *keys.of(part), built, **{**arguments, "is_causal": False})

    batch.original_call = _original_call(run, call, named, arguments)


def _repeatable_attention(call: LayerCall, arguments: dict[str, Any]) -> Callable[..., Output] | None:
    """The original attention of a layer, or None if its calls are not to be repeated.

    With gradients checkpoints may run layers again after a switch. Functions other than "sdpa" may return weights or read their own name.
    """
    with_gradients = PASS_KEY in arguments or (isinstance(call.mask, MobaMask) and call.mask.call.this_pass is not None)
    if with_gradients or torch.compiler.is_compiling() or call.settings.key_conv or choice_of_plain(call.layer) is None:
        return None
    implementation = original_implementation(call.layer)
    return original_attention(call.layer, implementation) if implementation == "sdpa" else None


def _original_call(run: Run, call: LayerCall, named: str, arguments: dict[str, Any]) -> OriginalCall:
    layer, query, choice = call.layer, call.query, choice_of_plain(call.layer)
    assert choice is not None  # a call with repeatable attention
    lengths, kind = (query.shape[2], call.key.shape[2]), (query.device, query.dtype)
    arguments = {**arguments, PAGED: None}  # keep no tensors of the layer
    return OriginalCall(run, type(layer), layer.config, call.settings, choice, named, lengths, kind, arguments)


def _equal(arguments: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether two calls pass the same arguments, apart from paged keys: the same objects, or equal numbers and names."""
    if len(arguments) + (PAGED not in arguments) != len(known):
        return False
    for name, value in arguments.items():
        other = known.get(name, _MISSING)
        if value is not other and name != PAGED and not (type(value) is type(other) and type(value) in _VALUES and value == other):
            return False
    return True
