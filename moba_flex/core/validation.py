"""Validation of user arguments: one exception, raised before any work, that says what was given and what is expected."""

from __future__ import annotations

import itertools
from typing import TypeGuard

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn import Parameter

from .compiling import constant_in_graphs, outside_graphs
from .memo import memo, remember
from .messages import kind_of, shown, to_int
from .upstream import FakeTensor, assert_in_graph, forward_mode_is_on, functorch_transform, has_tangent, is_vmapped

CUDA_IMPLEMENTATIONS = ("flex", "triton")
IMPLEMENTATIONS = ("auto", *CUDA_IMPLEMENTATIONS, "eager", "naive")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT32 = torch.finfo(torch.float32)


def check_count(name: str, value: object, least: int) -> None:
    """`value` must be an int, not a bool, of at least `least` and below 2**63."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, but is {shown(value)}{to_int(value)}")
    if value >= 1 << 63:
        raise ValueError(f"{name} must be below 2**63, but is {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """`value` must be a bool; other truthy or falsy values are rejected."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, but is {shown(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {shown(value)}")


def check_blocks(
    block_size: int, top_k: int, sink_blocks: int, recent_blocks: int, causal: bool = True, share_selection: bool = False
) -> None:
    """Checks what defines a selection: the four counts, that they fit together, and the two flags."""
    check_count("block_size", block_size, 1)
    check_count("top_k", top_k, 1)
    check_count("sink_blocks", sink_blocks, 0)
    check_count("recent_blocks", recent_blocks, 0)
    check_flag("causal", causal)
    check_flag("share_selection", share_selection)
    if not causal and (sink_blocks or recent_blocks):
        raise ValueError(f"sink_blocks and recent_blocks must be 0 with causal=False, but are {sink_blocks} and {recent_blocks}")
    forced = 1 + sink_blocks + recent_blocks
    if causal and forced > top_k:
        mend = f"raise top_k to at least {forced}" if forced < 1 << 63 else "lower these"
        raise ValueError(
            f"top_k={top_k} has no room for the own block, sink_blocks={sink_blocks} and recent_blocks={recent_blocks}: {mend}"
        )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        mend = "" if value is None or isinstance(value, (str, bytes)) else ": convert it with torch.as_tensor()"
        raise TypeError(f"{name} must be a torch.Tensor, but is {kind_of(value)}{mend}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, but is a nested one: for x of layout torch.jagged and shape (batch, tokens, heads, width) "
            "use moba_attention_varlen with x.values(), and with x.offsets() as cu_seqlens"
        )
    if isinstance(value, MaskedTensor):
        raise TypeError(
            f"{name} must be a dense tensor, but is a MaskedTensor: convert it with .to_tensor(0), and pass padding as padding_mask"
        )
    if type(value) not in (Tensor, Parameter) and hasattr(value, "to_local"):
        raise TypeError(
            f"{name} must be a tensor of one process, but is a {type(value).__name__}: pass its part of this process, .to_local()"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but has layout {value.layout}: convert it with .to_dense()")


def _check_operands(**tensors: Tensor) -> None:
    """Tensors must have one floating-point dtype and be on one device: those of the first, the queries."""
    for name, t in tensors.items():
        _check_tensor(name, t)
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, but is {t.dtype}: convert it with .to()")
    dtype = next(iter(tensors.values())).dtype
    for t in tensors.values():
        if t.dtype != dtype:
            given = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
            raise TypeError(f"all tensors must have the same dtype, but got {given}: convert them with .to()")
    _check_devices(**tensors)


def _check_devices(**tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for t in tensors.values():
        if t.device != device:
            given = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"all tensors must be on the same device, but got {given}: move them with .to()")


def _check_heads(heads: int, groups: int, query: str = "query", key: str = "key") -> None:
    if groups == 0 or heads % groups:
        raise ValueError(f"{query} has {heads} heads, which must be a multiple of {key}'s {groups} heads")


@outside_graphs
def have_values(*tensors: Tensor) -> bool:
    """Whether values may be read: not those of meta or fake tensors, nor while a CUDA graph is captured.

    Code that torch.compile traces must not ask: it asks `torch.compiler.is_compiling()` first, in the function that acts on the answer.
    After a graph break torch.compile compiles functions one by one, and only those that it compiles are told that it is compiling: of two
    functions that ask, one may be told so and the other not, and neither would check values.
    """
    if any(is_without_values(t) for t in tensors):
        return False
    return not being_captured()


def is_without_values(x: Tensor) -> bool:
    """Whether `x` is a meta tensor or a FakeTensor."""
    return x.is_meta or isinstance(x, FakeTensor)


def being_captured() -> bool:
    """Whether the current stream captures a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_not_mapped(call: str, **tensors: Tensor) -> None:
    """Tensors whose values are read must not be hidden by torch.func.vmap, whose own errors name only PyTorch's internals."""
    if functorch_transform() is None:
        return
    for name, t in tensors.items():
        if is_vmapped(t):
            raise NotImplementedError(f"torch.func.vmap over {name} hides its values, which {call} reads: call it once for each {name}")


def check_values(call: str, **tensors: Tensor) -> None:
    """Tensors whose values are read must have values: neither meta tensors nor FakeTensors."""
    for name, t in tensors.items():
        if is_without_values(t):
            where = "on the meta device" if t.is_meta else "a FakeTensor"
            raise ValueError(f"{name} must have values, which {call} reads, but is {where}: call it with a tensor on a CPU or GPU")


def check_not_transformed(*tensors: Tensor, but: str = 'need implementation="naive"') -> None:
    """Rejects torch.func transforms and forward mode: an operator silently drops tangents, and transforms raise internal errors.

    A traced graph rejects forward mode whether or not these tensors have tangents, which it cannot see.
    """
    if functorch_transform() in ("Grad", "Vmap"):
        raise NotImplementedError(f"the transforms of torch.func (grad, vmap and the like) {but}")
    if forward_mode_is_on() and (torch.compiler.is_compiling() or has_tangent(*tensors)):
        raise NotImplementedError(f"forward-mode derivatives (torch.func.jvp and the like) {but}")


@constant_in_graphs  # otherwise torch.compile assumes False
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def check_not_onnx() -> None:
    """Rejects ONNX export: ONNX has neither custom operators nor a stable sort, and the exporter's own error names only one of these."""
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and _in_onnx_export():
        raise NotImplementedError(
            "MoBA cannot be exported to ONNX, which has no operator for its gate: export the model with full attention, "
            'set_attention(model, "full"), or export with torch.export, which keeps MoBA'
        )


def check_query_key(**tensors: Tensor) -> None:
    """`query [B, H, Nq, D]`, `key [B, G, Nk, D]` and, if given, `value [B, G, Nk, Dv]` must have matching shapes."""
    _check_operands(**tensors)
    for name, t in tensors.items():
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, tokens, width), but has shape {tuple(t.shape)}")
    query, key, value = tensors["query"], tensors["key"], tensors.get("value", tensors["key"])
    (rows, heads, n_query, width), of_key, of_value = query.shape, key.shape, value.shape
    if width == 0:
        raise ValueError(f"query must have a width (dimension 3) of at least 1, but has shape {tuple(query.shape)}")
    if rows != of_key[0] or width != of_key[3]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(of_key)} must agree in batch (dimension 0) and width (dimension 3)")
    if of_key[:3] != of_value[:3]:
        raise ValueError(f"key {tuple(of_key)} and value {tuple(of_value)} must agree in batch, heads and tokens (dimensions 0 to 2)")
    _check_heads(heads, of_key[1])
    if n_query > of_key[2]:
        raise ValueError(
            f"query {tuple(query.shape)} has more tokens than key {tuple(of_key)}, but queries are the last of key's tokens: "
            "the layout is (batch, heads, tokens, width), use transpose(1, 2) if tokens come first"
        )


