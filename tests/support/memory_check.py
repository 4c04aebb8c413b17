"""The kernels at small and odd shapes, for a checker of memory errors and races on a CUDA GPU. Four commands, from the repository:

    python tests/support/memory_check.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/support/memory_check.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 1 python tests/support/memory_check.py
    TRITON_INTERPRET=1 python tests/support/memory_check.py

The first compiles the kernels, so that the checkers need not watch that. Without PyTorch's cache each tensor is an allocation of its own,
so that a step beyond its end is seen. Results are held against plain PyTorch, which works on the CPU: what the GPU runs is the package's
Triton kernels, all of them, and next to nothing else. The last command
needs no GPU: Triton's interpreter shows that the check itself is right.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace

import torch
from pages import PagedCase
from torch import Tensor
from torch.testing import assert_close

from moba_flex.backends import eager, flex, triton
from moba_flex.core.layout import BlockLayout, slots_per_block
from moba_flex.core.layout_builders import dense_layout, packed_layout, padded_layout, with_last_queries
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import gate, routing, rows
from moba_flex.ops import triton as kernels
from moba_flex.ops.decoding import decode_plain, means_for, write_means
from moba_flex.ops.pages import decode_pages
from moba_flex.ops.routing import Routes

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = CPU if INTERPRETED else torch.device("cuda")
PREFILL = [  # query heads, key heads, queries, keys, width, block size, top_k, dtype, visibility
    (4, 2, 300, 300, 128, 128, 8, torch.bfloat16, "all"),
    (3, 1, 333, 500, 96, 100, 3, torch.float16, "all"),
    (2, 2, 129, 129, 24, 16, 9, torch.bfloat16, "padded"),
    (2, 1, 401, 401, 64, 48, 4, torch.float32, "packed"),
    (4, 2, 263, 801, 64, 256, 3, torch.bfloat16, "last of packed"),
    (2, 1, 263, 801, 32, 48, 5, torch.float16, "last of packed"),
    (1, 1, 1, 300, 64, 32, 14, torch.bfloat16, "all"),
    (1, 1, 350, 350, 32, 16, 20, torch.float16, "all"),  # more blocks than the gate keeps in lanes
]
DECODING = [  # query heads, key heads, new tokens, tokens, room behind them, widths of keys and values, block size, top_k, dtype, shared
    (4, 2, 1, 300, 0, 128, 128, 64, 4, torch.float16, False),
    (8, 2, 1, 257, 50, 64, 40, 16, 8, torch.float16, True),
    (3, 1, 5, 130, 9, 24, 64, 32, 3, torch.float32, False),
    (2, 2, 1, 1, 0, 64, 64, 16, 3, torch.float16, False),
]


def on_device(x):
    """A tensor, or a dataclass of tensors, on the device."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    moved = {f.name: on_device(value) for f in fields(x) if isinstance(value := getattr(x, f.name), Tensor)}
    return replace(x, **moved, **({"_cache": {}} if isinstance(x, BlockLayout) else {}))


def same(got, wanted, tolerance: float = 0.0) -> None:
    assert_close(got.to(CPU), wanted, rtol=tolerance, atol=tolerance)


def layout_of(n_query: int, n_key: int, block_size: int, visibility: str, width: int) -> BlockLayout:
    if visibility == "padded":
        return padded_layout(torch.arange(n_key) >= torch.tensor([[17], [0]]), n_query, block_size, width)
    if visibility == "last of packed":
        bounds = torch.tensor([[0, 0, 1, 262, n_query], [0, 3, 200, 700, n_key]], dtype=torch.int32)
        return with_last_queries(
            packed_layout(bounds[1], n_key, block_size, width), bounds, n_query, flex.slots_per_query_tile(width, 0, 0)
        )
    if visibility == "packed":
        return packed_layout(torch.tensor([0, 1, 1, 200, n_key], dtype=torch.int32), n_key, block_size, width)
    return dense_layout(2, n_query, n_key, block_size, width, CPU)


def check_prefill(heads, groups, n_query, n_key, width, block_size, top_k, dtype, visibility) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float16  # NumPy has no bfloat16, and the interpreter multiplies its bits as whole numbers
    layout, plain = (layout_of(n_query, n_key, block_size, visibility, slots) for slots in (slots_per_block(block_size), block_size))
    batch, settings = layout.own.shape[0], AttentionSettings(block_size, top_k, 1, 1, scale=width**-0.5)
    tokens = torch.randn(batch, heads, n_query, width).to(dtype), torch.randn(batch, groups, n_key, width).to(dtype)
    query, key = layout.query_slots(tokens[0]).contiguous(), layout.key_slots(tokens[1]).contiguous()
    chosen = kernels.choose(on_device(query), on_device(key), on_device(layout.in_slots()), settings).to(CPU)
    wanted = gate.choose(query, key, layout, settings)
    assert (chosen.sort(-1).values != wanted.sort(-1).values).any(-1).float().mean() < 0.01  # near-ties of half precision

    given = groups, layout.n_key_blocks, 128, batch * heads * layout.max_pairs(settings.n_routed, True)
    routes, on_gpu = routing.route(chosen, *given), kernels.route(on_device(chosen), *given)
    same(on_gpu.row_of_pair, routes.row_of_pair)
    check_rows(query, routes, on_gpu, layout.in_slots())
    if dtype != torch.float32 and layout.tile is None:  # which the one-pass kernels do not take
        check_one_pass(*tokens, chosen, routes if given[-1] else None, layout, plain, settings)


