"""Whether a call gives what it must, for every implementation of a device: `check` returns what is wrong, or None.

The blocks that a query reads are an implementation's own choice between scores that rounding cannot tell apart. So a choice is checked by
itself, and the rest against textbook attention in float64 to what was chosen, within the rounding that sizes allow.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from support.cases import Case
from support.gpu import always_routed
from support.oracle import Expected, expected, upstream_for, visible_keys
from torch import Tensor

from moba_flex import explain, moba_attention, moba_attention_varlen, select_blocks, set_working_memory
from moba_flex.core.validation import CUDA_IMPLEMENTATIONS
from moba_flex.decoding import decode
from moba_flex.ops.decoding import means_for, write_means
from moba_flex.reference import block_of_key, reference_selection

from .choices import LARGEST, Wrong, check_selection
from .draws import DTYPES, Draw
from .rounding import MOST_ON_A_GPU, UNCERTAIN, Sizes, bounds_of, compare, sizes_of

_MOST_HULLS = 16  # numbers of a value whose hull is checked


def check(draw: Draw, device: str = "cpu") -> str | None:
    """What is wrong with the answers to `draw`, or None."""
    threads, memory = torch.get_num_threads(), set_working_memory(draw.memory) if draw.memory else None
    torch.set_num_threads(draw.threads)
    try:
        with always_routed() if draw.routed else nullcontext():
            _check_all(draw, device)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
        if memory is not None:
            set_working_memory(memory)
    return None


def implementations(draw: Draw, device: str) -> tuple[str, ...]:
    """What runs on `device` for this dtype."""
    if device == "cpu" or draw.dtype == "float64":
        return "eager", "naive"
    if draw.keys is not None or draw.dtype == "float32":  # which "triton" refuses
        return "flex", "eager", "naive"
    return "flex", "triton", "eager", "naive"


def _check_all(draw: Draw, device: str) -> None:
    tensors = draw.tensors(device)
    known = _Known()
    for name in implementations(draw, device):
        if draw.lengths is None:
            visible = _visible(draw, tensors, name, known)
            if name == "eager" and device != "cpu" and not known.certain:
                continue  # it may choose otherwise than `select_blocks`, which tells what kernels choose there
            _check_results(draw, tensors, visible, name, known)
        else:
            _check_packed(draw, tensors, name)
    if draw.lengths is None and _can_be_decoded(draw.case):
        _check_decoding(draw, tensors, device, known)


@dataclass
class _Known:
    """What one implementation's check has found, for the next: most choose and see the same."""

    selected: Tensor | None = None
    certain: bool = True  # whether rounding cannot change the choice
    visible: Tensor | None = None
    in_block: Tensor | None = None  # [B, 1, Nq, Nk] keys of a query's own block, later ones too
    in_past: Tensor | None = None  # the same, keys of earlier blocks
    wanted: dict[str, Expected] = field(default_factory=dict)  # by what is multiplied: see `_multiplied`
    sizes: Sizes | None = None
    hull: tuple[Tensor, Tensor] | None = None


# The choice of blocks


def _visible(draw: Draw, tensors: dict[str, Tensor], implementation: str, known: _Known) -> Tensor:
    """`[B, H, Nq, Nk]`, of a choice that has been checked."""
    case, mask = draw.case, draw.case.padding_mask()
    query, key = tensors["query"], tensors["key"]
    mask = None if mask is None else mask.to(query.device)
    if implementation == "naive":
        selected, of_key = reference_selection(query, key, case.attention_settings("naive"), padding_mask=mask)
    else:
        selected = select_blocks(query, key, **case.selection, padding_mask=mask).to_dense()
        of_key = block_of_key(key, mask, case.block_size)
    selected, of_key, tensors = selected.cpu(), of_key.cpu(), {name: x.cpu() for name, x in tensors.items()}
    if known.selected is None or not torch.equal(known.selected, selected):
        known.certain = check_selection(draw, tensors, selected, of_key, implementation)
        known.selected, known.visible = selected, visible_keys(case, tensors, selected)
        known.wanted, known.sizes, known.hull = {}, None, None
        of_query = of_key[:, case.n_key - case.n_query :, None]
        known.in_block = ((of_query == of_key[:, None]) & (of_query >= 0))[:, None]
        known.in_past = ((of_query > of_key[:, None]) & (of_key[:, None] >= 0))[:, None]
    return known.visible


