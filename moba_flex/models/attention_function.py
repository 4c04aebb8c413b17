"""The attention function that transformers calls for every layer of a model with "moba" or "moba_naive".

`decision.py` chooses the path of a call; this file runs it. A layer that does not use MoBA gets its original attention, with exactly the
arguments that it would have had.

B batch, H query heads, G key heads, N tokens (Nq queries, Nk keys), D head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..config import MobaConfig
from ..core.autocast import without_autocast
from ..dispatch import attend, attend_decoding
from ..ops.decoding import means_for, write_means
from .block_means import BlockMeans, means_of
from .by_name import settings_of_unpatched
from .call_hooks import CACHE_KEY, MASK_KEY, PASS_KEY
from .current_call import PLAIN
from .decision import Decision, LayerCall, LayerPath, check_supported, decide, decide_sparse, n_decoded
from .key_conv import check_key_conv
from .layer_operation import Operation, autocast, call_original, operation_of
from .layers import MOBA, attention_of, check_served, original_implementation
from .masks import MobaMask
from .paged_attention import attend_paged, paged_keys
from .recomputation import check_pass_is_known
from .repeated_call import remember, remember_paged, repeated
from .sizes import note_sparse, warn_of_no_effect
from .state import choice_of, context_of, watcher_of
from .visible import DecodingPositions, Visible

if TYPE_CHECKING:
    from .upstream import AttentionLayer


def moba_attention_forward(
    module: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MobaMask | Tensor | BlockMask | None,
    named: str = "moba",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface: `[B, H, Nq, D]`, `[B, G, Nk, D]`, `[B, G, Nk, Dv]` -> `[B, Nq, H, Dv]` and weights.

    `named` is the name in the configuration under which the model found this function.

    The weights `[B, H, Nq, Nk]` are None unless they are requested with "moba_naive" and `output_attentions=True`. In that case layers with
    full attention and tokens decoded with full attention return them too.

    Raises ValueError for what MoBA does not support: attention dropout or weights without "moba_naive", custom masks, biases.
    """
    if (run := repeated(module, query, key, value, attention_mask, named, kwargs)) is not None:
        return run(module, query, key, value, kwargs)
    arguments = dict(kwargs)
    cache, this_pass, paged = kwargs.pop(CACHE_KEY, None), kwargs.pop(PASS_KEY, None), paged_keys(module, kwargs)
    if (handed := kwargs.pop(MASK_KEY, None)) is not None:
        attention_mask = handed.restore(attention_mask)
    model_call = attention_mask.call if isinstance(attention_mask, MobaMask) else PLAIN
    unpatched = choice_of(module) is None
    settings = settings_of_unpatched(module) if unpatched else MobaConfig.of(module.config)
    attention = attention_of(module, settings, named)
    if unpatched:
        check_served(module)
        if attention != "full" and isinstance(attention_mask, MobaMask) and attention_mask.is_of_drafting_layer(module.layer_idx):
            attention = "full"
    if (this_pass := model_call.this_pass or this_pass) is not None:
        attention, settings = this_pass.used(module, attention, settings)
    elif attention != "full" and not isinstance(attention_mask, MobaMask):
        check_pass_is_known(module)
    if attention != "full":
        check_key_conv(module, settings)
    call = LayerCall(module, query, key, value, attention_mask, settings, attention, cache, model_call.drafts, kwargs)
    if paged is not None:
        out = attend_paged(call, paged)
        remember_paged(call, paged, named, arguments)
        return out, None
    decision = decide(call)
    weights = "moba_naive" in (named, attention) and call.wants_weights
    if not weights:
        remember(call, decision.path, named, arguments)
    if decision.path is LayerPath.CONTEXT_PARALLEL:
        return _across_processes(call), None
    if decision.path in (LayerPath.FULL, LayerPath.DECODING_FULL):
        return _original(call, weights)
    if decision.path is LayerPath.DRAFTS_FULL:
        return _prompt_and_drafts(call, decision.n_decoded, weights)
    return _sparse(call, decision)


ATTENTION_FUNCTIONS = {name: partial(moba_attention_forward, named=name) for name in MOBA}


