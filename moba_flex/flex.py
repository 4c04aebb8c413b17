"""The implementation for CUDA: compiled FlexAttention on block-sparse tiles.

Queries, rows and keys of all heads lie on one axis, so that one compilation serves any number of heads and any length.

B rows, H query heads, G key heads, Q query blocks, C key blocks, P slots a block, R routed rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._higher_order_ops.flex_attention import flex_attention_backward
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .block_masks import QUERY_TILE, Mask, local_mask, routed_mask
from .blocks import BlockLayout
from .routing import Routes
from .spec import Spec

__all__ = ["TILE", "choose", "gather", "local", "local_backward", "merge", "routed", "routed_backward", "sum_rows"]

TILE = QUERY_TILE

try:
    from .kernels import choose, gather, merge, sum_rows
except ImportError:  # no Triton here, so no CUDA either: what remains is the tensor version that tests run
    from .gate import choose
    from .rows import gather, merge, sum_rows


def local(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, spec: Spec) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to its own block. Returns `[B, H, Q * P, Dv]` and the log-sum-exp `[B, H, Q * P]`."""
    mask = local_mask(layout, query.shape[1], key.shape[1])
    out, lse = _forward(query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2), mask, spec)
    return out.view(*query.shape[:3], -1), lse.view(query.shape[:3])


def routed(
    query: Tensor, key: Tensor, value: Tensor, routes: Routes, layout: BlockLayout, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Attention of each row `[R, D]` to its block of `key [B, G, C * P, D]`. Returns `[R, Dv]` and the log-sum-exp `[R]`."""
    mask = routed_mask(routes, layout, key.shape[1], spec.causal)
    return _forward(query, key.flatten(0, 2), value.flatten(0, 2), mask, spec)


def local_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, layout: BlockLayout, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value that come through the local call."""
    mask = local_mask(layout, query.shape[1], key.shape[1])
    dq, dk, dv = _backward(*(x.flatten(0, 2) for x in (query, key, value, grad, lse, delta)), mask, spec)
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def routed_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes,
    layout: BlockLayout,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows `[R, D]`, of key and of value that come through the routed call."""
    mask = routed_mask(routes, layout, key.shape[1], spec.causal)
    dq, dk, dv = _backward(query, key.flatten(0, 2), value.flatten(0, 2), grad, lse, delta, mask, spec)
    return dq, dk.view(key.shape), dv.view(value.shape)


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, spec: Spec) -> tuple[Tensor, Tensor]:
    """`[M, D]`, `[K, D]`, `[K, Dv]` -> `[M, Dv]` and the log-sum-exp `[M]`."""
    run = _compiled(_call_forward, mask.key, spec.scale, spec.softcap, query.shape[-1], value.shape[-1], query.dtype)
    if not query.is_cuda:
        run = _call_forward
    options = _kernel_options(mask, query.dtype, max(query.shape[-1], value.shape[-1]))
    q, k, v = (x[None, None] for x in (query, key, value))
    return run(q, k, v, mask.block_mask, spec.scale, _score_mod(spec.softcap), options)


def _call_forward(query, key, value, block_mask, scale, score_mod, options):
    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod,
        block_mask,
        scale,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    return out[0, 0], aux.lse[0, 0]


def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, mask: Mask, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_forward`'s share in an output whose log-sum-exp over all blocks is `lse`.

    FlexAttention's backward operator takes any log-sum-exp, so it is given that of the whole output and not the partial one, and
    `delta` through its gradient. Nothing of the partial outputs has to be known, neither kept nor computed again.
    """
    run = _compiled(_call_backward, mask.key, spec.scale, spec.softcap, query.shape[-1], value.shape[-1], query.dtype)
    if not query.is_cuda:
        run = _call_backward
    options = _kernel_options(mask, query.dtype, max(query.shape[-1], value.shape[-1]))
    graphs = _graphs(mask.rule, mask.key, len(mask.buffers), spec.softcap)
    q, k, v, do, lse, delta = (x[None, None] for x in (query, key, value, grad, lse, delta))
    dq, dk, dv = run(q, k, v, do, lse, delta, mask.block_mask, mask.buffers, graphs, spec.scale, options)
    return dq[0, 0], dk[0, 0], dv[0, 0]


def _call_backward(query, key, value, grad, lse, delta, block_mask, buffers, graphs, scale, options):
    # In the operator's units: base-2 logarithms, delta = out . grad - grad_lse / ln 2.
    out = torch.zeros_like(grad)
    *lists, q_tile, kv_tile, _ = block_mask.as_tuple()
    # The lowering drops a configuration whose default tiles do not divide these, before it reads our smaller tiles from the
    # options. The options carry the true sizes.
    sizes = math.lcm(q_tile, QUERY_TILE), math.lcm(kv_tile, QUERY_TILE)
    dq, dk, dv, _ = flex_attention_backward(
        query,
        key,
        value,
        out,
        lse / math.log(2),
        grad,
        -delta * math.log(2),
        graphs["score"],
        graphs["joint"],
        (*lists, *sizes, graphs["mask"]),
        scale,
        options | {"SPARSE_Q_BLOCK_SIZE": q_tile, "SPARSE_KV_BLOCK_SIZE": kv_tile},
        (),
        buffers,
    )
    return dq, dk, dv


@lru_cache(maxsize=None)
def _compiled(call: Callable, *settings) -> Callable:
    """`call` compiled for one combination of settings, in which nothing but lengths varies from call to call.

    Each combination gets a code object of its own. torch.compile keeps what it learns by code object: shared, a second block size
    or scale would become a variable of the kernel, and eight combinations would exhaust the limit on recompilations.
    """
    code = call.__code__.replace(co_name=f"{call.__name__}_{'_'.join(map(str, settings))}")
    own = FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)
    return torch.compile(own, fullgraph=True)


