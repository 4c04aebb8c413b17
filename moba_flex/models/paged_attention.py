"""Attention of a layer in continuous batching: `[1, H, T, D]` queries of many requests, whose keys are stored in pages.

`paged_batch.py` determines which tokens read which keys. Layers without MoBA, and tokens that read all keys, get the attention that the
unpatched model has in continuous batching.

H query heads, G key heads, T tokens of all requests, Tp and Tk: the tokens and keys of a part of them, R requests, D and Dv widths.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.autocast import without_autocast
from ..dispatch import attend, attend_decoding_pages
from .decision import LayerCall, check_supported
from .layer_operation import autocast, call_original, operation_of
from .layers import original_implementation
from .paged_batch import Part
from .paged_cache import PAGED, PagedKeys
from .sizes import note_sparse
from .state import context_of
from .upstream import PAGED_CALL

if TYPE_CHECKING:
    from .upstream import AttentionLayer


def paged_keys(layer: AttentionLayer, kwargs: dict[str, Any]) -> PagedKeys | None:
    """Pop the paged keys from the arguments of a continuous-batching call; None for other calls.

    Raises ValueError if continuous batching was started for another attention.
    """
    keys: PagedKeys | None = kwargs.pop(PAGED, None)
    if keys is None and PAGED_CALL in kwargs:
        raise ValueError(
            f"{type(layer).__name__} {layer.layer_idx} is called by continuous batching, but either its keys are those of another layer, "
            'which MoBA cannot follow there: use set_attention(model, "full"); or the model was switched to MoBA after continuous batching '
            "had started: stop it, switch, and start again"
        )
    return keys


def attend_paged(call: LayerCall, keys: PagedKeys) -> Tensor:
    """`[1, T, H, Dv]` of a layer's call.

    Raises ValueError for what is not supported in continuous batching.
    """
    if context_of(call.layer) is not None:
        raise ValueError(f"{call.name} works on a slice of a sequence, without a cache: call ContextParallel.remove() before generating")
    if call.key is not keys.given[0] or call.value is not keys.given[1]:
        raise ValueError(
            f"{call.name} changes its keys or values after it has read them from the cache, which MoBA cannot follow in continuous "
            "batching: call model.generate"
        )
    batch = keys.batch
    if call.attention == "full" or keys.window != 1:
        return _original(call, keys, batch.whole)
    check_supported(call)
    if keys.means is not None:
        keys.means.update_means(keys)
    parts = batch.parts(call.settings, call.naive, keys.means is not None)
    if parts.sparse is not None or parts.decoding is not None:
        note_sparse(call.layer.config, call.settings)
    out: Tensor | None = None
    for part, attention in zip(parts, (_original, _decoding, _sparse)):
        if part is None:
            continue
        if part.is_whole:
            return attention(call, keys, part)
        of_part = attention(call._replace(query=call.query[:, :, part.queries()]), keys, part)
        if out is None:
            out = of_part.new_empty(1, batch.n_tokens, *of_part.shape[2:])
        out[:, part.queries()] = of_part
    assert out is not None  # a pass has at least one token
    return out


def _original(call: LayerCall, keys: PagedKeys, part: Part) -> Tensor:
    """`[1, Tp, H, Dv]`: the attention that the unpatched model has in continuous batching."""
    implementation = original_implementation(call.layer)
    n_key = part.n_key if keys.window == 1 else [keys.length(request.past, request.new) for request in keys.batch.requests]
    key, value = keys.of(part)
    if implementation in ("sdpa", "eager"):
        if implementation == "eager" and call.kwargs.get("softcap") is not None:
            raise ValueError(
                f"{call.name} caps its scores, which transformers' continuous batching with eager attention leaves out: call model.generate"
            )
        mask = part.mask(n_key, keys.window, call.query.dtype)
        given = call._replace(key=key, value=value, kwargs={**call.kwargs, "is_causal": False})
        return call_original(given, "paged|eager" if implementation == "eager" else implementation, mask)[0]
    lengths = {
        "cu_seq_lens_q": part.cu_seqlens(part.n_query),
        "cu_seq_lens_k": part.cu_seqlens(n_key),
        "max_length_q": max(part.n_query),
        "max_length_k": max(n_key),
    }
    return call_original(call._replace(key=key, value=value, kwargs={**call.kwargs, **lengths}), implementation, None)[0]


def _sparse(call: LayerCall, keys: PagedKeys, part: Part) -> Tensor:
    """`[1, Tp, H, Dv]`: MoBA for the last tokens of each request."""
    query, key, value = autocast(call.query, *keys.of(part))
    operation = operation_of(call, query, key, value, True)
    settings = operation.settings
    cu_seqlens = part.cu_seqlens(part.n_query) if part.is_new else part.cu_seqlens_of_both()
    if not part.is_new and settings.implementation == "triton":  # its kernels need as many keys as queries
        settings = replace(settings, implementation="flex")
    with without_autocast(query):
        out, _ = attend(query, key, value, settings, cu_seqlens=cu_seqlens, longest=max(part.n_key), sinks=operation.sinks)
    return out.transpose(1, 2).contiguous()


def _decoding(call: LayerCall, keys: PagedKeys, part: Part) -> Tensor:
    """`[1, Tp, H, Dv]`: MoBA for one token per request, by stored block means. Only the chosen blocks of the keys are read."""
    (query,) = autocast(call.query[0].transpose(0, 1)[:, :, None])  # [R, H, 1, D]
    operation = operation_of(call, query, query, query, True)
    assert keys.means is not None
    with without_autocast(query):
        out = attend_decoding_pages(query, keys.means.pages_of(keys, part), operation.settings, sinks=operation.sinks)
    return out[:, :, 0][None]
