"""Block means beside a key cache, and how an attention layer comes by them.

transformers does not show the cache to attention functions. For sparse decoding `patch` gives each layer a hook that passes the cache on
among the keyword arguments, which reach the attention function untouched: nothing is remembered on the model.

The means lie on the cache layer itself, whose class is extended so that whatever moves keys moves their means too. Three things make
means that are out of date impossible to miss: every `update` is noted, and two in a row without an attention that took the new keys
in between (another model, full attention for a while) mean that all are computed again; so does a key tensor that is not the one last
seen (somebody else replaced it); and so do other settings or other padding.

B rows, G key heads, N tokens, C blocks, D head dimension.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from ..config import MobaConfig
from ..core.upstream import mark_static_address
from ..ops.decoding import mean_dtype, means_for, write_means
from .layers import MOBA, attention_layers, mask_place, mask_use_of, original_implementation, takes_moba, takes_more
from .masks import MobaMask, raise_switched
from .state import call_hook_of, means_beside, put_means, set_call_hook
from .upstream import DRAFTED_POSITIONS, MaskUse, cache_in, implementation_of, reads_as_it_lies

# Keyword arguments that hooks add and the attention function takes out.
CACHE, DRAFTS, WHOLE, MASK, PASS = "moba_cache", "moba_drafts", "moba_whole", "moba_mask", "moba_pass"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")


def pass_cache(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of attention layers: the attention function gets the cache."""
    cache = cache_in(kwargs)
    return (args, {**kwargs, CACHE: cache}) if cache is not None else None


def pass_mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of attention layers whose code looks at its mask: it gets the one that it had before MoBA, and the attention
    function both. The cache too."""
    place = mask_place(type(layer))
    mask = args[place] if len(args) > place else kwargs.get("attention_mask")
    more = {CACHE: cache_in(kwargs)} if takes_more(type(layer)) else {}
    if not isinstance(mask, MobaMask):
        return args, {**kwargs, **more}
    if implementation_of(layer.config) not in MOBA:
        raise_switched()
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    original = mask.original(original_implementation(layer), next(tensors).device)
    if len(args) > place:
        args = (*args[:place], original, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "attention_mask": original}
    if more:
        more[MASK] = HandedMask(original, mask)
    return args, {**kwargs, **more}


@dataclass(frozen=True)
class HandedMask:
    """The mask that a layer was given in place of the model's."""

    given: object
    of_model: MobaMask

    def restore(self, mask: object) -> object:
        """The model's mask, unless the layer has made another of what it was given."""
        return self.of_model if mask is self.given else mask


class ForwardPass:
    """One pass of training. What its layers used is what they use again where a checkpoint computes them a second time."""

    def __init__(self, original: bool) -> None:
        self.original = original  # whether the configuration named the attention that the model had before
        self._used: dict[nn.Module, tuple[str, MobaConfig]] = {}

    def used(self, layer: nn.Module, attention: str, settings: MobaConfig) -> tuple[str, MobaConfig]:
        """What a layer used first in this pass, which is `attention` with `settings` if it is called for the first time."""
        return self._used.setdefault(layer, ("full" if self.original else attention, settings))