def _multiplied(draw: Draw, leaves: dict[str, Tensor], implementation: str, **batch: Tensor | None) -> str:
    """What an implementation multiplies by weights, be it of 0, so that NaN stays NaN (see docs/limits.md): what is "visible", a GPU's
    kernels their whole "block" and under a dense mask also the "past" blocks, and PyTorch's dense attention tiles of keys, here "all".
    """
    if implementation not in CUDA_IMPLEMENTATIONS or not draw.case.causal:
        return "visible"
    call = {**leaves, **draw.case.settings, **batch, "return_lse": draw.return_lse, "implementation": implementation}
    return {"dense": "all", "dense mask": "past"}.get(explain(**call).path, "block")


def _expected(draw: Draw, tensors: dict[str, Tensor], visible: Tensor, upstream: dict[str, Tensor], what: str, known: _Known) -> Expected:
    if what not in known.wanted:
        assert known.in_block is not None
        assert known.in_past is not None
        block = visible | known.in_block
        multiplied = {"visible": None, "block": block, "past": block | known.in_past, "all": torch.ones_like(visible)}[what]
        known.wanted[what] = expected(draw.case, tensors, visible, upstream, multiplied)
    return known.wanted[what]


# Values and gradients


def _check_results(draw: Draw, tensors: dict[str, Tensor], visible: Tensor, implementation: str, known: _Known) -> None:
    case = draw.case
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    mask = case.padding_mask()
    mask = None if mask is None else mask.to(leaves["query"].device)
    multiplied = _multiplied(draw, leaves, implementation, padding_mask=mask)
    called = moba_attention(**leaves, **case.settings, padding_mask=mask, return_lse=draw.return_lse, implementation=implementation)
    outputs = _outputs(draw, called)
    upstream = {name: x.to(leaves["query"].device) for name, x in upstream_for(outputs["out"], outputs.get("lse"), case.seed + 1).items()}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(upstream.values()), allow_unused=True)
    results = {name: x.detach() for name, x in outputs.items()}
    results |= {f"gradient of {name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads)}
    results = {name: x.cpu() for name, x in results.items()}
    tensors, upstream = ({name: x.cpu() for name, x in many.items()} for many in (tensors, upstream))

    _check_shapes(draw, results, implementation)
    some = visible.any(-1)
    if bool((results["out"][~some] != 0).any()) or ("lse" in results and bool((results["lse"][~some] != -torch.inf).any())):
        raise Wrong(f"{implementation}: the output of a query that reads nothing is not 0, or its log-sum-exp not -inf")
    sizes = known.sizes = known.sizes or sizes_of(draw, tensors, visible)
    if sizes.limit * case.width > LARGEST / 16 and draw.dtype != "float64":
        return  # scores overflow
    if implementation in CUDA_IMPLEMENTATIONS and sizes.score > MOST_ON_A_GPU:
        return
    wanted = _expected(draw, tensors, visible, upstream, multiplied, known)
    nan = {name: x.isnan().any(-1) for name, x in tensors.items() if name != "sinks"}
    sees_nan = some & (nan["query"] | (visible & (nan["key"] | nan["value"]).repeat_interleave(case.repeats, 1)[:, :, None]).any(-1))
    infinite = {name: tensors[name].isinf().any(-1) for name in ("query", "key")}  # a score of -inf is as good as a mask
    sees_nan &= ~(infinite["query"] | (visible & infinite["key"].repeat_interleave(case.repeats, 1)[:, :, None]).any(-1))
    if draw.case.value_width and bool(results["out"][sees_nan].isfinite().all(-1).any()):
        raise Wrong(f"{implementation}: NaN does not reach an output that sees it")
    _check_hull(draw, tensors, visible, results["out"], wanted, implementation, known)
    if sizes.weights > UNCERTAIN:
        return
    for name, bound in bounds_of(draw, tensors, upstream, visible, wanted, sizes).items():
        if name in results:
            compare(name, results[name], wanted, bound, DTYPES[draw.dtype] if name != "lse" else torch.float32, implementation)


def _check_shapes(draw: Draw, results: dict[str, Tensor], implementation: str) -> None:
    case = draw.case
    shape = (case.batch, case.heads, case.n_query)
    wide = torch.float64 if draw.dtype == "float64" else torch.float32
    if results["out"].shape != (*shape, case.value_width) or results["out"].dtype != DTYPES[draw.dtype]:
        raise Wrong(f"{implementation}: an output of {tuple(results['out'].shape)} in {results['out'].dtype}")
    if "lse" in results and (results["lse"].shape != shape or results["lse"].dtype != wide):
        raise Wrong(f"{implementation}: a log-sum-exp of {tuple(results['lse'].shape)} in {results['lse'].dtype}")


def _outputs(draw: Draw, called: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What a call returned, by name."""
    return dict(zip(("out", "lse"), called)) if draw.return_lse else {"out": called}


def _hull(value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """`[B * H, Nq, Dv]`: the least and the largest of the values `[B, H, Nk, Dv]` that a query sees.

    Head by head: all at once are gigabytes.
    """
    value, visible = value.flatten(0, 1)[:, None], visible.flatten(0, 1)[..., None]
    least = [x.masked_fill(~seen, torch.inf).amin(1) for x, seen in zip(value, visible)]
    most = [x.masked_fill(~seen, -torch.inf).amax(1) for x, seen in zip(value, visible)]
    return torch.stack(least), torch.stack(most)


def _check_hull(
    draw: Draw, tensors: dict[str, Tensor], visible: Tensor, out: Tensor, wanted: Expected, implementation: str, known: _Known
) -> None:
    """Whatever the weights: an output lies between the least and the largest of the values that its query sees.

    Weights are the same for all numbers of a value, so that some of many are enough.
    """
    step = -(-draw.case.value_width // _MOST_HULLS) or 1
    out = out[..., ::step]
    known.hull = known.hull or _hull(tensors["value"][..., ::step].double().repeat_interleave(draw.case.repeats, 1), visible)
    least, most = (x.view(out.shape) for x in known.hull)
    if draw.case.sinks:
        least, most = least.clamp(max=0), most.clamp(min=0)
    clean = (wanted.clean["out"] & visible.any(-1))[..., None]
    slack = torch.maximum(least.abs(), most.abs()) * (torch.finfo(DTYPES[draw.dtype]).eps * 4 + 1e-5 * (draw.dtype != "float64") + 1e-12)
    slack = slack + (1e-7 if draw.dtype == "float16" else 1e-30)
    outside = clean & ~((out.double() >= least - slack) & (out.double() <= most + slack))
    if bool(outside.any()):
        at = tuple(int(i) for i in outside.nonzero()[0])
        place, x, least, most = (*at[:3], at[3] * step), *(float(x[at]) for x in (out, least, most))
        raise Wrong(f"{implementation}: output {place} is {x:.6g}, not between {least:.6g} and {most:.6g}")


# Packed sequences and decoding


def _check_packed(draw: Draw, tensors: dict[str, Tensor], implementation: str) -> None:
    """Each sequence is what it is alone, values and gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    packed = {name: x if name == "sinks" else x[0].transpose(0, 1) for name, x in leaves.items()}
    bounds = {"cu_seqlens": draw.packed().cu_seqlens(), "cu_seqlens_k": draw.packed().cu_seqlens_k()}
    bounds = {name: None if x is None else x.to(leaves["query"].device) for name, x in bounds.items()}
    call = {**packed, **bounds, **draw.case.settings, "return_lse": draw.return_lse, "implementation": implementation}
    outputs = _outputs(draw, moba_attention_varlen(**call))
    out = outputs["out"]
    upstream = {name: x.to(out.device) for name, x in upstream_for(out, outputs.get("lse"), draw.case.seed + 1).items()}
    if not out.numel():
        return
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(upstream.values()), allow_unused=True)
    grads = {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads)}
    for part, of_keys, case in draw.packed().sequences():
        if not case.n_query:
            if any(bool((grads[name][:, :, of_keys] != 0).any()) for name in ("key", "value")):
                raise Wrong(f"{implementation}: keys {of_keys.start} to {of_keys.stop}, which no query sees, have a gradient")
            continue
        alone = draw.but(n_key=case.n_key, n_query=case.n_query, lengths=None, keys=None)
        mine = {name: x if name == "sinks" else x[:, :, part if name == "query" else of_keys] for name, x in tensors.items()}
        known = _Known()
        visible = _visible(alone, mine, implementation, known)
        if not known.certain:
            continue
        given = {name: x[part].transpose(0, 1)[None].cpu() for name, x in upstream.items()}
        mine = {name: x.cpu() for name, x in mine.items()}
        sizes = sizes_of(alone, mine, visible)
        if sizes.weights > UNCERTAIN or sizes.limit * alone.case.width > LARGEST / 16:
            return
        wanted = expected(alone.case, mine, visible, given)
        results = {name: x[part].transpose(0, 1)[None] for name, x in outputs.items()}
        places = {"query": part, "key": of_keys, "value": of_keys}
        results |= {f"gradient of {name}": grads[name][:, :, place] for name, place in places.items()}
        bound = bounds_of(alone, mine, given, visible, wanted, sizes)
        for name, x in results.items():
            dtype = DTYPES[draw.dtype] if name != "lse" else torch.float32
            compare(name, x.detach().cpu(), wanted, bound[name], dtype, f"{implementation}, tokens {part.start} to {part.stop}")