def check_one_pass(
    query: Tensor, key: Tensor, chosen: Tensor, routes: Routes | None, layout: BlockLayout, plain: BlockLayout, settings: AttentionSettings
) -> None:
    """Tokens `[B, H, N, D]`, what their slots in `layout` have chosen, and a layout without spare slots, which plain PyTorch needs."""
    value, grad = key.flip(2), torch.randn(query.shape).to(query.dtype)
    q, k, v, do = plain.query_slots(query), plain.key_slots(key), plain.key_slots(value), plain.query_slots(grad)
    chosen = plain.query_slots(layout.query_tokens(chosen, fill=-1) + 1) - 1
    pairs = chosen.numel() if routes is not None else 0
    given = eager.route(chosen, key.shape[1], plain.n_key_blocks, pairs) if pairs else None
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    eager.attend(q, k, v, given, plain, settings, (out, lse))
    delta = (out.float() * do).sum(-1)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    eager.backward(q, k, v, do, lse, delta, given, plain, settings, grads)

    operands = layout.query_slots(query), layout.key_slots(key), layout.key_slots(value)
    operands, routes, on_gpu = tuple(map(on_device, operands)), routes and on_device(routes), on_device(layout.in_slots())
    got = torch.empty_like(operands[0]), torch.empty(operands[0].shape[:3], device=DEVICE)
    triton.attend(*operands, routes, on_gpu, settings, got)
    close(layout.query_tokens(got[0].to(CPU)), plain.query_tokens(out), 2e-2)
    of_query = (layout.query_slots(x).to(DEVICE) for x in (grad, plain.query_tokens(lse), plain.query_tokens(delta)))
    got = tuple(torch.empty_like(x) for x in operands)
    kernels.one_pass_backward(*operands, *of_query, routes, on_gpu, settings, got)
    for to_tokens, of_plain, x, wanted in (
        (layout.query_tokens, plain.query_tokens, got[0], grads[0]),
        (layout.key_tokens, plain.key_tokens, got[1], grads[1]),
        (layout.key_tokens, plain.key_tokens, got[2], grads[2]),
    ):
        close(to_tokens(x.to(CPU)), of_plain(wanted), 3e-2)


def close(got: Tensor, wanted: Tensor, share: float) -> None:
    assert (got.float() - wanted.float()).norm() < share * wanted.float().norm()


def turned(x: Tensor) -> Tensor:
    """The same, with the heads of a token together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check_rows(query: Tensor, routes: Routes, on_gpu: Routes, layout: BlockLayout) -> None:
    width, lse = query.shape[-1], torch.randn(query.shape[:3])
    used = routes.tile_in_use.bool().repeat_interleave(routes.tile)
    real = rows.dispatch(torch.ones_like(lse)[..., None], routes)[:, 0] > 0
    for strided in (query, turned(query)):
        same(kernels.dispatch(on_device(strided), on_gpu)[on_device(real)], rows.dispatch(query, routes)[real])
    operands = query, query, lse, lse
    for got, wanted in zip(kernels.dispatch_backward(*map(on_device, operands), on_gpu), rows.dispatch_backward(*operands, routes)):
        same(got[on_device(used)], wanted[used])

    row_out, row_lse = torch.randn(routes.n_rows, width).to(query.dtype), torch.randn(routes.n_rows)
    partial, into = (query, lse, row_out, row_lse), (torch.empty_like(query), torch.empty_like(lse))
    rows.merge(*partial, routes, layout, into)
    offset = torch.arange(layout.query_width)
    here = ((offset >= layout.query_start[..., None]) & (offset < layout.query_stop[..., None])).flatten(1)
    here = here[:, None].expand(query.shape[:3])  # other slots are not written
    for strided in (turned(query), query):
        got = on_device(torch.empty_like(strided)), on_device(torch.empty_like(lse))
        kernels.merge(*map(on_device, (strided, *partial[1:])), on_gpu, on_device(layout), got)
        for a, b in zip(got, into):
            same(a[on_device(here)], b[here], 2e-2)
    rows.sum_rows(query, row_out, routes, into[0])
    kernels.sum_rows(on_device(query), on_device(row_out), on_gpu, got[0])
    same(got[0], into[0], 2e-2)
    for strided in (query, turned(query)):
        same(kernels.delta(*map(on_device, (strided, query, lse))), rows.delta(query, query, lse), 1e-3)


def check_decoding(heads, groups, new, tokens, room, width, value_width, block_size, top_k, dtype, shared) -> None:
    settings = AttentionSettings(block_size, top_k, 1, 1, shared, scale=width**-0.5)
    shapes = (heads, new, width), (groups, tokens + room, width), (groups, tokens + room, value_width)
    query, key, value = (torch.randn(2, *shape).to(dtype) for shape in shapes)
    start = torch.tensor([0, min(7, tokens - 1)])
    means = write_means(means_for(key, max(1, (tokens + room) // block_size)), key[:, :, : tokens - new], start, block_size)
    places = torch.tensor(tokens) if room else None, start
    got = [on_device(x) for x in (query, key, value, means)]
    out, lse = kernels.decode(*got, *(None if x is None else on_device(x) for x in places), settings)
    wanted, wanted_lse = decode_plain(query, key, value, means, *places, settings)
    same(out, wanted, 2e-2)
    same(lse, wanted_lse, 2e-2)
    same(got[3], means, 1e-4)

    case = PagedCase(0, settings, (tokens, 1), groups, heads // groups, width, value_width, dtype, page=48, stride=50, new=new)
    query, pages = case.operands()
    for x, y in zip(kernels.decode_pages(on_device(query), on_device(pages), settings), decode_pages(query, pages, settings)):
        same(x, y, 2e-2)


if __name__ == "__main__":
    torch.manual_seed(0)
    for check, shapes in ((check_prefill, PREFILL), (check_decoding, DECODING)):
        for shape in shapes:
            check(*shape)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print("checked", *shape, flush=True)
