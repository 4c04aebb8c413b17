"""Which path one call of an attention layer takes. No other file decides it.

| path | when |
|---|---|
| context parallel | the layer works on a slice of each sequence |
| full | the layer uses full attention, or the call is for sliding-window or chunked attention |
| decoding full | tokens are generated, and `decode="full"` |
| drafts full | as decoding full, but only for the last tokens: drafts that share the call with a prompt |
| decoding sparse | tokens are generated, and `decode="sparse"` |
| all keys | every query reads all keys up to itself, which the original attention computes faster |
| moba | all other calls |

H query heads, G key heads, Nq queries, Nk keys, D head dimension.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from ..backends.paths import reads_all_keys
from ..config import MobaConfig
from .layers import UNKNOWN_TO_MOBA, asks_for_weights
from .masks import MobaMask
from .state import context_of
from .visible import DecodingPositions, Visible

if TYPE_CHECKING:
    from .upstream import AttentionLayer


class LayerPath(Enum):
    """The paths of a layer's call."""

    CONTEXT_PARALLEL = "context parallel"
    FULL = "full"
    DECODING_FULL = "decoding full"
    DRAFTS_FULL = "drafts full"
    DECODING_SPARSE = "decoding sparse"
    ALL_KEYS = "all keys"
    MOBA = "moba"


# Both are made in each call of a layer, before its kernels are launched: a tuple takes a fraction of the time of a frozen dataclass.


class LayerCall(NamedTuple):
    """One call of an attention layer, as transformers makes it."""

    layer: AttentionLayer
    query: Tensor  # [B, H, Nq, D]
    key: Tensor  # [B, G, Nk, D], including cached keys
    value: Tensor  # [B, G, Nk, Dv]
    mask: MobaMask | Tensor | BlockMask | None
    settings: MobaConfig
    attention: str  # "full", "moba" or "moba_naive"
    cache: Cache | None  # the cache that keys and values come from, if known
    drafts: int  # how many of the last tokens are drafts, which may share the call with a prompt
    kwargs: dict[str, Any]

    @property
    def naive(self) -> bool:
        return self.attention == "moba_naive" or self.settings.implementation == "naive"

    @property
    def name(self) -> str:
        return f"{type(self.layer).__name__} {self.layer.layer_idx}"

    @property
    def dropout(self) -> float:
        return self.kwargs.get("dropout") or 0.0

    @property
    def wants_weights(self) -> bool:
        if "output_attentions" in self.kwargs:
            return bool(self.kwargs["output_attentions"])
        config = self.layer.config
        return self.mask.asks_for_weights(config) if isinstance(self.mask, MobaMask) else asks_for_weights(config)

    def visible(self, query: Tensor, key: Tensor) -> Visible:
        """The visibility of keys to queries. Raises ValueError for what MoBA does not support."""
        packed = self.kwargs.get("cu_seq_lens_q"), self.kwargs.get("cu_seq_lens_k")
        if isinstance(self.mask, MobaMask):
            return self.mask.visible(query, key, *packed)
        if self.mask is not None:
            raise ValueError(
                f"{self.name} got an attention mask of shape {tuple(self.mask.shape)}, which "
                'MoBA cannot follow: pass a 2D attention_mask, or use set_attention(model, "full")'
            )
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{self.name} has {query.shape[2]} queries, {key.shape[2]} keys and no mask "
                "that says where the queries lie: call the whole model, which makes one"
            )
        return Visible(key.shape[2], self.kwargs.get("is_causal") is not False).packed(query, *packed)


class Decision(NamedTuple):
    """The path that a call takes, the reason, and intermediate results that the path needs."""

    path: LayerPath
    reason: str
    n_decoded: int = 0  # of DRAFTS_FULL: how many of the last tokens are drafts
    positions: DecodingPositions | None = None  # of DECODING_SPARSE
    visible: Visible | None = None  # of ALL_KEYS and MOBA


