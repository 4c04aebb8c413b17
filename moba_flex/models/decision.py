"""What one call of an attention layer does, decided here and nowhere else.

| path | when |
|---|---|
| context parallel | the layer works on a slice of each sequence |
| full | the layer uses full attention, or the call is for a window or a chunk |
| decoding full | tokens are generated, and `decode="full"` |
| drafts full | the same for the last tokens of a call alone: drafts that share it with a prompt |
| decoding sparse | tokens are generated, and `decode="sparse"` |
| all keys | every query reads all keys up to itself, which the original attention computes in less time |
| moba | all others |

H query heads, G key heads, Nq queries, Nk keys, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from ..backends.paths import reads_all_keys
from ..config import MobaConfig
from ..core.settings import AttentionSettings
from .layers import UNKNOWN_TO_MOBA
from .masks import MobaMask, Places, Visible
from .state import context_of

if TYPE_CHECKING:
    from .upstream import AttentionLayer


class LayerPath(Enum):
    """What a layer's call does."""

    CONTEXT_PARALLEL = "context parallel"
    FULL = "full"
    DECODING_FULL = "decoding full"
    DRAFTS_FULL = "drafts full"
    DECODING_SPARSE = "decoding sparse"
    ALL_KEYS = "all keys"
    MOBA = "moba"


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of an attention layer, as transformers makes it."""

    layer: AttentionLayer
    query: Tensor  # [B, H, Nq, D]
    key: Tensor  # [B, G, Nk, D], cached ones too
    value: Tensor  # [B, G, Nk, Dv]
    mask: MobaMask | Tensor | BlockMask | None
    settings: MobaConfig
    attention: str  # "full", "moba" or "moba_naive"
    cache: Cache | None  # where keys and values come from, if the layer was told
    drafts: int  # how many of the last tokens are drafts that may share the call with a prompt
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
        return bool(self.kwargs.get("output_attentions", getattr(self.layer.config, "output_attentions", False)))

    def visible(self, query: Tensor, key: Tensor) -> Visible:
        """Who may see whom. Raises ValueError for what MoBA cannot express."""
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


@dataclass(frozen=True)
class Decision:
    """Which path a call takes, why, and what was found out on the way."""

    path: LayerPath
    reason: str
    n_decoded: int = 0  # of DRAFTS_FULL: how many of the last tokens
    places: Places | None = None  # of DECODING_SPARSE
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

    Raises ValueError for what MoBA cannot do: attention dropout or weights without "moba_naive", custom masks, biases.
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
    """The same for a call of which it is known that it is for MoBA."""
    check_supported(call)
    settings = call.settings
    if settings.decode == "sparse" and isinstance(call.mask, MobaMask) and not _needs_other_than_decoding(call):
        places = call.mask.places(call.query, call.key)
        if places is not None:
            return Decision(LayerPath.DECODING_SPARSE, _SPARSE_REASON, places=places)
    visible = call.visible(call.query, call.key)
    if visible.cu_seqlens is not None or not visible.causal:  # the original attention need not know of packed sequences
        return Decision(LayerPath.MOBA, _SEQUENCES_REASON, visible=visible)
    if not reads_all_keys(visible.n_key, AttentionSettings(settings.block_size, settings.top_k)):
        return Decision(LayerPath.MOBA, _MOBA_REASON, visible=visible)
    if call.naive or settings.implementation == "eager":
        return Decision(LayerPath.MOBA, _ASKED_REASON, visible=visible)
    return Decision(LayerPath.ALL_KEYS, _ALL_KEYS_REASON, visible=visible)


def n_decoded(call: LayerCall, cached: int | None = None) -> int:
    """How many of the new tokens count as decoding, at the end of them: one that is alone, and drafts that are to be verified.

    Drafts behind a single token, the last one that was accepted, are decoding together with it. `cached` is how many tokens are cached,
    where it does not follow from the keys.
    """
    new, mask = call.query.shape[2], call.mask
    cached = call.key.shape[2] - new if cached is None else cached
    is_part = isinstance(mask, MobaMask) and mask.is_part  # of a prompt, say, whose last tokens alone go through this layer
    if new == 1 and not is_part:
        return int(cached > 0)
    if not call.drafts or not isinstance(mask, MobaMask):
        return 0
    return new if cached and call.drafts >= new - 1 and not is_part else min(call.drafts, new - 1)


def check_supported(call: LayerCall) -> None:
    """ValueError if a layer asks for what MoBA cannot do."""
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
    """Whether a call wants the specification, attention weights, dropout or gradients, which decoding does not do."""
    wants_gradients = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # a program that is exported computes none
    return bool(call.naive or call.wants_weights or call.dropout or wants_gradients)
