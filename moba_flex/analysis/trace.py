"""Which blocks a whole model reads in one forward pass: `trace`.

Each layer that uses MoBA passes its queries and keys to a watcher before it computes attention. The watcher computes the gate's choice
again, keeps a few statistics per head, and frees the rest before the next layer.

L layers, B batch, H query heads, N tokens (Nq queries, Nk keys), C blocks, S chosen blocks per query.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import UNSET, MobaConfig, given_settings, layer_indices
from ..core.compiling import outside_graphs
from ..core.messages import kind_of
from ..models.adapters import modules_with_save_hooks, save_adapters_alone
from ..models.call_hooks import modules_with_hooks, remove_hooks
from ..models.layers import MOBA, attention_layers, attention_of, configs_of, is_patched, n_layers, resolve_layers
from ..models.patch import find_layers, patch
from ..models.state import choice_of, context_of, key_conv_hooks_of, set_choice, set_watcher
from ..models.upstream import holds_config, is_peft_model
from ..models.visible import Visible
from ..selection import Selection, select_blocks
from . import figures
from .inputs import check_ids, check_weights
from .tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..models.upstream import AttentionLayer


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Which blocks the layers of a model read; returned by `trace`. All tensors are on the CPU. Printed as a table with a line for each
    layer.

    Attributes:
        layers: the indices of the L layers that use MoBA.
        share_of_keys: `[L, H]` float64, the keys that all queries read, divided by those of full attention. If every query reads `top_k`
            blocks, or all that there are, it depends on the lengths alone.
        overlap: `[L, H]` float64, the share of a query's chosen blocks that the next query also chooses. It is the mean over pairs of
            neighbours in the same block that have more blocks to choose from than they may choose; NaN if there are none.
        chosen: `[L, H, C]` int64, how many queries chose a block. A query's own block does not count as chosen, since it is always read.
        candidates: `[C]` int64, how many queries could choose a block: `chosen / candidates` is the share of them that chose it.
        selections: for the requested layers, which blocks each query reads.
    """

    layers: tuple[int, ...]
    share_of_keys: Tensor
    overlap: Tensor
    chosen: Tensor
    candidates: Tensor
    selections: Mapping[int, Selection] = field(default_factory=dict)

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns of equal length, with one row per layer, head and block, as for a data frame.

        The columns "layer", "head", "share_of_keys", "overlap", "block", "chosen" and "candidates" are the attributes; the first four
        repeat for all blocks of a head. Use `pandas.DataFrame(trace.to_dict())`.
        """
        shape = self.chosen.shape
        per_head = {"share_of_keys": self.share_of_keys, "overlap": self.overlap}
        return {
            "layer": torch.tensor(self.layers)[:, None, None].expand(shape).flatten().tolist(),
            "head": torch.arange(shape[1])[:, None].expand(shape).flatten().tolist(),
            **{name: x[..., None].expand(shape).flatten().tolist() for name, x in per_head.items()},
            "block": torch.arange(shape[2]).expand(shape).flatten().tolist(),
            "chosen": self.chosen.flatten().tolist(),
            "candidates": self.candidates.expand(shape).flatten().tolist(),
        }

    def __repr__(self) -> str:
        heads, n_blocks = self.chosen.shape[1:]
        names = ["layer", "keys read", "overlap", "overlap of heads", "block chosen most"]
        rows = [
            [str(layer), f"{self.share_of_keys[i].mean():.1%}", *_overlap(self.overlap[i]), self._favourite(i)]
            for i, layer in enumerate(self.layers)
        ]
        of = f"Trace of {len(self.layers)} MoBA layer{'s' * (len(self.layers) != 1)}, {heads} heads, {n_blocks} blocks"
        kept = f"selections of {', '.join(map(str, sorted(self.selections)))}"
        return "\n".join([of, *table(names, rows), *([kept] if self.selections else [])])

    def _favourite(self, i: int) -> str:
        """The block that the largest share of its candidates chose, over all heads, and that share."""
        chosen, could = self.chosen[i].sum(0), self.candidates * self.chosen.shape[1]
        share = torch.where(could > 0, chosen / could.clamp(min=1), 0.0)
        block = int(share.argmax())
        return f"{block} ({share[block]:.0%})" if chosen.any() else "-"

    def figure(self) -> Figure:
        """A matplotlib figure of all layers: the overlap of each head, how often each block is chosen, and the mean share of keys.

        Raises ImportError if matplotlib is not installed; it comes with the extra `viz`.
        """
        return figures.trace_figure(self)


def _overlap(heads: Tensor) -> tuple[str, str]:
    """The mean over a layer's heads, and their range."""
    known = heads[~heads.isnan()]
    return (f"{known.mean():.0%}", f"{known.min():.0%} to {known.max():.0%}") if len(known) else ("-", "-")


