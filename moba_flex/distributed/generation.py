"""Calls of a context-parallel model with a cache, as `generate` makes them. All processes are called with the same whole sequence.

A prompt is cut into slices before the first layer. After the last layer, the hidden states that the model's head needs are sent to all
processes. Tokens after the prompt are computed by every process. Three things keep the processes on the same tokens: before each call they
compare their inputs, and adopt the first process's random number generator state; after it they adopt its logits.

B batch, n new tokens, W processes, L tokens of a slice, V vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from ..config import MobaConfig
from ..models.call_hooks import heads_of, stacks_of
from ..models.layers import format_layers, n_layers
from ..models.state import context_of
from ..models.upstream import DRAFTED_POSITIONS, cache_argument, cache_in
from .cache import SharedLayer, share, shared_layer
from .collectives import all_reduce_sum, broadcast_first
from .placement import Placement

if TYPE_CHECKING:
    from ..models.upstream import AttentionLayer
    from .context_parallel import ContextParallel

_Changed = tuple[tuple[Any, ...], dict[str, Any]] | None
# Arguments that may be tensors in a call with a cache. Any other tensor would have to be cut too.
_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels", DRAFTED_POSITIONS)


@dataclass(frozen=True)
class Call:
    """One call with a cache."""

    first: int  # tokens that are already cached
    n_tokens: int
    n_states: int  # number of last tokens whose hidden states are needed
    placement: Placement | None  # None: not a prompt
    cache: weakref.ref[DynamicCache]  # its owner decides how long it lives


class Generation:
    """The hooks that let a context-parallel model use a cache, and the state of the current call."""

    def __init__(self, context: ContextParallel, layers: list[AttentionLayer]) -> None:
        self._context, self._layers = context, layers
        self.call: Call | None = None  # None: a call with a slice, see `ContextParallel.shard`
        self._wanted = 0  # how many logits are requested of the model's head; 0: all

    def __deepcopy__(self, _memo: dict[int, Any]) -> Generation:
        return self  # a copied model is shared by the same processes

    def add_hooks(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        handles: list[torch.utils.hooks.RemovableHandle] = []
        for stack in stacks_of(model):
            handles.append(stack.register_forward_pre_hook(self._before_stack, with_kwargs=True))
            handles.append(stack.register_forward_hook(self._after_stack))
        for head in heads_of(model):
            handles.append(head.register_forward_pre_hook(self._before_head, with_kwargs=True))
            handles.append(head.register_forward_hook(self._after_head, always_call=True))
        return handles

    def cached_keys(self, layer: AttentionLayer) -> SharedLayer | None:
        """This process's part of a layer's cached keys; None if the current call has no cache."""
        return None if self.call is None else shared_layer(self.call.cache(), layer)

    def _before_head(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get(DRAFTED_POSITIONS)
        self._wanted = wanted if isinstance(wanted, int) else 0  # a tensor selects positions: keep all

    def _after_head(self, model: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        self._wanted = 0
        logits = out.get("logits") if isinstance(out, ModelOutput) else None
        if self.call is None or logits is None or not self._is_of(model):
            return None
        out["logits"] = broadcast_first(logits, self._context.group)
        return out

    def _before_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed:
        self.call = None
        if torch.compiler.is_compiling() or not self._is_of(stack):
            return None
        names = list(inspect.signature(stack.forward).parameters) if args else []
        named = {**dict(zip(names, args)), **kwargs}
        use_cache = named.get("use_cache")
        use_cache = getattr(stack.config, "use_cache", False) if use_cache is None else use_cache
        if cache_in(named) is None and not use_cache:
            self._check_slice(named)
            return None
        return (), self._begin(stack, named)

    def _after_stack(self, stack: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        """Collect a prompt's hidden states that are needed from the processes that computed them."""
        call = self.call
        if call is None or call.placement is None or not self._is_of(stack):
            return None
        hidden, length = out["last_hidden_state"], call.placement.slice_length
        begin, first = self._context.rank * length, call.n_tokens - call.n_states
        mine = range(max(begin, first), min(begin + length, call.n_tokens))
        wanted = hidden.new_zeros(hidden.shape[0], call.n_states, *hidden.shape[2:])
        if mine:
            wanted[:, mine.start - first : mine.stop - first] = hidden[:, mine.start - begin : mine.stop - begin]
        out["last_hidden_state"] = all_reduce_sum(wanted, self._context.group)
        return out

    def _is_of(self, model: nn.Module) -> bool:
        """Whether a model's layers belong to this context: a copied model may have hooks of an earlier one."""
        contexts = (context_of(module) for module in model.modules())
        return next((context for context in contexts if context is not None), None) is self._context

    def _check_slice(self, named: Mapping[str, Any]) -> None:
        """Without gradients: check that a call is for a slice. `generate(use_cache=False)` would give all processes the whole sequence."""
        if torch.is_grad_enabled():
            return
        position, x = named.get("position_ids"), _tokens(named)
        right = position is not None and x is not None and int(position.flatten()[0]) == self._context.rank * x.shape[1]
        if not all(told for (told,) in self._context.gather_or_raise(None, [right], "")):
            raise ValueError(
                "a context-parallel model without a cache is called with what `ContextParallel.shard` returns, but position_ids do not "
                "begin where a process's slice does: to call it with whole sequences, as generate does, leave use_cache=True"
            )

    def _begin(self, stack: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
        """The stack's new arguments: for a prompt, this process's slice. Announces the new tokens to the cache."""
        error, read = None, (0, 0, 0, 0)
        try:
            cache, first, x = self._read(stack, named)
            read = (*x.shape[:2], first, checksum(x))
        except Exception as wrong:  # of any kind: the other processes wait for this one's result
            error = wrong
        device = next(stack.parameters()).device
        random = _random_numbers(device)
        what = "a call of a context-parallel model failed"
        every = self._context.gather_or_raise(error, [*read, *random], what)
        if any(x[:4] != every[0][:4] for x in every):
            calls = "; ".join(f"process {i}: {x[0]} x {x[1]} behind {x[2]}, checksum {x[3]}" for i, x in enumerate(every))
            raise ValueError(
                f"all {self._context.size} processes of a sequence must be called with the same tokens, but are not ({calls}): pass the "
                "same prompt, and do nothing between calls that changes the tokens of one process alone"
            )
        if random != every[0][4:]:
            _set_random_numbers(every[0][4:], device)
        return self._cut(stack, named, cache, first, x)

    def _read(self, stack: nn.Module, named: dict[str, Any]) -> tuple[Any, int, Tensor]:
        """The cache, how many tokens it holds, and the new tokens. Raises ValueError for calls that cannot be distributed."""
        if torch.is_grad_enabled():
            raise ValueError(
                "a context-parallel model was called with gradients but without a cut batch: call it with what `ContextParallel.shard` "
                "returns; or, to generate, under torch.no_grad()"
            )
        x = _tokens(named)
        if x is None or not x.shape[0] * x.shape[1]:
            raise ValueError("a context-parallel model was called without tokens: pass input_ids [B, N]")
        counts = Counter(layer.layer_idx for layer in self._layers)
        if several := sorted(i for i, n in counts.items() if n > 1):
            raise ValueError(
                f"{type(stack).__name__} has several attention layers with the number {format_layers(several)}, whose keys a cache would "
                "mix up: it cannot be context-parallel with a cache"
            )
        unknown = [name for name, value in named.items() if isinstance(value, Tensor) and name not in _TENSORS]
        if unknown:
            raise ValueError(f"a context-parallel model that keeps its keys cannot share out {', '.join(unknown)}: leave it out")
        asked = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
        for name, usual in asked.items():
            if (given := named.get(name, getattr(stack.config, name, usual))) not in (usual, None):
                raise ValueError(f"a context-parallel model that keeps its keys needs {name}={usual}, but got {given}")
        cache = cache_in(named)
        cache = DynamicCache(config=self._layers[0].config) if cache is None else cache
        first = share(cache, n_layers(self._layers[0]))[0].get_seq_length()
        _check_places(named, first, x.shape[1])
        return cache, first, x

    def _cut(self, stack: nn.Module, named: dict[str, Any], cache: DynamicCache, first: int, x: Tensor) -> dict[str, Any]:
        context, n = self._context, x.shape[1]
        wanted, placement = min(self._wanted or n, n), None
        position = torch.arange(first, first + n, device=x.device)
        if not first:
            placement = Placement(context.rank, context.size, MobaConfig.of(self._layers[0].config).block_size, n)
            length = placement.slice_length
            mine = slice(context.rank * length, (context.rank + 1) * length)
            padding = context.size * length - n
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))[:, mine]
            position = F.pad(position, (0, padding), value=n - 1)[mine]  # padding may have any position
        for layer in share(cache, n_layers(self._layers[0])):
            layer.shared.announce(n, placement)
        self.call = Call(first, n, wanted, placement, weakref.ref(cache))
        name = "input_ids" if named.get("input_ids") is not None else "inputs_embeds"
        new = {name: x, "position_ids": position.expand(x.shape[0], -1), "attention_mask": None, "use_cache": True}
        caches = dict.fromkeys(("cache", "past_key_values"))
        kept = {key: value for key, value in named.items() if key not in caches and key != "cache_position"}
        return {**kept, **new, cache_argument(stack): cache}


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    """The token ids `[B, n]`, or the embeddings `[B, n, D]`."""
    x = named.get("input_ids")
    return named.get("inputs_embeds") if x is None else x


