"""Routing by Triton kernels is that of plain PyTorch, number for number, and so is merging, in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/ops/test_routing_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex.core.layout_builders import dense_layout
from moba_flex.ops import plain
from moba_flex.ops.triton import routing, rows

TILE = 16


def chosen_blocks(shape: tuple[int, ...], n_blocks: int) -> torch.Tensor:
    """`[B, H, N, S]` int32: blocks that differ from each other, in any order, and -1 here and there."""
    queries, source = shape[0] * shape[1] * shape[2], torch.Generator().manual_seed(sum(shape))
    chosen = torch.stack([torch.randperm(max(n_blocks, shape[3]), generator=source)[: shape[3]] for _ in range(queries)])
    nothing = (chosen >= n_blocks) | (torch.rand(chosen.shape, generator=source) < 0.2)
    return chosen.masked_fill(nothing, -1).view(shape).int()


@pytest.mark.parametrize("columns", [512, 2], ids=["columns of one step", "columns of many steps"])
@pytest.mark.parametrize(
    ("shape", "groups", "n_blocks"),
    [((1, 2, 50, 3), 1, 7), ((2, 4, 70, 4), 2, 40), ((1, 1, 3, 2), 1, 3), ((1, 2, 90, 7), 2, 300), ((2, 2, 9, 1), 2, 1)],
    ids=str,
)
def test_rows_are_those_of_pytorch(shape, groups, n_blocks, columns, monkeypatch):
    monkeypatch.setattr(routing, "_MOST_COLUMNS", columns)
    monkeypatch.setattr(routing, "_LEAST_COLUMNS", 1)
    chosen = chosen_blocks(shape, n_blocks)
    given = chosen, groups, n_blocks, TILE, chosen.numel()
    got, wanted = routing.route(*given), plain.route(*given)
    for name in ("row_of_pair", "tile_in_use", "tiles_of_block", "rows_of_block"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    used, has_rows = wanted.tile_in_use.bool(), wanted.tiles_of_block > 0
    assert torch.equal(got.block_of_tile[used], wanted.block_of_tile[used])
    assert torch.equal(got.first_tile[has_rows], wanted.first_tile[has_rows])


@pytest.mark.parametrize(
    ("n_query", "n_key"), [(64, 64), (61, 61), (32, 64), (30, 64)], ids=["full", "short last block", "last queries", "both"]
)
@pytest.mark.parametrize("by_blocks", [False, True])
def test_partial_outputs_are_merged_as_by_pytorch(n_query: int, n_key: int, by_blocks: bool, monkeypatch):
    """Blocks without empty slots have a kernel of their own; `by_blocks`: the other one."""
    source = torch.Generator().manual_seed(n_query)
    layout = dense_layout(2, n_query, n_key, TILE, TILE, torch.device("cpu")).in_slots()
    assert layout.is_full == (n_query % TILE == 0)
    slots, heads, width = layout.n_query_blocks * TILE, 3, 24
    real = torch.zeros(2, heads, slots, dtype=torch.bool)
    real[:, :, layout.lead : layout.lead + n_query] = True
    chosen = chosen_blocks((2, heads, slots, 3), layout.n_key_blocks).masked_fill(~real[..., None], -1)
    routes = plain.route(chosen, heads, layout.n_key_blocks, TILE, chosen.numel())

    row_out, row_lse = torch.randn(routes.n_rows, width, generator=source), torch.randn(routes.n_rows, generator=source)
    out, lse = torch.randn(2, heads, slots, width, generator=source), torch.randn(2, heads, slots, generator=source)
    wanted, got = ((torch.empty_like(out), torch.empty_like(lse)) for _ in range(2))
    plain.merge(out.double(), lse.double(), row_out.double(), row_lse.double(), routes, layout, wanted)
    if by_blocks:
        monkeypatch.setattr(type(layout), "is_full", False)
    rows.merge(out, lse, row_out, row_lse, routes, layout, got)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)