@torch.no_grad()
def trace(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    selections: Iterable[int] = (),
    config: MobaConfig | Mapping[str, Any] | None = None,
    block_size: int = UNSET,
    top_k: int = UNSET,
    sink_blocks: int = UNSET,
    recent_blocks: int = UNSET,
    share_selection: bool = UNSET,
    key_conv: int = UNSET,
    full_attention_layers: Iterable[int] = UNSET,
    decode: str = UNSET,
    implementation: str = UNSET,
    **unknown: NoReturn,
) -> Trace:
    """Run a model on a batch once, and report which blocks its layers read.

    The pass runs in evaluation mode, without gradients and without a cache. Afterwards, also after an exception, the model is restored. A
    progress bar counts the layers; `transformers.utils.logging.disable_progress_bar()` turns it off.

    Args:
        model: a transformers model. If it does not use MoBA, it is patched for this pass.
        input_ids: `[B, N]` tokens, on the model's device.
        attention_mask: `[B, N]`, 1 for real tokens, with padding on the left or the right. Padding counts nowhere.
        selections: layers whose `Selection` is kept, for `moba_flex.visualize`; negative indices count from the last layer.
        config, block_size, ...: those of `moba_flex.patch`, in place of the model's own for this pass.

    Returns:
        A `Trace`.

    Raises:
        ValueError: no layer uses MoBA or can use it, a layer in `selections` does not use it, a setting is out of range, the inputs do not
            fit, or the model is context-parallel.
        TypeError: `input_ids` is not an integer tensor, or both `config` and settings are given.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moba_flex import trace
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> watched = trace(LlamaForCausalLM(tiny), torch.arange(32)[None], block_size=4, top_k=2)
    >>> watched.share_of_keys.shape, watched.chosen.shape
    (torch.Size([2, 2]), torch.Size([2, 2, 8]))
    """
    settings = given_settings(
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        key_conv=key_conv,
        full_attention_layers=full_attention_layers,
        decode=decode,
        implementation=implementation,
        **unknown,
    )
    _check_inputs(input_ids, attention_mask)
    wanted = layer_indices("selections", selections)
    _, replaceable = find_layers(model)
    if any(context_of(layer) is not None for layer in replaceable):
        raise ValueError(
            f"{type(model).__name__} is context-parallel, and only whole sequences are traced: call ContextParallel.remove() first"
        )
    check_ids("trace", "input_ids", input_ids, model)
    check_weights(model)
    with left_as_it_was(model):
        if config is not None or settings or not is_patched(replaceable):
            patch(model, config, **settings)
        layers = [layer for layer in replaceable if attention_of(layer, MobaConfig.of(layer.config)) in MOBA]
        found = [layer.layer_idx for layer in layers]
        if not found:
            raise ValueError(f'all layers of this {type(model).__name__} use full attention now: use set_attention(model, "moba")')
        keep = resolve_layers("selections", wanted, n_layers(layers[0]), found, model)
        model.eval()
        with logging.tqdm(total=len(layers), desc="Tracing", unit="layer") as bar:
            watcher = Watcher(keep, bar.update)
            for layer in layers:
                set_watcher(layer, watcher)
            inner = model if is_peft_model(model) else getattr(model, "base_model", model)
            _read(inner, input_ids, attention_mask)
    return watcher.trace()


def _read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except (AttributeError, TypeError, ValueError) as error:
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # other errors are of code that did not expect such a call
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model and does not read input_ids alone{reason}: trace takes decoder-only "
            "models, and those that make their decoder's input of the encoder's, such as BART"
        ) from error


