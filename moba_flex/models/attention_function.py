"""The attention function that transformers calls for every layer of a model with "moba" or "moba_naive".

It sends a layer to MoBA or to the attention that the layer had before, which gets exactly the arguments that it would
have got.

B batch, H query heads, G key heads, N tokens (Nq queries, Nk keys), D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from ..config import MobaConfig
from ..core import validation
from ..core.autocast import without_autocast
from ..decoding import means_for, write_means
from ..functional import attend, attend_decoding
from .block_means import CACHE, DRAFTS, WHOLE, BlockMeans, means_of
from .key_conv import check_key_conv
from .layers import MOBA, attention_of, ordinary_attention, ordinary_implementation
from .masks import MobaMask, Places, Visible

# Arguments of some models that change who sees whom, or the scores, in ways that MoBA has no form of.
_UNKNOWN_TO_MOBA = ("position_bias", "cache", "indices", "block_indices", "sinks")


def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MobaMask | Tensor | BlockMask | None,
    named: str = "moba",
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface: `[B, H, Nq, D]`, `[B, G, Nk, D]`, `[B, G, Nk, Dv]` -> `[B, Nq, H, Dv]` and weights.

    `named` is the name in the configuration under which the model found this function.

    The weights `[B, H, Nq, n_key]` are None unless "moba_naive" is asked for them with `output_attentions=True`: layers with full
    attention, and tokens that are decoded with it, then have them too.

    Raises ValueError for what MoBA cannot do: attention dropout or weights without "moba_naive", custom masks, biases.
    """
    cache, drafts = kwargs.pop(CACHE, None), kwargs.pop(DRAFTS, 0)
    if kwargs.pop(WHOLE, False) and isinstance(attention_mask, MobaMask):
        attention_mask = attention_mask.without_padding()
    settings = MobaConfig.of(module.config)
    attention = attention_of(module, settings, named)
    if attention != "full":
        check_key_conv(module, settings)
    if "_context_parallel" in module.__dict__:
        return _across_processes(module, query, key, value, attention_mask, settings, attention, kwargs), None
    mask_is_local = isinstance(attention_mask, MobaMask) and attention_mask.is_local
    is_local = mask_is_local or kwargs.get("sliding_window") is not None
    weights = "moba_naive" in (named, attention) and _weights_wanted(module, kwargs)
    if attention == "full" or is_local:
        return _ordinary(module, query, key, value, attention_mask, kwargs, weights)
    if settings.decode == "full" and (decoded := _decoded(query, key, attention_mask, drafts)):
        if decoded == query.shape[2]:
            return _ordinary(module, query, key, value, attention_mask, kwargs, weights)
        before, last = attention_mask.split(decoded)
        operands = query[:, :, :-decoded], key[:, :, :-decoded], value[:, :, :-decoded]
        prompt, of_prompt = _moba(module, *operands, before, settings, attention, cache, kwargs)
        drafts, of_drafts = _ordinary(module, query[:, :, -decoded:], key, value, last, kwargs, weights)
        if weights:
            of_prompt = F.pad(of_prompt, (0, of_drafts.shape[-1] - of_prompt.shape[-1]))
        return torch.cat([prompt, drafts], 1), torch.cat([of_prompt, of_drafts], 2) if weights else None

    return _moba(module, query, key, value, attention_mask, settings, attention, cache, kwargs)


ATTENTION_FUNCTIONS = {name: partial(moba_attention_forward, named=name) for name in MOBA}