def check_padding_mask(padding_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """`[B, Nk]` bool, with at most one contiguous run of True per row."""
    if padding_mask is None:
        return
    _check_tensor("padding_mask", padding_mask)
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask must be bool (True for real tokens), but is {padding_mask.dtype}: convert it with .bool()")
    wanted = (key.shape[0], key.shape[2])
    if tuple(padding_mask.shape) != wanted:
        raise ValueError(f"padding_mask must have shape {wanted} (batch, keys), but has shape {tuple(padding_mask.shape)}")
    _check_devices(query=query, padding_mask=padding_mask)
    if not padding_mask.numel():
        return
    check_not_mapped("moba_flex", padding_mask=padding_mask)
    must = "real tokens must be one run, with padding on the left or right only"
    if torch.compiler.is_compiling():
        assert_in_graph((_runs(padding_mask) <= 1).all(), f"padding_mask has a hole: {must}")
    elif have_values(padding_mask):
        remember(padding_mask)
        rows = memo(padding_mask, "rows with a hole", lambda: (_runs(padding_mask) > 1).nonzero().flatten().tolist())
        if rows:
            raise ValueError(f"padding_mask has a hole in row {rows[0]}: {must}")


def _runs(padding_mask: Tensor) -> Tensor:
    """`[B]`: number of runs of real tokens in each row."""
    return (padding_mask[:, 1:] & ~padding_mask[:, :-1]).sum(1) + padding_mask[:, 0]


def check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    names: tuple[str, str, str] = ("query", "key", "value"),
    more_keys: str = "pass cu_seqlens_k",
) -> int | None:
    """`[T, H, D]`, `[Tk, G, D]`, `[Tk, G, Dv]` and cumulative `cu_seqlens [n + 1]` from 0 to T; `Tk = T` without `cu_seqlens_k`.

    For messages: `names` of the operands in the caller, and what to do if there are `more_keys` than queries. Returns the maximum number
    of keys of a sequence, or None if values must not be read.
    """
    check_packed_operands(query, key, value, names)
    if cu_seqlens_k is None:
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"{names[0]} {tuple(query.shape)} and {names[1]} {tuple(key.shape)} must agree in tokens (dimension 0): "
                f"where sequences have more keys than queries, {more_keys}"
            )
        return check_cu_seqlens("cu_seqlens", cu_seqlens, query, query.shape[0], of=names[0])
    check_cu_seqlens("cu_seqlens", cu_seqlens, query, query.shape[0])
    longest_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, key.shape[0])
    check_same_count("cu_seqlens", cu_seqlens, "cu_seqlens_k", cu_seqlens_k)
    check_no_more_queries("cu_seqlens", cu_seqlens, "cu_seqlens_k", cu_seqlens_k)
    return longest_k


