"""The choice of blocks, checked by itself: as many as are wanted, forced ones among them, none that scores less than one left out."""

from __future__ import annotations

from itertools import product

import torch
from support.cases import Case
from torch import Tensor

from .draws import DTYPES, Draw

LARGEST = torch.finfo(torch.float32).max


class Wrong(Exception):
    """What is wrong, in one sentence."""


def check_selection(draw: Draw, tensors: dict[str, Tensor], selected: Tensor, of_key: Tensor, implementation: str) -> bool:
    """Whether rounding cannot change the choice."""
    case, n_blocks = draw.case, draw.case.n_blocks
    query, key = tensors["query"].double(), tensors["key"].double()
    hidden = (of_key < 0)[:, None, :, None]
    key = key.masked_fill(hidden, 0)
    member = (of_key[..., None] == torch.arange(n_blocks)).double()  # [B, Nk, C]
    count = member.sum(1).clamp(min=1)[:, None, :, None]
    finite = torch.where(key.isfinite(), key, 0)
    mean = torch.einsum("bnc,bgnd->bgcd", member, finite) / count
    bad = torch.einsum("bnc,bgn->bgc", member, (~key.isfinite()).any(-1).double()) > 0
    size = torch.einsum("bnc,bgnd->bgcd", member, finite.abs()) / count
    mean, size, bad = (x.repeat_interleave(case.repeats, 1) for x in (mean, size, bad))
    bad_query = ~query.isfinite().all(-1)
    query = torch.where(query.isfinite(), query, 0)
    score, rounding = query @ mean.mT, query.abs() @ size.mT
    doubtful = bad[:, :, None] | bad_query[..., None]
    if case.share_selection:
        score, rounding = (x.unflatten(1, (-1, case.repeats)).sum(2).repeat_interleave(case.repeats, 1) for x in (score, rounding))
        doubtful = doubtful.unflatten(1, (-1, case.repeats)).any(2).repeat_interleave(case.repeats, 1)
    eps = torch.finfo(DTYPES[draw.dtype]).eps if draw.dtype == "float64" else torch.finfo(torch.float32).eps
    tolerance = rounding * eps * (4 + case.width + case.block_size) * 2 + 1e-300

    own = of_key[:, None, case.n_key - case.n_query :, None]
    block = torch.arange(n_blocks)
    exists = (member.sum(1) > 0)[:, None, None]
    past = exists & ((block < own) if case.causal else torch.ones_like(own, dtype=torch.bool)) & (own >= 0)
    forced = past & ((block < case.sink_blocks) | (block >= own - case.recent_blocks)) if case.causal else torch.zeros_like(past)
    past, forced, own = (x.expand(*selected.shape[:3], -1) for x in (past, forced, own))
    free, candidate = selected & past & ~forced, past & ~forced
    places = case.top_k - (1 + case.sink_blocks + case.recent_blocks if case.causal else 0)
    wanted = candidate.sum(-1).clamp(max=places)
    if not torch.equal(free.sum(-1), wanted):
        raise Wrong(f"{implementation} chooses {free.sum(-1).max()} free blocks where {wanted.max()} are wanted")
    if bool((forced & ~selected).any()) or bool((selected & ~past & ~((block == own) if case.causal else past)).any()):
        raise Wrong(f"{implementation} leaves out a forced block, or reads one that is not there")
    if bool(doubtful.any()) or not bool((rounding < LARGEST).all()):
        return False
    worst = torch.where(free, score + tolerance, torch.inf).amin(-1)
    best = torch.where(candidate & ~selected, score - tolerance, -torch.inf).amax(-1)
    if bool((best > worst).any()):
        b, h, n = (int(i) for i in (best > worst).nonzero()[0])
        raise Wrong(
            f"{implementation}: query {n} of head {h}, row {b} leaves out a block that scores {float((best - worst)[b, h, n]):.2g} more"
        )
    left_out = candidate & ~selected
    if draw.values in ("integers", "equal keys", "repeated blocks"):
        alike = (mean[..., :, None, :] == mean[..., None, :, :]).all(-1) & _same_keys(key, of_key, n_blocks, case)  # [B, H, C, C]
        earlier = alike & (block[None] < block[:, None])  # [c, earlier one]
        wrong = (left_out.double() @ earlier.double().mT > 0) & free  # [B, H, Nq, C]: an earlier equal of c is left out
        if bool(wrong.any()):
            b, h, n, c = (int(i) for i in wrong.nonzero()[0])
            raise Wrong(
                f"{implementation}: query {n} of head {h}, row {b} reads block {c}, and leaves out an earlier one with the same keys"
            )
        # Of two blocks with the same keys the earlier one is read, whatever rounding does. Of other pairs one could take the other's place.
        for b, h in product(*map(range, selected.shape[:2])):
            near = (score + tolerance)[b, h, :, :, None] > (score - tolerance)[b, h, :, None]
            if bool((near & left_out[b, h, :, :, None] & free[b, h, :, None] & ~alike[b, h]).any()):
                return False
        return True
    least = torch.where(free, score - tolerance, torch.inf).amin(-1)
    return not bool((torch.where(left_out, score + tolerance, -torch.inf).amax(-1) > least).any())


def _same_keys(key: Tensor, of_key: Tensor, n_blocks: int, case: Case) -> Tensor:
    """`[B, H, C, C]`: blocks that hold the same keys, token for token."""
    rows, groups = key.shape[:2]
    blocks = torch.full((rows, groups, n_blocks, case.block_size, key.shape[3]), torch.nan, dtype=key.dtype)
    for b in range(rows):
        for c in range(n_blocks):
            keys = key[b][:, of_key[b] == c]
            blocks[b, :, c, : keys.shape[1]] = keys
    same = (blocks[:, :, :, None] == blocks[:, :, None]).flatten(4).all(-1)  # partial blocks hold NaN, and equal nothing
    return same.repeat_interleave(case.repeats, 1)