def _can_be_decoded(case: Case) -> bool:
    left = case.padding is None or all(right == 0 for _, right in case.padding)
    return case.causal and case.n_query <= 8 and left and not case.sinks


def _check_decoding(draw: Draw, tensors: dict[str, Tensor], device: str, known: _Known) -> None:
    """The same tokens from a cache with block means; what lies behind them in the cache is NaN."""
    case, new = draw.case, draw.case.n_query
    start = None if case.padding is None else torch.tensor([left for left, _ in case.padding], device=device)
    room = [torch.nn.functional.pad(tensors[name], (0, 0, 0, 5), value=torch.nan) for name in ("key", "value")]
    means = means_for(room[0], max(1, room[0].shape[2] // case.block_size))
    write_means(means, tensors["key"][:, :, : case.n_key - new], start, case.block_size)
    implementation = "eager" if device == "cpu" or draw.dtype == "float64" else "flex"
    settings = case.attention_settings(implementation)
    out, lse = decode(tensors["query"], *room, means, torch.tensor(case.n_key, device=device), start, settings)
    visible = _visible(draw, tensors, "eager" if device == "cpu" else "flex", known)
    tensors = {name: x.cpu() for name, x in tensors.items()}
    sizes = sizes_of(draw, tensors, visible)
    if sizes.weights > UNCERTAIN or (sizes.limit * case.width > LARGEST / 16 and draw.dtype != "float64"):
        return
    if _is_a_close_choice(draw, tensors, device):
        return
    upstream = upstream_for(out.cpu(), lse.cpu(), 0)
    wanted = expected(case, tensors, visible, upstream)
    bounds = bounds_of(draw, tensors, upstream, visible, wanted, sizes)
    for name, x in (("out", out), ("lse", lse)):
        compare(
            name, x.cpu(), wanted, bounds[name], DTYPES[draw.dtype] if name == "out" else torch.float32, f"decoding by {implementation}"
        )


def _is_a_close_choice(draw: Draw, tensors: dict[str, Tensor], device: str) -> bool:
    """Whether rounding may decide what is chosen, so that decoding may choose otherwise than a prefill.

    A GPU adds up the keys of a block that a new token completes in another order than others, so that blocks of equal keys may differ.
    """
    equal = ("equal keys", "repeated blocks")
    if draw.values == "integers" or (device != "cpu" and draw.values in equal) or any(not x.isfinite().all() for x in tensors.values()):
        return True
    case, (query, key) = draw.case, (tensors["query"].double(), tensors["key"].double())
    mask = case.padding_mask()
    low, _ = reference_selection(query, key, case.attention_settings("naive"), padding_mask=mask)
    for sign in (1, -1):
        moved = key * (1 + sign * 1e-4 * torch.sin(torch.arange(key.numel(), dtype=torch.float64)).view_as(key))
        if draw.values in equal:
            continue
        if not torch.equal(low, reference_selection(query, moved, case.attention_settings("naive"), padding_mask=mask)[0]):
            return True
    return False