@lru_cache(maxsize=None)
def _score_mod(softcap: float | None) -> Callable | None:
    if softcap is None:
        return None

    def score_mod(score, b, h, q, kv):
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=None)
def _joint(softcap: float | None) -> Callable:
    """The derivative of `_score_mod`: that of the score, and none for the indices."""

    def joint(score, b, h, q, kv, grad):
        if softcap is not None:
            grad = grad * (1 - torch.tanh(score / softcap) ** 2)
        return [grad.clone(), None, None, None, None]

    return joint


_GRAPHS: dict[tuple, dict[str, torch.fx.GraphModule]] = {}


def _graphs(rule: Callable, key: tuple, n_buffers: int, softcap: float | None) -> dict[str, torch.fx.GraphModule]:
    """The graphs that the backward operator wants: the score, its derivative, and the mask as a function of its buffers."""
    key = (*key, softcap)
    if key not in _GRAPHS:
        index = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
        buffers = [torch.zeros(4, dtype=torch.int32) for _ in range(n_buffers)]
        score = torch.zeros(())
        score_mod = _score_mod(softcap) or (lambda score, *_: score.clone())
        with TransformGetItemToIndex():
            _GRAPHS[key] = {
                "score": make_fx(score_mod)(score, *index),
                "joint": make_fx(_joint(softcap))(score, *index, score.clone()),
                "mask": make_fx(rule)(*index, *buffers),
            }
    return _GRAPHS[key]


def _kernel_options(mask: Mask, dtype: torch.dtype, width: int) -> dict[str, int | bool]:
    """Lengths are whole tiles. PyTorch's own tile sizes divide 128; smaller blocks need smaller ones."""
    q_tile, kv_tile = mask.block_mask.BLOCK_SIZE
    options: dict[str, int | bool] = {"IS_DIVISIBLE": True, "FORCE_USE_FLEX_ATTENTION": True}
    if mask.key[0] == "routed":
        options["BLOCKS_ARE_CONTIGUOUS"] = True
    q, kv = math.gcd(q_tile, QUERY_TILE), math.gcd(kv_tile, QUERY_TILE)
    if min(q, kv) < QUERY_TILE:
        most = 64 if dtype != torch.float32 else 32
        most = most if width <= 128 else most // 2
        q, kv = min(q, most), min(kv, most)
        options |= {"fwd_BLOCK_M": q, "fwd_BLOCK_N": kv}
        if dtype == torch.float32:
            q, kv = 16, 16
        options |= {"bwd_BLOCK_M1": q, "bwd_BLOCK_N1": kv, "bwd_BLOCK_M2": q, "bwd_BLOCK_N2": kv}
    return options
