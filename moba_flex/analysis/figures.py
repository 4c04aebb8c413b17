"""Figures of the blocks that are read: `visualize` draws a selection, `trace_figure` the result of `moba_flex.trace`.

matplotlib comes with the extra `viz`. It is imported when a figure is made, without pyplot, so that no global state changes.

B batch, H query heads, N tokens (Nq queries, Nk keys), C blocks, R by W the cells of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import layer_indices
from ..core.messages import kind_of, shown
from ..selection import Selection

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .trace import Trace

_MOST_CELLS = 256  # largest number of cells of a panel, in either direction: more cannot be distinguished
_OWN, _PADDING = "#f28e2b", "#d9d9d9"
_COLORS = "Blues"


def visualize(selection: Selection, *, row: int = 0, heads: Iterable[int] | None = None, title: str | None = None) -> Figure:
    """Draw which blocks each query reads, one panel per head: queries from top to bottom, key blocks from left to right.

    A cell is one query and one block. If there are too many to be visible, a cell covers several, and its darkness is the share of its
    (query, block) pairs that are read. Own blocks and padding have their own colors; sink and recent blocks count as chosen.

    Args:
        selection: returned by `moba_flex.select_blocks`, or an element of `Trace.selections`.
        row: which row of the batch.
        heads: which heads, in this order; default: all.
        title: the title above all panels.

    Returns:
        A `matplotlib.figure.Figure`: `figure.savefig("blocks.png")`. Notebooks show it with `display(figure)`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `selection` is not a Selection, or `title` is not a string.
        ValueError: there is no such row or head, or nothing to draw.

    >>> import torch
    >>> from moba_flex import select_blocks, visualize
    >>> selection = select_blocks(torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), block_size=16, top_k=3)
    >>> len(visualize(selection, heads=[0, 3]).axes)
    2
    """
    heads = _check_selection(selection, row, heads, title)
    own = selection.block_of_key[row, selection.block_of_key.shape[1] - selection.indices.shape[2] :].cpu()
    first, n_query, n_blocks = selection.block_of_key.shape[1] - len(own), len(own), selection.n_blocks
    per_cell = -(-n_query // _MOST_CELLS), -(-n_blocks // _MOST_CELLS)

    lines, columns = _grid(len(heads))
    size = 4.2 if len(heads) == 1 else 2.6 if len(heads) <= 12 else 1.9
    figure = _figure((max(5.0, columns * size), lines * size + 1.0))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, head in zip(panels, heads):
        colors = _cells(selection.indices[row, head].cpu(), own, n_blocks, per_cell, selection.causal)
        panel.imshow(colors, extent=(0, n_blocks, first + n_query, first), aspect="auto", interpolation="nearest")
        panel.set_title(f"head {head}", fontsize=10)
        _whole_numbers(panel)
    for panel in panels[len(heads) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(heads) - columns) : len(heads)]:
        panel.tick_params(labelbottom=True)
    figure.supxlabel("key block", fontsize=11)
    figure.supylabel("query (its place among the tokens)", fontsize=11)
    _explain(figure, title, per_cell, selection.causal, bool((own < 0).any()))
    return figure


def trace_figure(trace: Trace) -> Figure:
    """Two panels with one row per layer: the overlap of neighbouring queries' choices per head, and how many queries choose each block."""
    heads, blocks = trace.chosen.shape[1:]
    taken = trace.chosen.double().mean(1) / trace.candidates
    drawn = (
        (trace.overlap, "head", "chosen blocks that the next query chooses too"),
        (taken, "key block", "queries that choose a block, of those that could"),
    )
    wide = max(4.5, min(8.0, 1.5 + 0.2 * heads)), max(5.0, min(9.0, 1.5 + 0.1 * blocks))
    figure = _figure((sum(wide), max(3.2, min(9.0, 0.2 * len(trace.layers) + 1.6))))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=wide)
    for panel, (values, label, title) in zip(panels, drawn):
        image = panel.imshow(100 * values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=100)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(label, fontsize=11)
        _whole_numbers(panel)
    bar = figure.colorbar(image, ax=panels, format="%d%%", pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=9)
    bar.set_label("share of the chosen blocks (left),\nof the queries (right)", fontsize=10)
    panels[0].set_ylabel("layer", fontsize=11)
    step = -(-len(trace.layers) // 16)
    panels[0].set_yticks(range(0, len(trace.layers), step), [str(layer) for layer in trace.layers[::step]])
    figure.suptitle(f"MoBA layers: {trace.share_of_keys.mean():.1%} of the keys are read", fontsize=12)
    return figure


def _figure(inches: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib, which is not installed: pip install "moba_flex[viz]"') from error
    return Figure(figsize=inches, layout="constrained", dpi=100)


def _check_selection(selection: Selection, row: int, heads: Iterable[int] | None, title: str | None) -> tuple[int, ...]:
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a moba_flex.Selection, as select_blocks gives it, but is {kind_of(selection)}")
    n_rows, n_heads, n_query, _ = selection.indices.shape
    if 0 in (n_rows, n_heads, n_query):
        raise ValueError("selection has no queries, so that there is nothing to draw")
    heads = tuple(range(n_heads)) if heads is None else layer_indices("heads", heads)
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < n_rows:
        raise ValueError(f"row must be an int from 0 to {n_rows - 1}, but is {shown(row)}")
    if not heads or any(not 0 <= head < n_heads for head in heads):
        raise ValueError(f"heads must be some of 0 to {n_heads - 1}, but is {shown(list(heads))}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a str or None, but is {shown(title)}")
    return heads


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns of the grid: nearly square, with as few empty cells as possible."""
    root = math.isqrt(panels - 1) + 1
    columns = min(range(root, root * 3 // 2 + 1), key=lambda columns: (-panels % columns, columns))
    return -(-panels // columns), columns


def _cells(chosen: Tensor, own: Tensor, n_blocks: int, per_cell: tuple[int, int], causal: bool) -> NDArray[np.float64]:
    """`[R, W, 4]` colors of one head, from its `chosen [Nq, S]` and `own [Nq]` blocks, -1 for none."""
    import matplotlib
    from matplotlib.colors import to_rgba

    share = _share(chosen, n_blocks, per_cell)
    colors = matplotlib.colormaps[_COLORS](share.sqrt().numpy())  # the square root makes small shares visible
    colors[share.numpy() == 0] = to_rgba("white")
    line, real = torch.arange(len(own)) // per_cell[0], own >= 0
    if causal:
        colors[line[real], own[real] // per_cell[1]] = to_rgba(_OWN)
    empty = torch.ones(len(share), dtype=torch.bool).index_fill(0, line[real], False)
    colors[empty.numpy()] = to_rgba(_PADDING)
    return colors


def _share(chosen: Tensor, n_blocks: int, per_cell: tuple[int, int]) -> Tensor:
    """`[R, W]`: the share of each cell's (query, block) pairs that are among the `chosen [Nq, S]` blocks."""
    queries, blocks = per_cell
    lines, columns = -(-len(chosen) // queries), -(-n_blocks // blocks)
    cell = (torch.arange(len(chosen)) // queries)[:, None] * columns + chosen.long() // blocks
    count = torch.bincount(cell[chosen >= 0], minlength=lines * columns).view(lines, columns)
    high = torch.full((lines,), queries).index_fill_(0, torch.tensor([lines - 1]), len(chosen) - (lines - 1) * queries)
    wide = torch.full((columns,), blocks).index_fill_(0, torch.tensor([columns - 1]), n_blocks - (columns - 1) * blocks)
    return count / (high[:, None] * wide)


def _explain(figure: Figure, title: str | None, per_cell: tuple[int, int], causal: bool, padding: bool) -> None:
    """Add the title, the legend, and a color bar if a cell covers more than one pair."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Patch

    entries = [Patch(facecolor=matplotlib.colormaps[_COLORS](1.0), label="chosen block")]
    if causal:
        entries.append(Patch(facecolor=_OWN, label="own block, always read"))
    if padding:
        entries.append(Patch(facecolor=_PADDING, label="padding"))
    figure.legend(
        handles=entries, loc="outside upper center", ncols=len(entries), frameon=False, title=title, title_fontsize=12, fontsize=10
    )
    if per_cell != (1, 1):
        queries, blocks = per_cell
        what = f"{queries} queries" if blocks == 1 else f"{queries} queries by {blocks} blocks"
        bar = figure.colorbar(ScalarMappable(PowerNorm(0.5, 0, 1), _COLORS), ax=figure.axes, pad=0.02, aspect=40, shrink=0.8)
        bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1], labels=["0%", "1%", "10%", "25%", "50%", "100%"])
        bar.set_label(f"share of a cell ({what}) that is read", fontsize=10)


def _whole_numbers(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    panel.tick_params(labelsize=9)
