"""A short convolution over keys. It makes related keys cluster within a block, which helps the gate find them.

After FlashMoBA (arXiv 2511.11571), which adds a short depthwise causal convolution over the last 3 or 5 keys, SiLU, and a residual:

    key'[t] = key[t] + silu(sum over l of weight[l] * key[t - l])

Convolved keys replace the keys in the gate's block means and in attention. The place of the convolution is a choice of this package: it
follows the layer's `k_proj` and precedes any norm, rotary embedding and cache, because a SiLU of rotated keys would depend on absolute
positions. Weights are initialised to zero, which leaves the layer's output unchanged. They still receive gradients, because SiLU has slope
1/2 at 0.

The module belongs to the attention layer, as `key_conv`; hooks on the layer and on its `k_proj` call it. The convolution crosses neither
padding nor the borders of packed sequences. A growing cache stores the last keys before the convolution, with a reference to the convolved
keys that they belong to. Code that changes those keys (beam search, rejected drafts) gets an error, not wrong keys.

B rows, N tokens, K kernel size, C = G * D channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..config import MobaConfig
from ..core.compiling import outside_graphs
from ..core.messages import kind_of
from .block_means import DynamicLayerWithMeans, decoder_cache, layer_of_cache
from .call_hooks import MASK_KEY
from .layers import MOBA, keeps_full_by_config
from .masks import MobaMask
from .state import context_of, key_conv_hooks_of, last_keys_beside, put_last_keys, set_key_conv_hooks
from .upstream import GROWING_LAYERS, cache_in, implementation_of, is_offloaded

if TYPE_CHECKING:
    from .upstream import AttentionLayer

GROWING = (*GROWING_LAYERS, DynamicLayerWithMeans)  # exact classes: subclasses may drop or change keys


class KeyConv(nn.Module):
    """The convolution over one attention layer's keys; `weight [K, C]`, starting with lag 0."""

    def __init__(self, kernel_size: int, k_proj: nn.Linear) -> None:
        super().__init__()
        like = k_proj.weight
        dtype = like.dtype if like.is_floating_point() else torch.float32  # quantized weights are integers
        self.weight = nn.Parameter(torch.zeros(kernel_size, k_proj.out_features, dtype=dtype, device=like.device))

    def forward(self, key: Tensor, position: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Convolve `key [B, N, C]`.

        Args:
            position: `[B, N]`, each token's position in its own sequence, below 0 for padding; None: each row is one sequence.
            before: `[B, K - 1, C]`, the preceding keys; None: there are none.

        Raises ValueError if the number of channels is not that of the weights.
        """
        if key.shape[2] != self.weight.shape[1]:
            raise ValueError(
                f"key_conv convolves {self.weight.shape[1]} channels of keys, but k_proj returns {key.shape[2]}: tensor parallelism, which "
                "leaves each process a part of them, needs key_conv=0"
            )
        n_tokens, last = key.shape[1], self.weight.shape[0] - 1
        keys = _behind(before, key, last)
        mixed = torch.zeros_like(key)
        for lag, weight in enumerate(self.weight):
            past = keys[:, last - lag : last - lag + n_tokens]
            mixed = mixed + weight * (past if position is None else past.where((position >= lag)[..., None], 0))
        return (key + F.silu(mixed)).to(key.dtype)


class KeyConvHooks:
    """The hooks that call an attention layer's `key_conv`, either a `KeyConv` or the module with which PEFT has replaced it."""

    def __init__(self, module: KeyConv) -> None:
        self.module: nn.Module = module
        self.kernel_size = module.weight.shape[0]
        self._pass: Pass | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None}  # a call that raised leaves its state behind, which a copy must not inherit

    def attach(self, layer: AttentionLayer) -> None:
        layer.key_conv = self.module
        set_key_conv_hooks(layer, self)
        self._handles = [
            layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.k_proj.register_forward_hook(self._convolve),
            layer.register_forward_hook(self._end),
        ]

    def detach(self, layer: AttentionLayer) -> None:
        for handle in self._handles:
            handle.remove()
        del layer.key_conv
        set_key_conv_hooks(layer, None)

    def _begin(self, layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self._handles[1].id not in layer.k_proj._forward_hooks:  # LoRA or a quantizer replaced it
            self._handles[1].remove()
            self._handles[1] = layer.k_proj.register_forward_hook(self._convolve)
        if layer.key_conv is not self.module:
            self.module = layer.key_conv
        if (used := implementation_of(layer.config)) not in MOBA:
            raise ValueError(
                f'key_conv needs to know where sequences begin, which "{used}" attention does not say: use '
                'moba_flex.set_attention(model, "full") in place of set_attn_implementation, or unpatch the model'
            )
        hidden, cache = args[0] if args else kwargs["hidden_states"], cache_in(kwargs)
        position = _positions(kwargs[MASK_KEY].of_model if MASK_KEY in kwargs else kwargs.get("attention_mask"), hidden, kwargs)
        now = None
        if cache is not None:
            now = Pass(position, cache, *_keys_before(cache, layer))
        elif position is not None:
            now = Pass(position)
        if now is not self._pass:
            self._pass = now

    def _convolve(self, k_proj: nn.Module, args: tuple[Any, ...], key: Tensor) -> Tensor:
        now = self._pass
        if now is None:
            return self.module(key)
        if now.cache is not None:
            last = self.kernel_size - 1
            now.last_keys = _behind(now.before, key, last)[:, key.shape[1] :].clone()  # not a view, which would keep all keys alive
            now.length += key.shape[1]
        return self.module(key, now.position, now.before)

    def _end(self, layer: AttentionLayer, args: tuple[Any, ...], out: Any) -> None:
        now = self._pass
        if now is None:
            return
        if now.cache is not None:
            _keep(now, now.cache, layer)
        self._pass = None


@dataclass
class Pass:
    """The state of one call of an attention layer that its key convolution needs."""

    position: Tensor | None
    cache: Cache | None = None
    before: Tensor | None = None
    length: int = 0  # of the cache, including this call's keys
    last_keys: Tensor | None = None


@dataclass
class LastKeys:
    """The last K - 1 keys of a cache layer before the convolution, and a reference to the convolved keys that end with them."""

    keys: Tensor | None  # None: the layer has projected no keys itself
    of: Callable[[], Tensor | None]

    def __reduce__(self) -> tuple[Any, ...]:
        return _last_keys, (self.keys, self.of())  # a copied cache has copies of both


def _last_keys(keys: Tensor | None, of: Tensor | None) -> LastKeys:
    return LastKeys(keys, _of_nothing if of is None else weakref.ref(of))


def _of_nothing() -> None:
    """Stands in for the reference of a `LastKeys` whose keys no longer exist."""


def _behind(before: Tensor | None, key: Tensor, last: int) -> Tensor:
    """`[B, last + N, C]`: the keys preceded by the `last` keys before them, or by zeros if there are none."""
    return F.pad(key, (0, 0, last, 0)) if before is None else torch.cat([before, key], 1)


def set_key_convs(layers: list[AttentionLayer], settings: MobaConfig) -> None:
    """Add a convolution to those of `layers` that use MoBA, as the settings say, and remove it from all others.

    A convolution of the right size stays, with its weights. Raises ValueError, before anything is changed, if a layer has no linear
    `k_proj`, or if its new weights would come too late for context parallelism, offloading or sharding.
    """
    projections: dict[AttentionLayer, nn.Linear] = {}
    for layer, size in new_key_convs(layers, settings).items():
        if not isinstance(k_proj := getattr(layer, "k_proj", None), nn.Linear):
            has = "does not have" if k_proj is None else f"has as {kind_of(k_proj)} (patch before adding LoRA)"
            what = f"key_conv={size} convolves what a linear k_proj returns"
            raise ValueError(f"{what}, which {type(layer).__name__} {has}: set key_conv to 0")
        if context_of(layer) is not None:
            raise ValueError(f"key_conv={size} would not see the keys before a slice, and {type(layer).__name__} is context-parallel")
        if k_proj.weight.is_meta and is_offloaded((layer, k_proj)):
            raise ValueError(f"key_conv={size} gives {type(layer).__name__} a new weight, which must be there before weights are offloaded")
        if isinstance(k_proj.weight, DTensor):
            raise ValueError(f"key_conv={size} gives {type(layer).__name__} a new weight, which must be there before the model is sharded")
        projections[layer] = k_proj
    for layer in layers:
        now, size = key_conv_hooks_of(layer), _kernel_size(layer, settings)
        if now is not None and now.kernel_size != size:
            now.detach(layer)
        if layer in projections:
            KeyConvHooks(KeyConv(size, projections[layer])).attach(layer)


def new_key_convs(layers: list[AttentionLayer], settings: MobaConfig) -> dict[AttentionLayer, int]:
    """The layers that would get new weights under these settings, each with its kernel size."""
    sizes = {layer: _kernel_size(layer, settings) for layer in layers}
    return {layer: size for layer, size in sizes.items() if size and ((now := key_conv_hooks_of(layer)) is None or now.kernel_size != size)}


def _kernel_size(layer: AttentionLayer, settings: MobaConfig) -> int:
    return 0 if keeps_full_by_config(layer, settings) else settings.key_conv


def remove_key_convs(layers: list[AttentionLayer]) -> None:
    """Undo `set_key_convs`; the weights are lost."""
    for layer in layers:
        if (hooks := key_conv_hooks_of(layer)) is not None:
            hooks.detach(layer)


def check_key_conv(layer: AttentionLayer, settings: MobaConfig) -> None:
    """Raise ValueError if a layer lacks the convolution of its settings, which must be created before the weights are loaded."""
    if settings.key_conv and not hasattr(layer, "key_conv") and not keeps_full_by_config(layer, settings):
        raise ValueError(
            f"the model was saved with key_conv={settings.key_conv}, but {type(layer).__name__} {layer.layer_idx} has no convolution of "
            "keys, for transformers alone does not load it: use moba_flex.AutoModelForCausalLM.from_pretrained, or begin with a new one "
            "by moba_flex.patch(model, model.config.moba)"
        )


def _cache_layer(cache: Cache, layer: AttentionLayer) -> CacheLayerMixin | None:
    of_decoder = decoder_cache(cache)
    if of_decoder is None:
        raise ValueError(f"key_conv needs the keys before the new ones, which {kind_of(cache)} does not give: use DynamicCache()")
    return layer_of_cache(of_decoder, layer)


# Weak references and attributes of cache layers cannot be traced: under torch.compile both functions are graph breaks.


@outside_graphs
def _keep(now: Pass, cache: Cache, layer: AttentionLayer) -> None:
    """Store the last keys for the next call, if the cache layer only grows."""
    kept = _cache_layer(cache, layer)
    if kept is not None and type(kept) in GROWING:
        if kept.get_seq_length() != now.length:  # HRM runs its layers several times
            raise ValueError(
                f"key_conv cannot follow {type(layer).__name__} {layer.layer_idx}, whose keys are not in that layer of the cache: "
                "call the model with use_cache=False"
            )
        assert kept.keys is not None  # it holds at least this call's keys
        put_last_keys(kept, LastKeys(now.last_keys, weakref.ref(kept.keys)))


@outside_graphs
def _keys_before(cache: Cache, layer: AttentionLayer) -> tuple[Tensor | None, int]:
    """`[B, K - 1, C]` and the number of cached keys; None and 0 if the cache holds no keys yet."""
    kept = _cache_layer(cache, layer)
    if kept is None or not (length := int(kept.get_seq_length())):
        return None, 0
    last = last_keys_beside(kept)
    if type(kept) not in GROWING or last is None or last.of() is not kept.keys:
        raise ValueError(
            f"key_conv needs the keys before the new ones, which this cache ({type(kept).__name__}) has lost: it must be a DynamicCache() "
            "that only this model has written, without beam search or assisted generation; or generate with use_cache=False"
        )
    return last.keys, length


def _positions(mask: object, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """`[B, N]`, each new token's position in its own sequence, below 0 for padding; None if each row is one sequence."""
    if not isinstance(mask, MobaMask):
        return None
    rows, n_tokens = hidden.shape[:2]
    query, key = (hidden.new_empty(rows, 1, n, 0) for n in mask.shape[2:])
    visible = mask.visible(query, key, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    if visible.cu_seqlens is not None:
        token = torch.arange(rows * n_tokens, device=hidden.device, dtype=torch.int32)
        first = visible.cu_seqlens[torch.searchsorted(visible.cu_seqlens, token, right=True) - 1]
        return (token - first).view(rows, n_tokens)
    start = visible.start(hidden.device)
    if start is None:
        return None
    return torch.arange(visible.n_key - n_tokens, visible.n_key, device=hidden.device) - start[:, None]