def _original(call: LayerCall, weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """The original attention of the layer. With `weights` it is eager attention, which returns them."""
    module, mask = call.layer, call.mask
    implementation = "eager" if weights else original_implementation(module)
    if isinstance(mask, MobaMask):
        mask = mask.original(implementation, call.query.device)
    return call_original(call, implementation, mask)


def _prompt_and_drafts(call: LayerCall, n_drafts: int, weights: bool) -> tuple[Tensor, Tensor | None]:
    """MoBA for the prompt, as if the drafts after it did not exist yet, and full attention for the drafts."""
    assert isinstance(call.mask, MobaMask)  # only calls with a MobaMask have drafts
    before, last = call.mask.split(n_drafts)
    query, key, value = (x[:, :, :-n_drafts] for x in (call.query, call.key, call.value))
    of_prompt = call._replace(query=query, key=key, value=value, mask=before, drafts=0)
    decision = decide_sparse(of_prompt)
    if decision.path is LayerPath.ALL_KEYS:  # one call, whose bits are those of the original attention
        assert decision.visible is not None
        _note_all_keys(of_prompt, decision.visible)
        return _original(call)
    prompt, prompt_weights = _sparse(of_prompt, decision)
    drafts, draft_weights = _original(call._replace(query=call.query[:, :, -n_drafts:], mask=last), weights)
    out = torch.cat([prompt, drafts], 1)
    if not weights:
        return out, None
    assert prompt_weights is not None and draft_weights is not None
    prompt_weights = F.pad(prompt_weights, (0, draft_weights.shape[-1] - prompt_weights.shape[-1]))
    return out, torch.cat([prompt_weights, draft_weights], 2)


def _sparse(call: LayerCall, decision: Decision) -> tuple[Tensor, Tensor | None]:
    """The paths that `decide_sparse` chooses among."""
    if decision.positions is not None:  # DECODING_SPARSE
        return _decode(call, decision.positions), None
    assert decision.visible is not None
    if decision.path is LayerPath.ALL_KEYS:
        return _all_keys(call, decision.visible), None
    return _moba(call, decision.visible)


def _all_keys(call: LayerCall, visible: Visible) -> Tensor:
    """`[B, Nq, H, Dv]`: the original attention, which computes the same."""
    _note_all_keys(call, visible)
    return _original(call)[0]


def _note_all_keys(call: LayerCall, visible: Visible) -> None:
    """What MoBA notes of a call that reads all keys. Block means beside the cache are updated for later tokens."""
    watcher = watcher_of(call.layer)
    if watcher is not None or call.settings.decode == "sparse":
        query, key = autocast(call.query, call.key)
        _show(call, query, key, visible)
    if watcher is None:
        warn_of_no_effect(call.layer.config, call.settings, call.query.shape[2], visible.n_key)


def _moba(call: LayerCall, visible: Visible) -> tuple[Tensor, Tensor | None]:
    """MoBA: `[B, Nq, H, Dv]` and, if they are asked for, the weights `[B, H, Nq, Nk]`."""
    query, cached, value = autocast(call.query, call.key, call.value)
    key = cached
    if visible.n_key < cached.shape[2]:
        key, value = key[:, :, : visible.n_key], value[:, :, : visible.n_key]
    operation = operation_of(call, query, key, value, visible.causal)
    _show(call, query, cached, visible)
    note_sparse(call.layer.config, call.settings)
    if call.dropout or call.wants_weights:
        out, weights = _attend_with_weights(query, key, value, visible, call.dropout, operation)
        return out.transpose(1, 2).contiguous(), weights if call.wants_weights else None
    return _attend(query, key, value, visible, operation).transpose(1, 2).contiguous(), None


def _show(call: LayerCall, query: Tensor, key: Tensor, visible: Visible) -> None:
    """Show the queries and keys of a call to the layer's watcher, and add the keys to the block means beside the cache."""
    if (watcher := watcher_of(call.layer)) is not None:
        watcher(call.layer, query, key[:, :, : visible.n_key], visible, call.settings)
    means = _means(call)
    if means is not None and visible.causal and not torch.compiler.is_compiling():
        block_size = call.settings.block_size
        means.update_means(query.shape[2], visible.n_key, key, block_size, visible.start(key.device), visible.starts)


def _means(call: LayerCall) -> BlockMeans | None:
    """The block means beside the cache of a call, if generated tokens read them."""
    return means_of(call.cache, call.layer, call.key, call.query.shape[2]) if call.settings.decode == "sparse" else None


def _across_processes(call: LayerCall) -> Tensor:
    """`[B, L, H, Dv]`: a layer's call in a context-parallel model, see `moba_flex.distributed`."""
    context = context_of(call.layer)
    assert context is not None
    kept = context.cached_keys(call.layer)
    if call.dropout:
        raise ValueError(
            f"{call.name} has an attention dropout of {call.dropout} in training, and works on a slice of a sequence, which has "
            "none: load the model with that dropout set to 0"
        )
    if call.kwargs.get("use_cache") and kept is None:
        raise ValueError(
            f"{call.name} works on a slice of a sequence, without a cache: call the whole model, with the same tokens on all processes, or "
            "with what `ContextParallel.shard` returns"
        )
    if kept is not None and not kept.has_keys_of_attention(call.key):
        raise ValueError(
            f"{call.name} computes its keys from what it caches, which is not done across processes: call the model without a cache, with "
            "what `ContextParallel.shard` returns"
        )
    check_supported(call)
    query, key, value = autocast(call.query, call.key, call.value)
    behind = None if kept is None or kept.shared.is_prompt else kept  # new tokens after a prompt, which all processes compute
    visible = call.visible(query, key) if behind is None else Visible(key.shape[2])
    operation = operation_of(call, query, key, value, visible.causal)
    if call.wants_weights or not visible.causal or visible.padding_mask is not None or visible.cu_seqlens is not None:
        raise ValueError(
            f"{call.name} works on a slice of a sequence, without attention weights, padding "
            "or packed sequences: call the model with what `ContextParallel.shard` returns"
        )
    settings, sinks = operation.settings, operation.sinks
    if call.attention == "full" and (settings.softcap is not None or sinks is not None):
        raise ValueError(f"{call.name} has a softcap or sinks, which full attention of slices does not do")
    reads_all = call.attention == "full" or _decodes_kept(call, 0 if behind is None else behind.shared.length - query.shape[2])
    with without_autocast(query):
        if behind is not None:
            return context.attend_cached(query, behind, settings, sinks, reads_all).transpose(1, 2).contiguous()
        if reads_all:
            return context.attend_full(query, key, value, settings.scale).transpose(1, 2).contiguous()
        return context.attend(query, key, value, settings, sinks).transpose(1, 2).contiguous()


def _decodes_kept(call: LayerCall, cached: int) -> bool:
    """Whether new tokens after `cached` ones, whose keys are distributed over processes, read all keys.

    Raises ValueError if only some of them would.
    """
    if call.settings.decode != "full":
        return False
    new = call.query.shape[2]
    decoded = n_decoded(call, cached)
    if (call.drafts and not cached) or decoded not in (0, new):
        raise ValueError(
            f'{call.name} is asked for the logits of {call.drafts + 1} tokens of a prompt, which decode="full" lets read all keys: that is '
            'not done across processes, so leave logits_to_keep and assistants away, or use decode="sparse"'
        )
    return decoded == new


def _decode(call: LayerCall, positions: DecodingPositions) -> Tensor:
    """`[B, Nq, H, Dv]`: a few tokens at the end of a cache, which choose their blocks by the block means beside it."""
    means = _means(call)
    query, key, value = autocast(call.query, call.key, call.value)
    operation = operation_of(call, query, key, value, True)
    block_size, known = operation.settings.block_size, None
    if means is not None:
        assert isinstance(call.mask, MobaMask)  # decoding requires one
        starts = None if torch.compiler.is_compiling() else call.mask.visible(query, key).starts
        known = means.of_all_but_new(key, block_size, positions.start, starts)
    if known is None:  # no means are stored beside this cache
        known = write_means(means_for(key, max(1, key.shape[2] // block_size)), key, positions.start, block_size)
    out = attend_decoding(query, key, value, known, positions.length, positions.start, operation.settings, sinks=operation.sinks)
    return out.transpose(1, 2).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Visible, operation: Operation) -> Tensor:
    """`[B, H, Nq, Dv]`. Rows of packed sequences are concatenated into one row."""
    rows = query.shape[0]
    joined = visible.cu_seqlens is not None and rows > 1
    if joined:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    out, _ = attend(
        query,
        key,
        value,
        operation.settings,
        padding_mask=visible.padding_mask,
        cu_seqlens=visible.cu_seqlens,
        longest=visible.longest,
        sinks=operation.sinks,
    )
    return out[0].unflatten(1, (rows, -1)).transpose(0, 1) if joined else out


def _attend_with_weights(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, operation: Operation
) -> tuple[Tensor, Tensor]:
    """The output and the weights `[B, H, Nq, Nk]`, which are attention applied to an identity matrix of values."""
    n_key = key.shape[2]
    identity = torch.eye(n_key, dtype=value.dtype, device=value.device).expand(*value.shape[:2], n_key, n_key)
    weights = F.dropout(_attend(query, key, identity, visible, operation), dropout)
    with without_autocast(query):
        return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1), weights
