"""What the queries of a pass see, read from the mask that a model requests of transformers, in the forms that MoBA takes.

Reading looks at values, so it is done once for all layers: see `MobaMask` in `masks.py`, which keeps the results.

B batch, N tokens (Nq queries, Nk keys).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import validation
from ..core.upstream import assert_in_graph
from ..ops.decoding import MAX_DECODE_TOKENS
from .upstream import bidirectional_mask_function, causal_mask_function


@dataclass(frozen=True)
class Visible:
    """The visibility of keys to queries, as `moba_flex.dispatch.attend` takes it."""

    n_key: int  # keys so far; a static cache has more, not yet written
    causal: bool = True
    padding_mask: Tensor | None = None  # [B, n_key] bool; None: all tokens are real
    cu_seqlens: Tensor | None = None  # [n + 1] int32, over the concatenated tokens of all rows; None: each row is one sequence
    longest: int | None = None  # length of the longest packed sequence; None: not packed, or unknown in a compiled graph
    starts: tuple[int, ...] | None = None  # first real token of each row; None: 0 for all rows, or unknown in a compiled graph

    def start(self, device: torch.device) -> Tensor | None:
        """`[B]` int64: the first real token of each row, also in a compiled graph; None: 0 for all rows."""
        if self.starts is not None:
            return torch.tensor(self.starts, device=device)
        return None if self.padding_mask is None else _first_real(self.padding_mask)

    def packed(self, query: Tensor, cu_seqlens: Tensor | None, key_cu_seqlens: Tensor | None) -> Visible:
        """Add the packed sequences that a call passes itself, as for FlashAttention. They override those that transformers finds in
        `position_ids`. Without `cu_seqlens` nothing changes.

        Raises ValueError or TypeError if they do not fit.
        """
        if cu_seqlens is None:
            return self
        n_tokens = query.shape[0] * query.shape[2]
        longest = validation.check_cu_seqlens("cu_seq_lens_q", cu_seqlens, query, n_tokens)
        if self.n_key != query.shape[2]:
            raise ValueError(
                f"cu_seq_lens_q is for packed sequences without cached keys, but there are {query.shape[2]} queries and {self.n_key} keys"
            )
        if self.padding_mask is not None:
            raise ValueError("attention_mask has padding, but cu_seq_lens_q packs sequences without padding: pass one of the two")
        unread = torch.compiler.is_compiling() or not validation.have_values(cu_seqlens)
        if not (unread or key_cu_seqlens is None or torch.equal(cu_seqlens, key_cu_seqlens)):
            raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q, since MoBA is self-attention, but does not")
        return replace(self, cu_seqlens=cu_seqlens.int(), longest=longest)

    def to(self, device: torch.device) -> Visible:
        padding_mask, cu_seqlens = _moved(self.padding_mask, device), _moved(self.cu_seqlens, device)
        return Visible(self.n_key, self.causal, padding_mask, cu_seqlens, self.longest, self.starts)


@dataclass(frozen=True)
class DecodingPositions:
    """The positions of new tokens, as `moba_flex.decoding.decode` takes them: tensors that the host never reads."""

    length: Tensor | None  # 0-dimensional int64: number of tokens, including the new ones; None: all keys
    start: Tensor | None  # [B] int64: first real token of each row; None: 0

    def to(self, device: torch.device) -> DecodingPositions:
        return DecodingPositions(_moved(self.length, device), _moved(self.start, device))


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return x if x is None else x.to(device, non_blocking=True)


def read_visible(request: dict[str, Any]) -> Visible:
    """What a requested mask lets queries see. Raises ValueError for masks, caches and padding that MoBA does not support."""
    mask_function, attention_mask = request.get("mask_function", causal_mask_function), request.get("attention_mask")
    if request["kv_offset"]:
        raise ValueError("MoBA needs all keys from the first token on, but this cache has dropped some: use DynamicCache()")
    cached = _first_query(request)
    seen = cached + request["q_length"]
    if seen > request["kv_length"]:
        raise ValueError(f"MoBA's queries are the last of the keys, but query {seen - 1} meets only {request['kv_length']} keys")
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        padding_mask = _padding(attention_mask, seen)
        return Visible(seen, mask_function is causal_mask_function, padding_mask, starts=_starts(padding_mask))
    custom = request.get("use_vmap")
    cu_seqlens = None if custom else _sequences(mask_function, request["batch_size"], cached, seen, request["device"])
    padding_mask = None if custom else _padding(attention_mask, seen)
    if custom or (cu_seqlens is not None and (cached or padding_mask is not None)):
        raise ValueError(
            "MoBA cannot follow a custom mask function, only causal or bidirectional attention with padding or packed "
            'sequences: use set_attention(model, "full")'
        )
    if cu_seqlens is None:  # a mask that would join the tokens of an image, but there are none
        return Visible(seen, True, padding_mask, starts=_starts(padding_mask))
    return Visible(seen, True, None, cu_seqlens, int(cu_seqlens.diff().max()))


def _first_query(request: dict[str, Any]) -> int:
    """The position of the first query. An exported program cannot read it of a static cache, and takes whole prompts only."""
    offset = request["q_offset"]
    if isinstance(offset, Tensor) and torch.compiler.is_exporting():
        assert_in_graph(offset == 0, "an exported prompt must begin at the first position of its static cache")
        return 0
    return int(offset)


def check_shape(request: dict[str, Any]) -> None:
    """Raise ValueError if there is an attention_mask of another shape than (batch, tokens)."""
    mask, n_rows = request.get("attention_mask"), request["batch_size"]
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != n_rows):
        raise ValueError(
            f"attention_mask must have the shape (batch, tokens), here with a batch of {n_rows}, but has the shape {tuple(mask.shape)}"
        )


def _padding(attention_mask: Tensor | None, n_key: int) -> Tensor | None:
    """`[B, n_key]` bool; None if all tokens are real."""
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < n_key:
        raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, but must cover all {n_key}, cached ones too")
    padding_mask = attention_mask[:, :n_key].bool()
    if not _is_readable(padding_mask):  # padding is then neither skipped nor checked
        return padding_mask
    if padding_mask.all():
        return None
    check_whole(padding_mask)
    return padding_mask


def check_whole(attention_mask: Tensor) -> None:
    """Raise ValueError if a row has padding between its real tokens."""
    begins = (F.pad(attention_mask.bool(), (1, 0)).int().diff(dim=1) > 0).sum(1)
    if begins.max() > 1:
        raise ValueError(
            f"attention_mask has padding between real tokens in row {int(begins.argmax())}: MoBA takes padding on the left or the right, "
            "and behind the virtual tokens of PEFT's prompt tuning only on the right. generate() makes a mask from pad_token_id if it is "
            "given none: if all tokens are real, pass attention_mask=torch.ones_like(input_ids)"
        )


def _is_readable(mask: Tensor) -> bool:
    """Whether a mask has values that may be read: not within a traced graph, on the meta device or in FakeTensorMode."""
    return not (torch.compiler.is_compiling() or validation.is_without_values(mask))


def _starts(padding_mask: Tensor | None) -> tuple[int, ...] | None:
    if padding_mask is None or not _is_readable(padding_mask) or padding_mask[:, 0].all():
        return None
    return tuple(_first_real(padding_mask).tolist())


def _first_real(attention_mask: Tensor) -> Tensor:
    """`[B]` int64: the number of padding tokens at the start of each row."""
    return (attention_mask.cumsum(1) == 0).sum(1)


def decoding_positions(request: dict[str, Any]) -> DecodingPositions | None:
    """The positions of a requested mask's queries; None if there are more than decoding takes."""
    if request["q_length"] > MAX_DECODE_TOKENS:
        return None
    seen, attention_mask = request["q_offset"] + request["q_length"], request.get("attention_mask")
    length = None
    if isinstance(seen, Tensor):
        length = seen.to(torch.int64)
    elif seen != request["kv_length"]:
        length = torch.full((), seen, dtype=torch.int64, device=request["device"])
    return DecodingPositions(length, None if attention_mask is None else _first_real(attention_mask))


def _sequences(mask_function: Callable[..., Any], batch_size: int, cached: int, seen: int, device: torch.device) -> Tensor | None:
    """`cu_seqlens [n + 1]` of packed sequences in the tokens from `cached` to `seen`; None if each row is one sequence.

    In one sequence every token sees the one before it, also the last cached one.

    transformers finds packed sequences in `position_ids` and passes them on only inside a mask function. Calling it for neighbouring tokens
    is linear work.

    Raises ValueError if a token sees the next one, since the mask is then not causal.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(cached, seen, device=device)[None]
    first, later = token[:, :-1], token[:, 1:]
    if mask_function(row, torch.zeros_like(first), first, later).any():
        raise ValueError('MoBA cannot follow a mask in which tokens see later ones: use set_attention(model, "full")')
    follows = token if cached else later  # the tokens that have one before them
    joined = mask_function(row, torch.zeros_like(follows), follows, follows - 1).expand(batch_size, -1)
    if joined.all():
        return None
    begins = F.pad(~joined, (seen - cached - joined.shape[1], 0), value=True).flatten().nonzero()[:, 0]
    return F.pad(begins, (0, 1), value=batch_size * (seen - cached)).int()