_CONTEXT_PARALLEL = Decision(LayerPath.CONTEXT_PARALLEL, "context_parallel shares each sequence among processes")
_FULL = Decision(LayerPath.FULL, "the layer uses full attention")
_LOCAL = Decision(LayerPath.FULL, "the call is for a window or a chunk of keys")
_DECODING_FULL = Decision(LayerPath.DECODING_FULL, 'tokens are generated, and decode="full" lets them read all keys')
_DRAFTS_REASON = 'the last tokens are drafts to be verified, and decode="full" lets them read all keys'
_SPARSE_REASON = 'tokens are generated, and decode="sparse" lets them read their top_k blocks'
_ALL_KEYS_REASON = "there are at most top_k blocks, so that every query reads all keys up to itself"
_MOBA_REASON = "there are more blocks than a query reads"
_ASKED_REASON = 'implementation="eager" or "naive" is asked for by its name'
_SEQUENCES_REASON = "the call is not causal, or has packed sequences"


def decide(call: LayerCall) -> Decision:
    """The path of a call.

    Raises ValueError for what MoBA does not support: attention dropout or weights without "moba_naive", custom masks, biases.
    """
    if context_of(call.layer) is not None:
        return _CONTEXT_PARALLEL
    if call.attention == "full":
        return _FULL
    if (isinstance(call.mask, MobaMask) and call.mask.is_local) or call.kwargs.get("sliding_window") is not None:
        return _LOCAL
    if call.settings.decode == "full" and (n := n_decoded(call)):
        return _DECODING_FULL if n == call.query.shape[2] else Decision(LayerPath.DRAFTS_FULL, _DRAFTS_REASON, n_decoded=n)
    return decide_sparse(call)


def decide_sparse(call: LayerCall) -> Decision:
    """The path of a call that is known not to use full attention."""
    check_supported(call)
    settings = call.settings
    if settings.decode == "sparse" and isinstance(call.mask, MobaMask) and not _needs_other_than_decoding(call):
        positions = call.mask.positions(call.query, call.key)
        if positions is not None:
            return Decision(LayerPath.DECODING_SPARSE, _SPARSE_REASON, positions=positions)
    visible = call.visible(call.query, call.key)
    if visible.cu_seqlens is not None or not visible.causal:  # the original attention might ignore packed sequences
        return Decision(LayerPath.MOBA, _SEQUENCES_REASON, visible=visible)
    if not reads_all_keys(visible.n_key, settings.block_size, settings.top_k):
        return Decision(LayerPath.MOBA, _MOBA_REASON, visible=visible)
    if call.naive or settings.implementation == "eager":
        return Decision(LayerPath.MOBA, _ASKED_REASON, visible=visible)
    return Decision(LayerPath.ALL_KEYS, _ALL_KEYS_REASON, visible=visible)


def n_decoded(call: LayerCall, cached: int | None = None) -> int:
    """How many of the last new tokens count as decoding: a token that is alone, or drafts to be verified.

    Drafts that follow a single token, the last accepted one, count as decoding together with it. `cached` is the number of cached tokens,
    if it does not follow from the keys.
    """
    new, mask = call.query.shape[2], call.mask
    cached = call.key.shape[2] - new if cached is None else cached
    is_part = isinstance(mask, MobaMask) and mask.is_part  # the last tokens of a prompt, for example
    if new == 1 and not is_part:
        return int(cached > 0)
    if not call.drafts or not isinstance(mask, MobaMask):
        return 0
    return new if cached and call.drafts >= new - 1 and not is_part else min(call.drafts, new - 1)


def check_supported(call: LayerCall) -> None:
    """Raise ValueError if a layer asks for what MoBA does not support."""
    for name in UNKNOWN_TO_MOBA:
        if call.kwargs.get(name) is not None:
            raise ValueError(f'{call.name} passes {name}, which MoBA cannot follow: use set_attention(model, "full")')
    if call.dropout and not call.naive:
        raise ValueError(
            f"{call.name} has an attention dropout of {call.dropout} in training, which MoBA does not do: load the model "
            'with that dropout set to 0 (of most models attention_dropout=0.0), or use "moba_naive"'
        )
    if call.wants_weights and not call.naive:
        raise ValueError('output_attentions=True asks for attention weights, which MoBA never builds: set it to False, or use "moba_naive"')


def _needs_other_than_decoding(call: LayerCall) -> bool:
    """Whether a call needs the reference implementation, attention weights, dropout or gradients: sparse decoding has none of them."""
    wants_gradients = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # exported programs compute none
    return bool(call.naive or call.wants_weights or call.dropout or wants_gradients)