def check_same_count(name: str, cu_seqlens: Tensor, name_k: str, cu_seqlens_k: Tensor) -> None:
    """Both arguments must have the same number of sequences."""
    if cu_seqlens.shape != cu_seqlens_k.shape:
        count = f"{cu_seqlens.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        raise ValueError(f"{name} and {name_k} must be of equally many sequences, but are of {count}")


def check_no_more_queries(name: str, cu_seqlens: Tensor, name_k: str, cu_seqlens_k: Tensor) -> None:
    """No sequence may have more queries than keys. A traced graph checks it when it runs."""
    must = f"{name_k} must give each sequence at least as many keys as {name} gives it queries"
    if torch.compiler.is_compiling():
        assert_in_graph(((cu_seqlens_k - cu_seqlens).diff() >= 0).all(), must)
    elif have_values(cu_seqlens, cu_seqlens_k):
        (_, queries), (_, keys) = _bounds(cu_seqlens), _bounds(cu_seqlens_k)
        i = next((i for i, (n_query, n_key) in enumerate(zip(queries, keys)) if n_query > n_key), None)
        if i is not None:
            raise ValueError(f"{must}, which are its last tokens, but sequence {i} has {queries[i]} queries and {keys[i]} keys")


def check_packed_operands(query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str, str] = ("query", "key", "value")) -> None:
    """`[T, H, D]`, `[Tk, G, D]`, `[Tk, G, Dv]` must have matching shapes. `names`: what the caller calls them."""
    q, k, v = names
    _check_operands(**{q: query, k: key, v: value})
    for name, t in zip(names, (query, key, value)):
        if t.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (tokens, heads, width), but has shape {tuple(t.shape)}")
    if query.shape[2] == 0:
        raise ValueError(f"{q} must have a width (last dimension) of at least 1, but has shape {tuple(query.shape)}")
    if value.shape[:2] != key.shape[:2] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{q} {tuple(query.shape)}, {k} {tuple(key.shape)} and {v} {tuple(value.shape)} must agree: "
            f"{k} and {v} in tokens and heads, {q} and {k} in width"
        )
    _check_heads(query.shape[1], key.shape[1], q, k)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, query: Tensor, tokens: int, of: str = "query") -> int | None:
    """The argument `name`: non-decreasing int32 or int64 values from 0 to `tokens`, on the device of `query`, the argument `of`.

    Returns the maximum sequence length, or None if values must not be read. A traced graph checks them when it runs; while a CUDA graph
    is captured they are not checked.
    """
    _check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32, but is {cu_seqlens.dtype}: convert it with .int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have one dimension and at least one entry, but has shape {tuple(cu_seqlens.shape)}")
    _check_devices(**{of: query, name: cu_seqlens})
    check_not_mapped("moba_flex", **{name: cu_seqlens})
    must = f"{name} must start at 0, never fall and end at"
    if torch.compiler.is_compiling():
        rises = (cu_seqlens.diff() >= 0).all()
        assert_in_graph((cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & rises, f"{must} the number of tokens")
        return None
    if not have_values(cu_seqlens):
        return None
    remember(cu_seqlens)
    bounds, lengths = _bounds(cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"{must} {tokens} (the number of tokens), but {_bounds_shown(bounds, lengths)}")
    return max(lengths, default=0)


def _bounds(cu_seqlens: Tensor) -> tuple[list[int], list[int]]:
    """The values of `cu_seqlens`, and the sequence lengths."""

    def read() -> tuple[list[int], list[int]]:
        bounds = cu_seqlens.tolist()
        return bounds, [b - a for a, b in itertools.pairwise(bounds)]

    return memo(cu_seqlens, "bounds", read)


def _bounds_shown(bounds: list[int], lengths: list[int]) -> str:
    """All bounds, or the first invalid one if there are more than 8."""
    if len(bounds) <= 8:
        return f"is {bounds}"
    if bounds[0] != 0:
        return f"starts at {bounds[0]}"
    falls = next((i for i, length in enumerate(lengths) if length < 0), None)
    return f"ends at {bounds[-1]}" if falls is None else f"falls from {bounds[falls]} to {bounds[falls + 1]} at entry {falls + 1}"


def check_scores(query: Tensor, heads: int, scale: float | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Checks what modifies the scores: `scale` and `softcap > 0`, both within float32's range, and `sinks [H]`."""
    if scale is not None and not is_number(scale):
        mend = ": convert it with float()" if hasattr(scale, "__float__") else ""
        raise TypeError(f"scale must be a float or None, but is {kind_of(scale)}{mend}")
    if scale is not None and not -_FLOAT32.max <= scale <= _FLOAT32.max:
        raise ValueError(f"scale must be finite in float32, but is {shown(scale)}")
    if softcap is not None and not (is_number(softcap) and _FLOAT32.tiny <= softcap <= _FLOAT32.max):
        raise ValueError(f"softcap must be above 0 and finite in float32, or None, but is {shown(softcap)}")
    if sinks is None:
        return
    _check_tensor("sinks", sinks)
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), one logit a query head, but has shape {tuple(sinks.shape)}")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be a floating-point tensor, but is {sinks.dtype}: convert it with .to()")
    _check_devices(query=query, sinks=sinks)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def resolve_implementation(implementation: str, query: Tensor) -> str:
    """ "auto" becomes "flex" on CUDA and "eager" elsewhere, and always "eager" for float64, which only tests use."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "auto":
        return "flex" if query.is_cuda and query.dtype != torch.float64 else "eager"
    if implementation in CUDA_IMPLEMENTATIONS and not query.is_cuda:
        raise ValueError(
            f'implementation="{implementation}" needs CUDA tensors, but query is on {query.device}: use "eager" or "auto" there'
        )
    if implementation in CUDA_IMPLEMENTATIONS and query.dtype == torch.float64:
        raise ValueError(f'implementation="{implementation}" computes in float32 at most: use "eager" for float64')
    return implementation