class Watcher:
    """Receives the queries and keys of MoBA layers while it is the watcher in their state."""

    def __init__(self, keep: list[int], seen: Callable[[], object]) -> None:
        self._keep, self._seen = keep, seen
        self._layers: list[int] = []
        self._statistics: list[tuple[Tensor, ...]] = []
        self._selections: dict[int, Selection] = {}

    @outside_graphs  # a graph break: compiled layers must not trace it
    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, visible: Visible, settings: MobaConfig) -> None:
        names = inspect.signature(select_blocks).parameters
        blocks = {name: value for name, value in settings.items() if name in names}
        n_blocks, forced = -(-key.shape[2] // settings.block_size), 1 + settings.sink_blocks + settings.recent_blocks
        blocks["top_k"] = min(settings.top_k, max(n_blocks, forced))  # a larger top_k changes nothing, but takes memory
        selection = select_blocks(query, key, **blocks, causal=visible.causal, padding_mask=visible.padding_mask)
        self._layers.append(layer.layer_idx)
        self._statistics.append(tuple(x.cpu() for x in layer_statistics(selection)))
        if layer.layer_idx in self._keep:
            here = {name: getattr(selection, name).cpu() for name in ("indices", "block_of_key")}
            self._selections[layer.layer_idx] = replace(selection, **here)
        self._seen()

    def trace(self) -> Trace:
        share, overlap, chosen, candidates = (torch.stack(x) for x in zip(*self._statistics))
        return Trace(tuple(self._layers), share, overlap, chosen, candidates[0], self._selections)


def layer_statistics(selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share of keys `[H]`, overlap `[H]`, chosen `[H, C]` and candidates `[C]` of one layer, see `Trace`."""
    of_key, n_blocks = selection.block_of_key, selection.n_blocks
    heads, n_query, n_chosen = selection.indices.shape[1:]
    own = of_key[:, of_key.shape[1] - n_query :]  # [B, Nq]
    real = own >= 0
    of_any = torch.where(of_key < 0, n_blocks, of_key)
    size = torch.zeros(len(own), n_blocks + 1, dtype=torch.int64, device=own.device).scatter_add(1, of_any, torch.ones_like(of_any))
    size = size[:, :n_blocks]  # [B, C], keys per block
    if selection.causal:
        visible = (of_key >= 0).cumsum(1)[:, -n_query:]  # [B, Nq], keys up to and including a query's own
        own_read = visible - (size.cumsum(1) - size).gather(1, own.clamp(min=0))
        options = own.clamp(min=0)  # [B, Nq], number of blocks to choose from
    else:
        visible, own_read = size.sum(1, keepdim=True).expand_as(own), torch.zeros_like(own)
        options = (size > 0).sum(1, keepdim=True).expand_as(own)
    had = torch.bincount(options[real], minlength=n_blocks + 1)  # how many queries have each number of options
    candidates = had.flip(0).cumsum(0).flip(0)[1:]  # block c is an option for queries with more than c options

    neighbours = real[:, 1:] & real[:, :-1] & (options[:, 1:] > n_chosen)
    if selection.causal:
        neighbours &= own[:, 1:] == own[:, :-1]
    share, overlap, chosen = [], [], []
    for head in range(heads):  # one head at a time: a query can have as many choices as elements, or more
        index = selection.indices[:, head].long()  # [B, Nq, S], -1 for missing choices
        read = own_read + torch.where(index >= 0, size[:, None].expand(-1, n_query, -1).gather(2, index.clamp(min=0)), 0).sum(-1)
        share.append(read[real].sum().double() / visible[real].sum())
        chosen.append(torch.bincount(index[index >= 0], minlength=n_blocks))
        pair = torch.cat([index[:, 1:], index[:, :-1]], -1)[neighbours].sort(-1).values
        overlap.append((pair[:, 1:] == pair[:, :-1]).sum().double() / (len(pair) * n_chosen))
    return torch.stack(share), torch.stack(overlap), torch.stack(chosen), candidates


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be an int64 or int32 tensor, but is {getattr(input_ids, 'dtype', type(input_ids).__name__)}")
    for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if isinstance(x, Tensor) and x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, but is a nested one: pad it with .to_padded_tensor(0)")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must have shape (batch, tokens) and hold some, but has shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, but is {kind_of(attention_mask)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the model's configurations, modes, key convolutions and MoBA state after the `with` block."""
    layers = attention_layers(model)
    holders = [(module, module.config) for module in model.modules() if holds_config(module)]
    convolutions = [(layer, key_conv_hooks_of(layer)) for layer in layers]
    configs = [(config, dict(vars(config))) for config in configs_of(layers)]
    choices = [(layer, choice_of(layer)) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    had_hooks, had_save_hooks = modules_with_hooks(model), modules_with_save_hooks(model)
    try:
        yield
    finally:
        for layer, hooks in convolutions:
            now = key_conv_hooks_of(layer)
            if now is not hooks and now is not None:
                now.detach(layer)
            if now is not hooks and hooks is not None:
                hooks.attach(layer)
        for holder, held in holders:
            holder.config = held
        for config, entries in configs:
            vars(config).clear()
            vars(config).update(entries)
        for layer, choice in choices:
            set_watcher(layer, None)
            set_choice(layer, choice)
        for module, training in modes:
            module.training = training
        remove_hooks(modules_with_hooks(model) - had_hooks)
        save_adapters_alone(modules_with_save_hooks(model) - had_save_hooks)
