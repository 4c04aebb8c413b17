"""The attention mask of one forward pass, kept in the form in which the model requested it.

A model requests its masks before its first layer, and layers need them in different forms. MoBA needs a few integers per row; a layer with
full or sliding-window attention needs the dense mask that it always had. `MobaMask` stores the request and builds each form when a layer
first needs it. Nothing quadratic is built unless such a layer needs it.

B batch, N tokens (Nq queries, Nk keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core import validation
from ..core.messages import kind_of
from ..core.upstream import assert_in_graph, mark_dynamic
from ..ops.decoding import MAX_DECODE_TOKENS
from .current_call import PLAIN, ModelCall, current_call
from .layers import MOBA, asks_for_weights
from .recomputation import may_be_recomputation
from .upstream import bidirectional_mask_function, causal_mask_function, implementation_of, mask_builder, mtp_offset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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


_CANNOT_USE_MOBA = "the model cannot use MoBA, so load it with another attn_implementation"

_Index = int | slice | Tensor


class MobaMask(BlockMask):
    """The mask of one forward pass, created by `moba_mask` and read by the attention function of each layer.

    It is a BlockMask in name only: of the mask types that transformers passes through a model unchanged, it is the only one that need not
    be a tensor.
    """

    def __init__(self, request: dict[str, Any], call: ModelCall = PLAIN) -> None:
        _check_shape(request)
        self.call = call
        # A static cache updates its token count in place, before the layers read it here.
        if isinstance(request["q_offset"], Tensor):
            request["q_offset"] = request["q_offset"].clone()
        self._request = request
        self._lengths = request["q_length"], request["kv_length"]
        self._original: dict[str, Tensor | BlockMask | None] = {}
        self._split: dict[int, tuple[MobaMask, MobaMask]] = {}
        self._visible: Visible | None = None
        self._asked: tuple[object, bool] | None = None
        self.is_part = False  # the call has more new tokens than this mask covers
        # generate creates the mask before it calls a compiled model: the graph must not need tensors whose shapes change with each token.
        self._positions = None if torch.compiler.is_compiling() else _decoding_positions(request)
        if isinstance(request["q_offset"], Tensor) and not torch.compiler.is_compiling() and request.get("attention_mask") is not None:
            _check_whole(request["attention_mask"])
            mark_dynamic(request["attention_mask"], 1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._request["batch_size"], 1, *self._lengths

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    @property
    def is_local(self) -> bool:
        """Whether it was requested for sliding-window or chunked attention."""
        return self._request.get("local_size") is not None

    def is_of_drafting_layer(self, layer_idx: int) -> bool:
        """Whether it was created for a layer of multi-token prediction, see `upstream.mtp_offset`."""
        return self._request["kv_offset"] == mtp_offset(layer_idx)

    def asks_for_weights(self, config: PreTrainedConfig) -> bool:
        """`output_attentions` of the layers' configuration. It is read once: configurations look up attributes in Python code."""
        if self._asked is not None and self._asked[0] is config:
            return self._asked[1]
        asks = asks_for_weights(config)
        if _may_keep():
            self._asked = config, asks
        return asks

    def original(self, implementation: str, device: torch.device) -> Tensor | BlockMask | None:
        """Exactly the mask that the model would have without MoBA, under `implementation`."""
        if implementation in self._original:
            mask = self._original[implementation]
        else:
            build = mask_builder(implementation)
            mask = None if build is None else build(**self._request)
            if _may_keep():
                self._original[implementation] = mask
        return mask if mask is None else mask.to(device)

    def visible(self, query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, key_cu_seqlens: Tensor | None = None) -> Visible:
        """The mask in the form that MoBA takes. This reads values, so it is computed once for all layers.

        Raises ValueError for what MoBA does not support: custom masks, padding inside a row, dropped keys, packed sequences that do not
        fit.
        """
        got = query.shape[2], key.shape[2]
        if got != self._lengths:
            raise ValueError(
                f"a layer has {got[0]} queries and {got[1]} keys, but the model's mask is for {self._lengths[0]} and "
                f"{self._lengths[1]}: MoBA needs a cache that returns all keys, and an attention_mask of their length"
            )
        visible = self._visible
        if visible is None:
            packed = self.call.packed if cu_seqlens is None else (cu_seqlens, key_cu_seqlens)
            visible = _read(self._request).packed(query, *packed)
            if _may_keep():
                self._visible = visible
        return visible if query.device == self._request["device"] else visible.to(query.device)

    def positions(self, query: Tensor, key: Tensor) -> DecodingPositions | None:
        """The mask in the form that decoding takes; None if this is not decoding: a few causal tokens after cached ones."""
        if query.shape[2] == key.shape[2] or self._lengths != (query.shape[2], key.shape[2]):
            return None
        causal = self._request.get("mask_function", causal_mask_function) is causal_mask_function
        if not causal and (torch.compiler.is_compiling() or not self.visible(query, key).causal):
            return None
        positions = _decoding_positions(self._request) if self._positions is None else self._positions
        if positions is None:
            return None
        if not torch.compiler.is_compiling() and self.visible(query, key).padding_mask is None:
            positions = DecodingPositions(positions.length, None)
        return positions if query.device == self._request["device"] else positions.to(query.device)

    def of_call(self, call: ModelCall) -> MobaMask:
        """The same mask for a call of a model, if it was made before that call."""
        return self if call.is_plain() else MobaMask(dict(self._request), call)

    def split(self, n_last: int) -> tuple[MobaMask, MobaMask]:
        """The masks of all tokens but the last `n_last`, as if those did not exist yet, and of the last `n_last`."""
        if n_last not in self._split:
            request = dict(self._request)
            first, rest = request["q_length"] - n_last, request["kv_length"] - n_last
            padding = request.get("attention_mask")
            before = {"q_length": first, "kv_length": rest, "attention_mask": None if padding is None else padding[:, :rest]}
            last = {"q_length": n_last, "q_offset": request["q_offset"] + first}
            # transformers omits the mask of a single query unless the cache has keys that are not yet written. It decided that for the
            # whole request.
            if isinstance(request["q_offset"], Tensor) or request["q_offset"] + request["q_length"] < request["kv_length"]:
                request["allow_is_causal_skip"] = False
            self._split[n_last] = MobaMask({**request, **before}, self.call), MobaMask({**request, **last}, self.call)
        return self._split[n_last]

    def __getitem__(self, index: _Index | tuple[_Index, ...]) -> MobaMask:
        """The mask of the last n queries, `mask[:, :, -n:, :]`. Models whose last layers write no keys compute only these queries there."""
        every, n_query = slice(None), self._lengths[0]
        if not isinstance(index, tuple) or len(index) < 3 or not isinstance(index[2], slice):
            raise self._unknown("[...]")
        rows, others = index[2], (*index[:2], *index[3:])
        n_last = len(range(n_query)[rows])
        if any(other != every for other in others) or range(n_query)[rows] != range(n_query - n_last, n_query):
            raise self._unknown("[...]")
        if n_last == n_query:
            return self
        part = self.split(n_last)[1]
        part.is_part = True
        return part

    def to(self, *args: Any, **kwargs: Any) -> MobaMask:
        return self  # moved when a layer reads it

    def contiguous(self) -> MobaMask:
        return self

    def __repr__(self) -> str:
        return f"MobaMask(shape={self.shape})"

    __str__ = __repr__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        request = next(_masks_in((*args, *(kwargs or {}).values())))._request
        config = request.get("config")
        if may_be_recomputation() or (config is not None and implementation_of(config) not in MOBA):
            raise_switched(_owner(request))
        raise ValueError(  # not TypeError, which tensor operators swallow
            f"the code of {_owner(request)} computes with its attention mask, which MoBA does not build: {_CANNOT_USE_MOBA}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise self._unknown(repr(name))

    def _unknown(self, what: str) -> AttributeError:
        owner = _owner(self._request)
        return AttributeError(f"the code of {owner} reads {what} of its attention mask, which MoBA does not build: {_CANNOT_USE_MOBA}")


def _masks_in(values: Iterable[Any]) -> Iterator[MobaMask]:
    """The masks among the arguments of a function, also in lists of tensors."""
    for value in values:
        if isinstance(value, MobaMask):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _masks_in(value)


def _owner(request: dict[str, Any]) -> str:
    """For messages: the owner of a mask, by the configuration in transformers' request."""
    config = request.get("config")
    return "a model" if config is None else f"a model with {kind_of(config)}"


def raise_switched(owner: str) -> NoReturn:
    """Raise because other attention got a mask of MoBA: layers were switched after the pass had made it."""
    if may_be_recomputation():
        raise ValueError(  # not TypeError, which tensor operators swallow
            f"a checkpoint computes {owner} again, whose attention was switched after its forward pass: backward must come before "
            "set_attention, full_attention or unpatch change what the forward pass used"
        )
    raise ValueError(
        f"the attention of {owner} was switched within a pass, after its mask was built for MoBA: set_attention, full_attention and "
        "unpatch, in a hook or another thread, must wait for the end of the pass"
    )


def _may_keep() -> bool:
    """Whether to keep results for later layers. Not in a training graph: a checkpointed graph must have no side effects."""
    return not (torch.compiler.is_compiling() and torch.is_grad_enabled())


def moba_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, **request: Any) -> MobaMask:
    """The mask function of "moba" and "moba_naive", called by transformers' `create_causal_mask` and similar functions."""
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    request = {**sizes, "q_offset": q_offset, "kv_offset": kv_offset, "device": torch.device("cpu"), **request}
    call = current_call()
    if call.all_real and request.get("mask_function", causal_mask_function) is causal_mask_function:  # not of an encoder's keys
        request["attention_mask"] = None
    return MobaMask(request, call)


def _read(request: dict[str, Any]) -> Visible:
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


def _check_shape(request: dict[str, Any]) -> None:
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
    if torch.compiler.is_compiling():  # a graph cannot read values: it neither skips nor checks padding
        return padding_mask
    if padding_mask.all():
        return None
    _check_whole(padding_mask)
    return padding_mask


def _check_whole(attention_mask: Tensor) -> None:
    if (F.pad(attention_mask.bool(), (1, 0)).int().diff(dim=1) > 0).sum(1).max() > 1:
        raise ValueError(
            "attention_mask has a row with padding between real tokens: MoBA takes padding on the left or the right "
            "(behind the virtual tokens of PEFT's prompt tuning only on the right)"
        )


def _starts(padding_mask: Tensor | None) -> tuple[int, ...] | None:
    if padding_mask is None or torch.compiler.is_compiling() or padding_mask[:, 0].all():
        return None
    return tuple(_first_real(padding_mask).tolist())


def _first_real(attention_mask: Tensor) -> Tensor:
    """`[B]` int64: the number of padding tokens at the start of each row."""
    return (attention_mask.cumsum(1) == 0).sum(1)


def _decoding_positions(request: dict[str, Any]) -> DecodingPositions | None:
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
