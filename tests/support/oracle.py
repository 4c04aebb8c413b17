"""What a call must give, in float64 and from first principles: textbook attention to the keys that a selection shows to each query.

NaN and infinity are part of it. A query that sees one is spoilt, and so is the gradient of every key that a spoilt query sees. All else
must be as if 0 had stood there.

B rows, H query heads, G key heads, Nq queries, Nk keys, C blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.cases import Case, positions, random, softmax_attention
from torch import Tensor

from moba_flex.reference import block_of_key, reference_selection


@dataclass(frozen=True)
class Expected:
    """`results`: output, log-sum-exp and gradients by name. `clean`: bool masks of where these are promised."""

    results: dict[str, Tensor]
    clean: dict[str, Tensor]


def visible_keys(case: Case, tensors: dict[str, Tensor], selected: Tensor | None = None) -> Tensor:
    """`[B, H, Nq, Nk]`: the keys that each query sees, by `selected [B, H, Nq, C]` or by the specification's own choice."""
    mask, query, key = case.padding_mask(), tensors["query"].detach(), tensors["key"].detach()
    if selected is None:
        selected, _ = reference_selection(query, key, case.attention_settings("naive"), padding_mask=mask)
    of_key = block_of_key(key, mask, case.block_size)
    visible = selected.gather(-1, of_key.clamp(min=0)[:, None, None].expand(*selected.shape[:3], case.n_key))
    visible = visible & (of_key >= 0)[:, None, None] & case.real_queries()[:, None, :, None]
    query, key = positions(case)
    return visible & (key <= query) if case.causal else visible


def expected(
    case: Case, tensors: dict[str, Tensor], visible: Tensor, upstream: dict[str, Tensor], multiplied: Tensor | None = None
) -> Expected:
    """Results for `upstream` gradients of "out" and, where it is there, of "lse".

    `multiplied`: where an implementation multiplies, be it by weights of 0, which NaN outlives. It then multiplies keys by rows that hold
    no query, too. None: where `visible`.
    """
    whole_tiles, multiplied = multiplied is not None, visible if multiplied is None else multiplied
    groups = (case.groups, case.repeats)
    bad = {name: ~x.isfinite().all(-1) for name, x in tensors.items() if name != "sinks"}
    bad_key, bad_value = (bad[name].repeat_interleave(case.repeats, 1)[:, :, None] for name in ("key", "value"))
    some = visible.any(-1)
    spoilt = {"lse": some & (bad["query"] | (visible & bad_key).any(-1))}
    spoilt["out"] = spoilt["lse"] | (multiplied & bad_value).any(-1)

    leaves = {name: torch.where(x.isfinite() | (name == "sinks"), x, 0).double().requires_grad_() for name, x in tensors.items()}
    shown = visible | ~some[..., None]  # something for those that see nothing, so that there is a softmax
    out, lse = softmax_attention(case, leaves, shown)
    outputs = {"out": torch.where(some[..., None], out, 0), "lse": torch.where(some, lse, -torch.inf)}
    given = {name: x.double() for name, x in upstream.items()}
    given = {name: x.masked_fill((spoilt["out"] | ~some).view(*some.shape, *(1,) * (x.dim() - 3)), 0) for name, x in given.items()}
    grads = torch.autograd.grad([outputs[name] for name in given], list(leaves.values()), list(given.values()), allow_unused=True)
    results = {name: x.detach() for name, x in outputs.items()}
    results |= {f"gradient of {name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads)}

    reached = (multiplied & spoilt["out"][..., None]).any(2).unflatten(1, groups).any(2)  # [B, G, Nk]
    if whole_tiles:
        reached = reached | bad["key"] | bad["value"]
    clean = {name: ~x for name, x in spoilt.items()}
    clean |= {"gradient of query": ~(spoilt["out"] | (multiplied & bad_key).any(-1))}
    clean |= {"gradient of key": ~reached, "gradient of value": ~reached}
    clean["gradient of sinks"] = ~spoilt["out"].any(2).any(0)
    return Expected(results, clean)


def upstream_for(out: Tensor, lse: Tensor | None, seed: int) -> dict[str, Tensor]:
    """Random gradients of the outputs."""
    given = {"out": random(*out.shape, seed=seed, dtype=out.dtype)}
    if lse is not None:
        given["lse"] = random(*lse.shape, seed=seed + 1, dtype=lse.dtype)
    return given
