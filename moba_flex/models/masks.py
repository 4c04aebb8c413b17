"""The attention mask of one forward pass, kept in the form in which the model requested it.

A model requests its masks before its first layer, and layers need them in different forms. MoBA needs a few integers per row; a layer with
full or sliding-window attention needs the dense mask that it always had. `MobaMask` stores the request and builds each form when a layer
first needs it. Nothing quadratic is built unless such a layer needs it.

B batch, N tokens (Nq queries, Nk keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core.messages import kind_of
from ..core.upstream import mark_dynamic
from .current_call import PLAIN, ModelCall, current_call
from .layers import MOBA, asks_for_weights
from .recomputation import may_be_recomputation
from .upstream import causal_mask_function, implementation_of, mask_builder, mtp_offset
from .visible import DecodingPositions, Visible, check_shape, check_whole, decoding_positions, read_visible

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .repeated_call import OriginalCall

_CANNOT_USE_MOBA = "the model cannot use MoBA, so load it with another attn_implementation"

_Index = int | slice | Tensor


class MobaMask(BlockMask):
    """The mask of one forward pass, created by `moba_mask` and read by the attention function of each layer.

    It is a BlockMask in name only: of the mask types that transformers passes through a model unchanged, it is the only one that need not
    be a tensor.
    """

    def __init__(self, request: dict[str, Any], call: ModelCall = PLAIN) -> None:
        check_shape(request)
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
        self.original_call: OriginalCall | None = None  # what later layers may repeat
        self.is_part = False  # the call has more new tokens than this mask covers
        # generate creates the mask before it calls a compiled model: the graph must not need tensors whose shapes change with each token.
        self._positions = None if torch.compiler.is_compiling() else decoding_positions(request)
        if isinstance(request["q_offset"], Tensor) and not torch.compiler.is_compiling() and request.get("attention_mask") is not None:
            check_whole(request["attention_mask"])
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
    def config(self) -> PreTrainedConfig | None:
        """The configuration that it was requested with."""
        return self._request.get("config")

    @property
    def is_local(self) -> bool:
        """Whether it was requested for sliding-window or chunked attention."""
        return self._request.get("local_size") is not None

    def is_of_drafting_layer(self, layer_idx: int) -> bool:
        """Whether it was created for a layer of multi-token prediction, see `upstream.mtp_offset`."""
        return self._request["kv_offset"] == mtp_offset(layer_idx)

    def asks_for_weights(self, config: PreTrainedConfig) -> bool:
        """`output_attentions` of the call or, if it does not say, of the layers' configuration.

        The latter is read once: configurations look up attributes in Python code.
        """
        if self.call.wants_weights is not None:
            return self.call.wants_weights
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
            visible = read_visible(self._request).packed(query, *packed)
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
        positions = decoding_positions(self._request) if self._positions is None else self._positions
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
        config = next(_masks_in((*args, *(kwargs or {}).values()))).config
        if may_be_recomputation() or (config is not None and implementation_of(config) not in MOBA):
            raise_switched(_owner(config))
        raise ValueError(  # not TypeError, which tensor operators swallow
            f"the code of {_owner(config)} computes with its attention mask, which MoBA does not build: {_CANNOT_USE_MOBA}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise self._unknown(repr(name))

    def _unknown(self, what: str) -> AttributeError:
        owner = _owner(self.config)
        return AttributeError(f"the code of {owner} reads {what} of its attention mask, which MoBA does not build: {_CANNOT_USE_MOBA}")


def _masks_in(values: Iterable[Any]) -> Iterator[MobaMask]:
    """The masks among the arguments of a function, also in lists of tensors."""
    for value in values:
        if isinstance(value, MobaMask):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _masks_in(value)


def _owner(config: PreTrainedConfig | None) -> str:
    """For messages: the owner of a mask that was requested with this configuration."""
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
    call = current_call(request.get("config"))
    if call.all_real and request.get("mask_function", causal_mask_function) is causal_mask_function:  # not of an encoder's keys
        request["attention_mask"] = None
    return MobaMask(request, call)