def _check_places(named: Mapping[str, Any], first: int, n: int) -> None:
    mask, position = named.get("attention_mask"), named.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == first + n and mask.bool().all()):
        raise ValueError(
            f"attention_mask of a context-parallel model that keeps its keys must be ones for all {first + n} tokens, cached ones too: "
            "rows of a batch must have the same length, without padding; where generate takes a token of the text for padding, pass "
            "attention_mask=torch.ones_like(input_ids)"
        )
    expected = torch.arange(first, first + n, device=None if position is None else position.device)
    if position is not None and (position.dim() > 2 or position.shape[-1] != n or (position != expected).any()):
        raise ValueError(
            f"position_ids of a context-parallel model that keeps its keys must count from {first} to {first + n - 1}: packed sequences "
            "and positions of several dimensions cannot be shared out"
        )


def checksum(x: Tensor | None) -> int:
    """A value to compare tensors across processes. For integers it depends on their order too. 0 for None."""
    if x is None:
        return 0
    if x.is_floating_point():
        return int(x.sum(dtype=torch.float64).view(torch.int64))
    x = x.flatten().long()
    return int((x * (2 * torch.arange(len(x), device=x.device) + 1)).sum()) % 2**31 + 1


def _random_numbers(device: torch.device) -> list[int]:
    """The state of the device's random number generator, as int64."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return F.pad(state, (0, -len(state) % 8)).view(torch.int64).tolist()


def _set_random_numbers(numbers: list[int], device: torch.device) -> None:
    state = torch.tensor(numbers).view(torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[: len(torch.cuda.get_rng_state(device))], device)
    else:
        torch.set_rng_state(state[: len(torch.get_rng_state())])