def pass_call_of_stack(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """`pass_call` of models that call attention layers themselves. In training these get to know of which pass they are."""
    more = _drafts(model, kwargs) or _whole(model, args, kwargs) or _mask_made_before(model, kwargs)
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        more[PASS] = ForwardPass(implementation_of(model.config) not in MOBA)
    return (args, {**kwargs, **more}) if more else None


def pass_call(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of models: attention functions get to know what only the whole call says."""
    more = _drafts(model, kwargs) or _whole(model, args, kwargs)
    return (args, {**kwargs, **more}) if more else None


def _mask_made_before(model: PreTrainedModel, kwargs: dict) -> dict:
    """The mask that full attention of the whole model knows, where it is called with one that was made for MoBA."""
    masks, name = kwargs.get("attention_mask"), implementation_of(model.config)
    if name in MOBA:
        return {}
    if isinstance(masks, MobaMask):
        return {"attention_mask": masks.original(name, model.device)}
    if isinstance(masks, dict) and any(isinstance(mask, MobaMask) for mask in masks.values()):  # of layers of several kinds
        return {
            "attention_mask": {
                kind: mask.original(name, model.device) if isinstance(mask, MobaMask) else mask for kind, mask in masks.items()
            }
        }
    return {}


def _drafts(model: nn.Module, kwargs: dict) -> dict:
    """How many tokens are drafts.

    Assisted and prompt-lookup generation verify n drafted tokens by asking for the logits of the last n + 1 positions. Only the number
    of these tells drafts from a prompt, with which they may share a call.
    """
    keep = kwargs.get(DRAFTED_POSITIONS)
    trains = model.training and torch.is_grad_enabled()  # PEFT trains prefixes as caches
    drafts = not trains and cache_in(kwargs) is not None and isinstance(keep, int) and keep >= 2
    return {DRAFTS: keep - 1} if drafts else {}


def _whole(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """In a compiled graph: that each row is one sequence without padding, where the call names neither a mask nor positions.

    Without a cache transformers looks for packed sequences in positions that it made itself, and in a graph cannot see that there are
    none. A mask keeps it from looking.
    """
    given = [cache_in(kwargs), *(kwargs.get(name) for name in ("attention_mask", "position_ids", *_PACKED))]
    if not torch.compiler.is_compiling() or len(args) > 1 or any(x is not None for x in given):
        return {}
    use_cache = kwargs.get("use_cache")
    if getattr(model.config, "use_cache", True) if use_cache is None else use_cache:
        return {}
    tokens = kwargs.get("inputs_embeds")
    tokens = (args[0] if args else kwargs.get("input_ids")) if tokens is None else tokens
    if tokens is None:
        return {}
    return {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device), WHOLE: True}


def add_hooks(model: nn.Module, layers: list[nn.Module], with_cache: list[nn.Module]) -> None:
    """Hooks for a model and those of its attention layers that look at their mask or need the cache. Those that have theirs keep them."""
    wanted = [(layer, pass_mask) for layer in layers if mask_use_of(layer) is not MaskUse.NOTHING]
    wanted += [(layer, pass_cache) for layer in with_cache]
    wanted += _of_models(model)
    for module, hook in wanted:
        if call_hook_of(module) is None and (hook is pass_mask or takes_more(type(module))):
            set_call_hook(module, module.register_forward_pre_hook(hook, with_kwargs=True))


def _of_models(model: nn.Module) -> list[tuple[PreTrainedModel, Callable]]:
    """The models that a call goes through, with their hooks: those with a head, and the stacks of layers, which may be called alone."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    stacks = [part for part in parts if _is_stack(part)]
    with_head = [part for part in parts if part not in stacks and _takes(part, DRAFTED_POSITIONS)]
    return [*((part, pass_call) for part in with_head), *((part, pass_call_of_stack) for part in stacks)]


def _is_stack(model: PreTrainedModel) -> bool:
    """Whether a model calls replaceable attention layers itself, not through another model, and takes a mask for them."""
    if not _takes(model, "attention_mask") or not any(takes_moba(layer) for layer in attention_layers(model)):
        return False
    return not any(
        isinstance(part, PreTrainedModel) and part is not model and attention_layers(part) and any(map(takes_moba, attention_layers(part)))
        for part in model.modules()
    )


def modules_with_hooks(model: nn.Module) -> set[nn.Module]:
    """The modules that have a hook of `add_hooks`."""
    return {module for module in model.modules() if call_hook_of(module) is not None}


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    """Undo `add_hooks` for modules that are `modules_with_hooks`."""
    for module in modules:
        if (handle := call_hook_of(module)) is not None:
            handle.remove()
            set_call_hook(module, None)


def _takes(module: nn.Module, name: str) -> bool:
    """Whether a module's `forward` has an argument of this name."""
    return name in inspect.signature(module.forward).parameters


class BlockMeans:
    """The means of one cache layer's key blocks: `means [B, G, C, D]`, see `moba_flex.decoding`."""

    def __init__(self) -> None:
        self.means: Tensor | None = None
        self.block_size = 0
        self.starts: tuple[int, ...] | None = None  # each row's first real token; None: 0 for all rows
        self.stale = True  # some keys were written or moved that the means do not know
        self._waiting = False  # keys were written and not taken in yet
        self._keys: weakref.ref | None = None

    def __getstate__(self) -> dict:
        return {}  # a copy or pickle of a cache computes its means again

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def check(self, keys: Tensor | None) -> None:
        """Are the cache layer's keys still the ones last noted?"""
        if not torch.compiler.is_compiling() and (None if self._keys is None else self._keys()) is not keys:
            self.stale = True

    def note(self, keys: Tensor | None) -> None:
        """These are the cache layer's keys now."""
        if not torch.compiler.is_compiling():  # while compiling there is only a static cache, which writes its keys in place
            self._keys = None if keys is None else weakref.ref(keys)

    def expect(self) -> None:
        """New keys are about to be written."""
        self.stale = self.stale or self._waiting
        self._waiting = True

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Rows of the batch change places."""
        if self.means is None:
            return
        with torch.inference_mode(False):
            means = self.means[rows.to(self.means.device)]
            self.means = self.means.copy_(means) if means.shape == self.means.shape else means
        if self.starts is not None:
            self.starts = tuple(self.starts[row] for row in rows.tolist())

    @torch.no_grad()
    def of_all_but_new(self, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None) -> Tensor | None:
        """The means of `key [B, G, N, D]`, right for all blocks but those that its newest tokens complete: the caller writes these.

        None if there is no room for them, which only happens while a graph is traced.
        """
        if not torch.compiler.is_compiling():
            self._make_room(key, block_size, starts)
        elif self.means is None or (self.block_size, self.means.shape[2]) != (block_size, _blocks(key, block_size)):
            return None
        if self.stale:
            write_means(self.means, key.detach(), start, block_size)
        self.stale = self._waiting = False
        return self.means

    @torch.no_grad()
    def take_in(self, new: int, length: int, key: Tensor, block_size: int, start: Tensor | None, starts: tuple[int, ...] | None) -> None:
        """Write the means of all blocks that the last `new` of `length` tokens complete, and of all others that are not right."""
        self._make_room(key, block_size, starts)
        first = 0 if self.stale else max(0, length - new - max(starts or (0,))) // block_size
        write_means(self.means, key.detach(), start, block_size, first, length // block_size)
        self.stale = self._waiting = False

    def _make_room(self, key: Tensor, block_size: int, starts: tuple[int, ...] | None) -> None:
        if (self.block_size, self.starts) != (block_size, starts):
            self.block_size, self.starts, self.stale = block_size, starts, True
        means, wanted = self.means, _blocks(key, block_size)
        like = mean_dtype(key), key.device, key.shape[:2], key.shape[3]
        others = means is None or (means.dtype, means.device, means.shape[:2], means.shape[3]) != like
        if not others and means.shape[2] >= wanted:
            return
        with torch.inference_mode(False):
            if others:
                self.means, self.stale = means_for(key, wanted), True
                mark_static_address(self.means)
            else:  # an eighth more than is needed, so that a growing cache seldom copies them
                self.means = torch.cat([means, means_for(key, wanted - means.shape[2] + wanted // 8)], 2)


def _blocks(key: Tensor, block_size: int) -> int:
    return max(1, key.shape[2] // block_size)


def means_of(cache: Cache | None, layer: nn.Module, key: Tensor) -> BlockMeans | None:
    """The block means that lie beside the keys of an attention layer, all of which `key [B, G, N, D]` is.

    None where there can be none: no cache or another kind of it (a quantized one changes its keys with time), keys that the layer
    changed after it had read them from the cache.
    """
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(cache, Cache) or layer.layer_idx >= len(cache.layers):
        return None
    kept = cache.layers[layer.layer_idx]
    if not torch.compiler.is_compiling():
        if not reads_as_it_lies(cache, kept, key):
            return None
        if type(kept) in _EXTENDED:
            kept.__class__ = _EXTENDED[type(kept)]
            means = BlockMeans()
            means.note(kept.keys)
            put_means(kept, means)
    return means_beside(kept)


def _means(cache_layer: CacheLayerMixin) -> BlockMeans:
    means = means_beside(cache_layer)
    assert means is not None  # the class of a cache layer changes when it gets its means
    return means


def _with_means(base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """A class of cache layers that move the means beside them as they move their keys. Its one base is what lets an object change to it."""

    class _WithMeans(base):
        def update(self, *args, **kwargs):
            means = _means(self)
            means.check(self.keys)
            means.expect()
            out = super().update(*args, **kwargs)
            means.note(self.keys)
            return out

        def offload(self) -> None:
            self._moved(super().offload)

        def prefetch(self) -> None:
            self._moved(super().prefetch)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._moved(super().reorder_cache, beam_idx, rows=beam_idx)

        def _moved(self, move: Callable, *args, rows: Tensor | None = None) -> None:
            means = _means(self)
            means.check(self.keys)
            move(*args)
            means.note(self.keys)
            if rows is not None and not means.stale:
                means.select(rows)

    return _WithMeans


class DynamicLayerWithMeans(_with_means(DynamicLayer)):
    """A growing cache layer with block means."""

    def crop(self, *args) -> None:
        self._moved(super().crop, *args)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._moved(super().batch_select_indices, indices, rows=indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(0 if self.keys is None else self.keys.shape[0]).repeat_interleave(repeats)
        self._moved(super().batch_repeat_interleave, repeats, rows=rows)


class StaticLayerWithMeans(_with_means(StaticLayer)):
    """A cache layer of fixed size with block means."""


_EXTENDED = {DynamicLayer: DynamicLayerWithMeans, StaticLayer: StaticLayerWithMeans}
