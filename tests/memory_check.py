"""Every Triton kernel at small and odd shapes, for a memory checker on a CUDA GPU.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/memory_check.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/memory_check.py

Without PyTorch's cache each tensor is an allocation of its own, so that a step beyond its end is seen. Run it once without the checker
first: it compiles the kernels. Results are held against plain PyTorch as well.
"""

from __future__ import annotations

import torch
from torch.testing import assert_close

from moba_flex import gate, kernels, rows
from moba_flex.blocks import BlockLayout, dense_layout, packed_layout, padded_layout, slots_per_block
from moba_flex.spec import Spec

DEVICE = torch.device("cuda")
SHAPES = [  # query heads, key heads, queries, keys, width, block size, top_k, dtype, visibility
    (4, 2, 700, 700, 128, 128, 8, torch.bfloat16, "all"),
    (3, 1, 333, 500, 96, 100, 3, torch.float16, "all"),
    (2, 2, 129, 129, 24, 16, 9, torch.bfloat16, "padded"),
    (2, 1, 401, 401, 64, 48, 4, torch.float32, "packed"),
    (1, 1, 1, 300, 64, 32, 14, torch.bfloat16, "all"),
]


def layout_of(n_query: int, n_key: int, block_size: int, visibility: str) -> BlockLayout:
    width = slots_per_block(block_size)
    if visibility == "padded":
        mask = torch.arange(n_key, device=DEVICE) >= torch.tensor([[17], [0]], device=DEVICE)
        return padded_layout(mask, n_query, block_size, width)
    if visibility == "packed":
        return packed_layout(torch.tensor([0, 1, 1, 200, n_key], dtype=torch.int32, device=DEVICE), n_key, block_size, width)
    return dense_layout(2, n_query, n_key, block_size, width, DEVICE)


def check(heads, groups, n_query, n_key, width, block_size, top_k, dtype, visibility) -> None:
    layout = layout_of(n_query, n_key, block_size, visibility)
    batch, spec = layout.own.shape[0], Spec(block_size, top_k, 1, 1, True, width**-0.5)
    query = layout.query_slots(torch.randn(batch, heads, n_query, width, device=DEVICE).to(dtype)).contiguous()
    key = layout.key_slots(torch.randn(batch, groups, n_key, width, device=DEVICE).to(dtype)).contiguous()
    chosen = kernels.choose(query, key, layout, spec)
    wanted = gate.choose(query, key, layout, spec)
    assert (chosen.sort(-1).values != wanted.sort(-1).values).any(-1).float().mean() < 0.01  # near-ties of half precision

    given = chosen, groups, layout.n_key_blocks, 128, batch * heads * layout.most_pairs(spec.routed, True)
    routes, expected = kernels.route(*given), rows.route(*given)
    assert torch.equal(routes.row_of_pair, expected.row_of_pair)
    lse = torch.randn(query.shape[:3], device=DEVICE)
    used = routes.tile_in_use.bool().repeat_interleave(routes.tile)
    real = rows.dispatch(torch.ones_like(lse)[..., None], routes)[:, 0] > 0
    assert torch.equal(kernels.dispatch(query, routes)[real], rows.dispatch(query, routes)[real])
    for got, plain in zip(kernels.dispatch_backward(*(operands := (query, query, lse, lse, routes))), rows.dispatch_backward(*operands)):
        assert torch.equal(got[used], plain[used])
    row_out, row_lse = torch.randn(routes.n_rows, width, device=DEVICE).to(dtype), torch.randn(routes.n_rows, device=DEVICE)
    merged = [(torch.empty_like(query), torch.empty_like(lse)) for _ in range(2)]
    summed = [torch.empty_like(query) for _ in range(2)]
    for module, into, total in zip((kernels, rows), merged, summed):
        module.merge(query, lse, row_out, row_lse, routes, into)
        module.sum_rows(query, row_out, routes, total)
    for got, plain in (*zip(*merged), summed):
        assert_close(got, plain, rtol=2e-2, atol=2e-2)
    assert_close(kernels.delta(query, query, lse), rows.delta(query, query, lse), rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape in SHAPES:
        check(*shape)
        torch.cuda.synchronize()
        print("checked", *shape, flush=True)