def _moba(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MobaMask | Tensor | BlockMask | None,
    settings: MobaConfig,
    attention: str,
    cache: Cache | None,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    naive = attention == "moba_naive" or settings.implementation == "naive"
    dropout, weights = _check_supported(module, naive, kwargs)
    inputs = query, key, value
    means = means_of(cache, module, key) if settings.decode == "sparse" else None
    query, key, value = _autocast(query, key, value)
    plain = not (naive or weights or dropout or torch.is_grad_enabled())
    if settings.decode == "sparse" and plain and isinstance(mask, MobaMask) and (places := mask.places(query, key)):
        call = _call(query, key, value, True, settings, _implementation(settings, naive, query), kwargs)
        out = _decode(query, key, value, mask, places, means, call)
        return out.transpose(1, 2).contiguous(), None

    visible = _visible(query, key, mask, kwargs, module)
    cached = key
    if visible.n_key < key.shape[2]:
        key, value = key[:, :, : visible.n_key], value[:, :, : visible.n_key]
    implementation = _implementation(settings, naive, query)
    reads_all = visible.causal and visible.cu_seqlens is None and visible.n_key <= settings.block_size * settings.top_k
    # What the layer had before then computes just that, and a short prompt in less time, unless "eager" is asked for by its name. It
    # need not know of packed sequences.
    ordinary = reads_all and not naive and settings.implementation != "eager"
    call = {} if ordinary else _call(query, key, value, visible.causal, settings, implementation, kwargs)
    if "_watch" in module.__dict__:  # see moba_flex.analysis.trace
        module._watch(module, query, key, visible, settings)
    if means is not None and visible.causal and not torch.compiler.is_compiling():
        means.take_in(query.shape[2], visible.n_key, cached, settings.block_size, visible.start(key.device), visible.starts)
    if ordinary:
        return _ordinary(module, *inputs, mask, kwargs)[0], None
    if dropout or weights:
        out, probabilities = _attend_with_weights(query, key, value, visible, dropout, call)
        return out.transpose(1, 2).contiguous(), probabilities if weights else None
    return _attend(query, key, value, visible, call).transpose(1, 2).contiguous(), None


def _across_processes(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MobaMask | Tensor | BlockMask | None,
    settings: MobaConfig,
    attention: str,
    kwargs: dict,
) -> Tensor:
    """A layer of a model whose sequences are cut into slices, see `moba_flex.distributed`: `[B, L, H, Dv]`."""
    context, naive = module._context_parallel, attention == "moba_naive" or settings.implementation == "naive"
    if kwargs.get("dropout"):
        raise ValueError(
            f"{_name(module)} has an attention dropout of {kwargs['dropout']} in training, and works on a slice of a sequence, which has "
            "none: load the model with that dropout set to 0"
        )
    if kwargs.get("use_cache"):
        raise ValueError(
            f"{_name(module)} works on a slice of a sequence, without a cache: call the model with what `ContextParallel.shard` returns"
        )
    _, weights = _check_supported(module, naive, kwargs)
    query, key, value = _autocast(query, key, value)
    visible = _visible(query, key, mask, kwargs, module)
    call = _call(query, key, value, visible.causal, settings, _implementation(settings, naive, query), kwargs)
    if weights or not visible.causal or visible.padding_mask is not None or visible.cu_seqlens is not None:
        raise ValueError(
            f"{_name(module)} works on a slice of a sequence, without attention weights, padding "
            "or packed sequences: call the model with what `ContextParallel.shard` returns"
        )
    if attention == "full" and (call["softcap"] is not None or call["sinks"] is not None):
        raise ValueError(f"{_name(module)} has a softcap or sinks, which full attention of slices does not do")
    with without_autocast(query):
        if attention == "full":
            return context.attend_full(query, key, value, call["scale"]).transpose(1, 2).contiguous()
        return context.attend(query, key, value, **call).transpose(1, 2).contiguous()


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: MobaMask, places: Places, means: BlockMeans | None, call: dict) -> Tensor:
    """`[B, H, n, Dv]`: a few tokens at the end of a cache, by way of the block means beside it."""
    place, block_size = (places.length, places.start), call["block_size"]
    known = None
    if means is not None:
        starts = None if torch.compiler.is_compiling() else mask.visible(query, key).starts
        known = means.of_all_but_new(key, block_size, places.start, starts)
    if known is None:  # nothing is kept beside this cache
        known = write_means(means_for(key, max(1, key.shape[2] // block_size)), key, places.start, block_size)
    return attend_decoding(query, key, value, known, *place, **call)


def _decoded(query: Tensor, key: Tensor, mask: MobaMask | Tensor | BlockMask | None, drafts: int) -> int:
    """How many of the new tokens count as decoding, at the end of them: one that is alone, and drafts that are to be verified.

    Drafts behind a single token, the last one that was accepted, are decoding together with it.
    """
    new, cached = query.shape[2], key.shape[2] - query.shape[2]
    is_part = isinstance(mask, MobaMask) and mask.is_part  # of a prompt, say, whose last tokens alone go through this layer
    if new == 1 and not is_part:
        return int(cached > 0)
    if not drafts or not isinstance(mask, MobaMask):
        return 0
    return new if cached and drafts >= new - 1 and not is_part else min(drafts, new - 1)


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MobaMask | Tensor | BlockMask | None,
    kwargs: dict,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    implementation = "eager" if weights else ordinary_implementation(module)
    if isinstance(mask, MobaMask):
        mask = mask.ordinary(implementation, query.device)
    attention = ordinary_attention(module, implementation)
    if implementation not in ("eager", "sdpa"):
        module = _Named(module, implementation)
    return attention(module, query, key, value, mask, **kwargs)


class _Named:
    """A layer whose configuration names another implementation: some functions look their own name up there."""

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module, self.config = module, copy.copy(module.config)
        self.config._attn_implementation = {"": implementation}

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def _check_supported(module: nn.Module, naive: bool, kwargs: dict) -> tuple[float, bool]:
    """The dropout, and whether attention weights are wanted."""
    for name in _UNKNOWN_TO_MOBA:
        if kwargs.get(name) is not None:
            raise ValueError(f'{_name(module)} passes {name}, which MoBA cannot follow: use set_attention(model, "full")')
    dropout = kwargs.get("dropout") or 0.0
    weights = _weights_wanted(module, kwargs)
    if dropout and not naive:
        raise ValueError(
            f"{_name(module)} has an attention dropout of {dropout} in training, which MoBA does not do: load the model "
            'with that dropout set to 0 (of most models attention_dropout=0.0), or use "moba_naive"'
        )
    if weights and not naive:
        raise ValueError('output_attentions=True asks for attention weights, which MoBA never builds: set it to False, or use "moba_naive"')
    return dropout, weights


def _weights_wanted(module: nn.Module, kwargs: dict) -> bool:
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} {module.layer_idx}"


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """As autocast does for dense attention: rotary embeddings leave query and key wider than the value."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 else x for x in tensors]
    return tensors


def _visible(query: Tensor, key: Tensor, mask: MobaMask | Tensor | BlockMask | None, kwargs: dict, module: nn.Module) -> Visible:
    packed = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if isinstance(mask, MobaMask):
        return mask.visible(query, key, *packed)
    if mask is not None:
        raise ValueError(
            f"{_name(module)} got an attention mask of shape {tuple(mask.shape)}, which "
            'MoBA cannot follow: pass a 2D attention_mask, or use set_attention(model, "full")'
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{_name(module)} has {query.shape[2]} queries, {key.shape[2]} keys and no mask "
            "that says where the queries lie: call the whole model, which makes one"
        )
    return Visible(key.shape[2], kwargs.get("is_causal") is not False).packed(query, *packed)


def _implementation(settings: MobaConfig, naive: bool, query: Tensor) -> str:
    return "naive" if naive else validation.resolve_implementation(settings.implementation, query)


def _call(query: Tensor, key: Tensor, value: Tensor, causal: bool, settings: MobaConfig, implementation: str, kwargs: dict) -> dict:
    """The arguments of `attend` apart from tensors and visibility, checked."""
    blocks, scale, softcap, sinks = settings.blocks, kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
    validation.check_query_key(query=query, key=key, value=value)
    if not causal:  # for causal attention the settings were checked when they were made
        validation.check_blocks(**blocks, causal=False)
    validation.check_scores(query, query.shape[1], scale, softcap, sinks)
    return {**blocks, "scale": scale, "softcap": softcap, "sinks": sinks, "implementation": implementation}


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Visible, call: dict) -> Tensor:
    """`[B, H, Nq, Dv]`. Packed rows are laid end to end, as one longer row of packed sequences."""
    given = {"padding_mask": visible.padding_mask, "cu_seqlens": visible.cu_seqlens, "longest": visible.longest}
    given |= {"causal": visible.causal, **call}
    rows = query.shape[0]
    if visible.cu_seqlens is None or rows == 1:
        return attend(query, key, value, **given)
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    out = attend(query, key, value, **given)
    return out[0].unflatten(1, (rows, -1)).transpose(0, 1)


def _attend_with_weights(query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, call: dict) -> tuple[Tensor, Tensor]:
    """The output and the weights `[B, H, Nq, Nk]`, which are what attention makes of an identity matrix of values."""
    n_key = key.shape[2]
    identity = torch.eye(n_key, dtype=value.dtype, device=value.device).expand(*value.shape[:2], n_key, n_key)
    weights = F.dropout(_attend(query, key, identity, visible, call), dropout)
    with without_autocast(query):
        return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1), weights
