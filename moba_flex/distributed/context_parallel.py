"""Context parallelism for a transformers model: each process runs the whole model on its slice of every sequence.

Everything but attention works token by token. Only attention layers and the model's inputs depend on slices: positions count through the
whole sequence, and the label of a slice's last token is the first token of the next slice.

B batch, N tokens, W processes, L tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..config import MobaConfig
from ..core.messages import kind_of
from ..core.settings import AttentionSettings
from ..models.layers import attention_layers, config_of_layer, format_layers, is_patched, is_replaceable, name_attention
from ..models.state import context_of, set_context
from .attention import check_exchange, context_parallel_attention, full, group_of, sparse
from .cache import SharedLayer
from .collectives import gathered
from .decoding import attend_shared
from .generation import Generation, checksum

if TYPE_CHECKING:
    from ..models.upstream import AttentionLayer

_IGNORED = -100  # the label that PyTorch's cross entropy ignores
_WHOLE = (torch.int64, torch.int32)
_KNOWN = ("input_ids", "labels", "attention_mask", "position_ids")  # entries of a batch


def context_parallel(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup, *, exchange: str = "keys") -> ContextParallel:
    """Let a patched model work on sequences that are cut into slices, one per process.

    Args:
        model: a transformers model that uses MoBA, see `moba_flex.patch`. Layers with full attention become context-parallel too. FSDP2,
            DDP (also over this mesh's dimension) and activation checkpointing can be applied before or after, as to any model.
        mesh: a DeviceMesh with one dimension, or with several of which one is named "cp", such as `accelerator.torch_device_mesh` with
            `ParallelismConfig(cp_size=...)`; or a process group. Slices are in the order of the ranks in its group.
        exchange: "keys" or "heads", see `moba_attention_cp`.

    Returns:
        A `ContextParallel`, which cuts batches into slices. Its `remove()` ends context parallelism of the model. A model has at most one;
        a second call replaces the first one's.

        `model.generate`, and any call with a cache and without gradients, takes whole sequences, the same on all processes, and returns the
        same result on all. The prompt is cut into slices. The keys of a slice stay on its process, in a `DynamicCache`.

    Raises:
        ValueError: the model is not patched; it has a `key_conv`, or layers that cannot work on a slice, such as sliding-window or
            recurrent ones; the mesh has no suitable dimension, or this rank is not in it; `exchange` does not exist or the heads do not fit
            the number of processes. The model is left unchanged.
        TypeError: `mesh` is not a mesh or process group.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import patch
    >>> from moba_flex.distributed import context_parallel
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = patch(LlamaForCausalLM(tiny), block_size=4, top_k=2)
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: init_process_group()
    >>> cp = context_parallel(model, dist.group.WORLD)
    >>> ids = torch.arange(32)[None]
    >>> loss = model(**cp.shard({"input_ids": ids, "labels": ids})).loss
    >>> model.generate(ids, max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 35])
    >>> cp.remove()
    >>> dist.destroy_process_group()
    """
    layers = attention_layers(model)
    patched = [layer for layer in layers if is_patched([layer])]
    if not patched:
        raise ValueError(
            f"{type(model).__name__} does not use MoBA, whose attention layers context parallelism works through: patch it first"
        )
    _check_layers(model, patched)
    if any(hasattr(layer, "key_conv") for layer in patched):
        raise ValueError(f"{type(model).__name__} has key_conv, which would not see the keys before a slice: patch it with key_conv=0")
    group = group_of(mesh)
    for config in map(config_of_layer, patched):
        n_heads = config.num_attention_heads
        n_key_heads, shared = getattr(config, "num_key_value_heads", None) or n_heads, MobaConfig.of(config).share_selection
        check_exchange(exchange, n_heads, n_key_heads, group.size(), shared)
    for before in {context for layer in patched if (context := context_of(layer)) is not None}:
        before.remove()
    context = ContextParallel(group, exchange, patched)
    for layer in patched:
        set_context(layer, context)
    name_attention(patched)
    context.add_hooks(model)
    return context


def _check_layers(model: nn.Module, patched: list[AttentionLayer]) -> None:
    other = sorted({layer.layer_idx for layer in patched if not is_replaceable(layer)})
    if other:
        raise ValueError(
            f"{type(model).__name__} has layers that are not full causal self-attention: {format_layers(other)}. "
            "Context parallelism can exchange what full attention and MoBA need, not what other layers need"
        )
    types = getattr(patched[0].config, "layer_types", None) or ()
    recurrent = sorted({name for name in types if name not in ("full_attention", "attention")})
    if recurrent:
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(recurrent)}: they carry a state along the sequence, which "
            "would start anew in every slice"
        )


class ContextParallel:
    """The processes that share a model's sequences, created by `context_parallel`. `rank` is this process's index, `size` their number."""

    def __init__(self, group: dist.ProcessGroup, exchange: str, layers: list[AttentionLayer]) -> None:
        self.group, self.exchange, self._layers = group, exchange, layers
        self._generation = Generation(self, layers)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._length_matters = False  # to rotary embeddings whose frequencies depend on it

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def remove(self) -> None:
        """End context parallelism of the model: it works on whole sequences again."""
        for layer in self._layers:
            if context_of(layer) is self:
                set_context(layer, None)
        name_attention(self._layers)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add_hooks(self, model: nn.Module) -> None:
        """Register hooks for calls with a cache, and for rotary embeddings whose frequencies depend on the length ("longrope", "dynamic").

        Those embeddings read the length from the largest position, so their hook appends the sequence's last position.
        """
        self._hooks += self._generation.add_hooks(model)
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
                self._hooks.append(module.register_forward_pre_hook(self._with_last_position, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(_without_last_position))
                self._length_matters = True

    def __deepcopy__(self, _memo: dict[int, Any]) -> ContextParallel:
        return self  # a copied model is shared by the same processes

    def shard(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """This process's slice of a batch, as the model's arguments. All processes of the mesh pass the same whole batch.

        Args:
            batch: `input_ids [B, N]`, and optionally `labels [B, N]` (not shifted, as transformers takes them), `attention_mask [B, N]`
                (padding on the right) and `position_ids` (consecutive). N may be any number: the batch is padded on the right to a multiple
                of the number of processes.

        Returns:
            `input_ids` and `position_ids [B, L]`, which count through the whole sequence, and `use_cache=False`. With labels also `labels`
            and `shift_labels [B, L]`, shifted across the slices' borders, and `num_items_in_batch`. With these, the mean of
            `model(...).loss` over the processes is the mean over all labels of the batch. Gradients are correct too, because DDP and FSDP
            average them over processes. There is no attention mask: causal attention never reads padding on the right, and labels there are
            ignored.

        Raises:
            ValueError: an unknown entry, padding on the left, packed sequences, or a different batch on another process.
            TypeError: the batch is not a mapping, an entry is not a tensor, or `input_ids` or `labels` are not integers.
        """
        ids = self._agreed(batch)
        n_tokens = ids.shape[1]
        padding = -n_tokens % self.size
        length = (n_tokens + padding) // self.size
        mine = slice(self.rank * length, (self.rank + 1) * length)

        position = torch.arange(mine.start, mine.stop, device=ids.device)
        sliced: dict[str, Any] = {"input_ids": F.pad(ids, (0, padding))[:, mine], "position_ids": position.expand(ids.shape[0], -1)}
        sliced["use_cache"] = False
        if batch.get("labels") is not None:
            labels = batch["labels"]
            if batch.get("attention_mask") is not None:
                labels = labels.masked_fill(batch["attention_mask"] == 0, _IGNORED)
            labels = F.pad(labels, (0, padding + 1), value=_IGNORED)
            sliced["labels"], sliced["shift_labels"] = labels[:, mine], labels[:, mine.start + 1 : mine.stop + 1].contiguous()
            n_labels = (labels[:, 1:] != _IGNORED).sum()
            sliced["num_items_in_batch"] = n_labels / self.size
        return sliced

    def unshard(self, x: Tensor, n_tokens: int | None = None) -> Tensor:
        """`[B, L, ...]` of all processes -> `[B, N, ...]` on all of them, for example the logits of the whole sequence.

        `n_tokens` cuts off padding: only the first tokens are returned. Differentiable: gradients are summed over the processes.
        """
        return gathered(x.transpose(0, 1).contiguous(), self.group).transpose(0, 1)[:, :n_tokens]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, sinks: Tensor | None) -> Tensor:
        """MoBA of one layer's slices."""
        return context_parallel_attention(query, key, value, self.group, self.exchange, sparse(settings, sinks), settings.share_selection)[
            0
        ]

    def attend_full(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Full attention of one layer's slices."""
        return context_parallel_attention(query, key, value, self.group, self.exchange, full(scale))[0]

    def cached_keys(self, layer: AttentionLayer) -> SharedLayer | None:
        """This process's part of a layer's cached keys; None if the call has no cache."""
        return self._generation.cached_keys(layer)

    def attend_cached(self, query: Tensor, kept: SharedLayer, settings: AttentionSettings, sinks: Tensor | None, reads_all: bool) -> Tensor:
        """`[B, H, n, Dv]`: the last n of the cached tokens read all cached keys, or only their chosen blocks.

        Raises ValueError if the keys were cached under another block size.
        """
        placement = kept.shared.placement
        if not reads_all and placement is not None and placement.block_size != settings.block_size:
            raise ValueError(
                f"block_size is {settings.block_size}, but the cached keys are shared out in blocks of {placement.block_size}: read the "
                "prompt again with another cache"
            )
        return attend_shared(query, kept, settings, sinks, reads_all, self.group)

    def gather_or_raise(self, error: Exception | None, numbers: list[int], what: str) -> list[list[int]]:
        """Gather `numbers` from all processes. A process with an `error` raises it; the others raise a ValueError with `what`."""
        backend = dist.get_backend(self.group)
        device = "cpu" if "gloo" in backend or backend == "undefined" else "cuda"  # undefined: each device type has its own backend
        every = gathered(torch.tensor([[error is not None, *numbers]], device=device), self.group).tolist()
        if error is not None:
            raise error
        if failed := [i for i, (wrong, *_) in enumerate(every) if wrong]:
            raise ValueError(f"{what} on process {failed[0]} of the sequence, which says why")
        return [told for _, *told in every]

    def _with_last_position(
        self, _rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        position, call = kwargs["position_ids"] if "position_ids" in kwargs else args[1], self._generation.call
        last = self.size * position.shape[1] - 1 if call is None else call.first + call.n_tokens - 1
        position = torch.cat([position, position.new_full((position.shape[0], 1), last)], 1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": position}
        return (args[0], position, *args[2:]), kwargs

    def _agreed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch's `input_ids`. All processes raise if the batch cannot be cut into slices or is not the same on all of them."""
        error, mine = None, [0] * (2 + len(_KNOWN))
        try:
            ids = _read(batch)
            if self._length_matters and ids.shape[1] % self.size:
                raise ValueError(
                    f"batch has {ids.shape[1]} tokens, but must have a multiple of the {self.size} processes: the frequencies of this "
                    "model's rotary embeddings depend on the length, which padding would change"
                )
            mine = [*ids.shape, *(checksum(batch.get(name)) for name in _KNOWN)]
        except Exception as wrong:  # of any kind: the other processes wait for this one's result
            error = wrong
        every = self.gather_or_raise(error, mine, "batch cannot be cut into slices")
        if any(x != every[0] for x in every):
            batches = "; ".join(f"process {i}: {x[0]} x {x[1]}, checksums {', '.join(map(str, x[2:]))}" for i, x in enumerate(every))
            raise ValueError(
                f"batch must be the same on all {self.size} processes of a sequence, but is not ({batches} of {', '.join(_KNOWN)}): deal "
                "batches out by the data-parallel rank, not by process"
            )
        return ids


def _without_last_position(_rotary: nn.Module, _args: tuple[Any, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x[:, :-1] for x in out)


def _read(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's `input_ids`, after checking that every entry can be cut into slices."""
    if not isinstance(batch, Mapping):
        raise TypeError(f'batch must be a mapping such as {{"input_ids": ids}}, but is {kind_of(batch)}')
    unknown = [name for name in batch if name not in _KNOWN]
    if unknown or "input_ids" not in batch:
        raise ValueError(
            f"batch must have input_ids and may have {', '.join(_KNOWN[1:])}, but has {', '.join(map(str, batch)) or 'nothing'}"
        )
    ids = batch["input_ids"]
    for name in _KNOWN:
        x = batch.get(name)
        if not isinstance(x, Tensor) and (x is not None or name == "input_ids"):
            raise TypeError(f"{name} of a batch must be a torch.Tensor, but is {kind_of(x)}: convert it with torch.as_tensor")
        if name in ("input_ids", "labels") and x is not None and x.dtype not in _WHOLE:
            raise TypeError(f"{name} must be whole numbers, int64 or int32, but are {x.dtype}: convert them with .long()")
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"input_ids must be [B, N] with at least one token, but have shape {tuple(ids.shape)}")
    for name in _KNOWN[1:]:
        x = batch.get(name)
        if x is not None and x.shape != ids.shape and (name != "position_ids" or x.shape not in (ids.shape[1:], (1, ids.shape[1]))):
            raise ValueError(f"batch has {name} of shape {tuple(x.shape)} and input_ids of shape {tuple(ids.shape)}, which must agree")
    mask, position = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and (mask.int().diff(dim=1) > 0).any():
        raise ValueError("attention_mask of a sequence in slices must be [B, N] with padding on the right: pad with padding_side='right'")
    if position is not None and (position != torch.arange(ids.shape[1], device=position.device)).any():
        raise ValueError("position_ids of a sequence in slices must count from 0 to its end: packed sequences cannot be cut into slices")
    return ids
