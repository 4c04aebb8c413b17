"""The figures: what is drawn is what is read, everything can be read, and matplotlib is needed only then."""

from __future__ import annotations

import sys
from itertools import combinations

import pytest
import torch
from support.cases import random

pytest.importorskip("matplotlib")  # the extra `viz`

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import moba_flex
from moba_flex import Selection, Trace, select_blocks, visualize
from moba_flex.analysis.figures import _OWN, _PADDING

WHITE, BLUE = (1, 1, 1), matplotlib.colormaps["Blues"](1.0)[:3]


def select(rows: int = 1, heads: int = 4, n_query: int = 30, n_key: int | None = None, block_size: int = 4, **changes) -> Selection:
    n_key = n_query if n_key is None else n_key
    query, key = random(rows, heads, n_query, 8, seed=0), random(rows, heads, n_key, 8, seed=1)
    return select_blocks(query, key, **{"block_size": block_size, "top_k": 3, **changes})


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_title().startswith("head")]


def colors(panel) -> torch.Tensor:
    """`[R, W, 3]`, what a panel shows."""
    (image,) = panel.images
    return torch.tensor(image.get_array()[..., :3]).double()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def rgb(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# What is drawn


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_each_cell_has_the_color_of_what_is_read(side, causal):
    mask = torch.ones(2, 30, dtype=torch.bool)
    if side != "none":
        mask[1, slice(0, 7) if side == "left" else slice(23, 30)] = False
    selection = select(rows=2, causal=causal, padding_mask=mask)
    dense = selection.to_dense()
    for row in range(2):
        for head, panel in enumerate(panels(visualize(selection, row=row))):
            assert panel.get_title() == f"head {head}"
            expected = torch.where(dense[row, head][..., None], rgb(*BLUE), rgb(*WHITE))
            for token in range(30):
                if not mask[row, token]:
                    expected[token] = rgb(*to_rgb(_PADDING))
                elif causal:
                    expected[token, selection.block_of_key[row, token]] = rgb(*to_rgb(_OWN))
            torch.testing.assert_close(colors(panel), expected, rtol=0, atol=1e-6, msg=f"row {row}, head {head}")


def test_a_cell_of_many_pairs_is_as_dark_as_the_share_that_is_read():
    selection = select(heads=1, n_query=1500, block_size=5, top_k=40)  # 300 blocks
    (panel,) = panels(visualize(selection))
    shown = colors(panel)
    assert shown.shape == (250, 150, 3)
    dense, own = selection.to_dense()[0, 0], selection.block_of_key[0]
    dense[torch.arange(1500), own] = False
    for line, column in ((249, 3), (200, 17), (180, 100), (100, 40), (60, 1)):
        share = dense[6 * line : 6 * line + 6, 2 * column : 2 * column + 2].double().mean().sqrt()
        assert share > 0, "a cell where nothing is read tells nothing"
        expected = rgb(*matplotlib.colormaps["Blues"](float(share))[:3])
        torch.testing.assert_close(shown[line, column], expected, rtol=0, atol=1e-6, msg=f"cell {line}, {column}")
    for token in (0, 777, 1499):
        assert torch.allclose(shown[token // 6, own[token] // 2], rgb(*to_rgb(_OWN)))


def test_the_last_cell_counts_the_pairs_that_it_has():
    selection = select(heads=1, n_query=601, block_size=2, top_k=400)  # 301 blocks, all read; cells of 3 by 2
    (panel,) = panels(visualize(selection))
    shown = colors(panel)
    assert torch.allclose(shown[-1, :150], rgb(*BLUE)), "one query, two blocks a cell"
    assert torch.allclose(shown[:, 150][-1], rgb(*to_rgb(_OWN)))


def test_axes_count_blocks_and_tokens():
    (panel, *_) = panels(visualize(select(n_query=10, n_key=30)))
    assert panel.images[0].get_extent() == [0, 8, 30, 20], "queries are the last ten tokens"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["chosen block", "own block, always read"]),
        ({"causal": False}, ["chosen block"]),
        ({"padding_mask": torch.arange(30)[None] > 4}, ["chosen block", "own block, always read", "padding"]),
    ],
    ids=["causal", "not causal", "padded"],
)
def test_the_legend_names_the_colors_that_there_are(changes, expected):
    assert legend(visualize(select(**changes))) == expected


def test_the_heads_asked_for_in_their_order():
    assert [panel.get_title() for panel in panels(visualize(select(), heads=[2, 0]))] == ["head 2", "head 0"]


@pytest.mark.parametrize(("heads", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (9, (3, 3)), (14, (3, 5)), (32, (4, 8)), (40, (5, 8))])
def test_many_heads_make_a_grid(heads, grid):
    figure = visualize(select(heads=heads))
    drawn = panels(figure)
    shape = drawn[0].get_gridspec()
    assert len(drawn) == heads and (shape.nrows, shape.ncols) == grid
    empty = [axes for axes in figure.axes if axes not in drawn]
    assert len(empty) == grid[0] * grid[1] - heads and not any(axes.axison for axes in empty)


# Whether it can be read


def some_trace(layers: int = 30, heads: int = 9, blocks: int = 57) -> Trace:
    chosen = torch.randint(0, 100, (layers, heads, blocks))
    numbers = torch.rand(2, layers, heads).double()
    return Trace(tuple(range(layers)), *numbers, chosen, torch.full((blocks,), 100))


FIGURES = {
    "one short head": lambda: visualize(select(heads=1)),
    "one padded head": lambda: visualize(select(heads=1, n_query=400, padding_mask=torch.arange(400)[None] > 40), title="layer 3"),
    "nine heads": lambda: visualize(select(heads=9, n_query=3000), title="layer 20: 7,217 tokens in blocks of 128, top-8"),
    "fourteen heads": lambda: visualize(select(heads=14)),
    "forty heads, long": lambda: visualize(select(heads=40, n_query=6_000, block_size=20), title="a layer"),
    "a trace": lambda: some_trace().figure(),
    "a small trace": lambda: some_trace(1, 2, 3).figure(),
    "a large trace": lambda: some_trace(126, 64, 500).figure(),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_no_text_overlaps_or_is_cut_off(kind):
    figure = FIGURES[kind]()
    figure.draw_without_rendering()
    shown = [(text.get_text(), text.get_fontsize(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(shown) > 5
    for name, size, box in shown:
        assert size >= 9, f"{name!r} is too small"
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
        assert inside, f"{name!r} is cut off"
    for (name, _, box), (other, _, other_box) in combinations(shown, 2):
        apart = box.x1 <= other_box.x0 + 1 or other_box.x1 <= box.x0 + 1 or box.y1 <= other_box.y0 + 1 or other_box.y1 <= box.y0 + 1
        assert apart, f"{name!r} overlaps {other!r}"


def drawn_texts(figure: Figure) -> list[matplotlib.text.Text]:
    """All but the labels of ticks outside an axis's range, which matplotlib keeps and does not draw."""
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    labels = {label for tick in ticks for label in (tick.label1, tick.label2)}
    hidden = {axes for axes in figure.axes if not axes.axison}
    drawn = [text for text in figure.findobj(matplotlib.text.Text) if text not in labels and text.axes not in hidden]
    for axes in set(figure.axes) - hidden:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            within = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            drawn += [label for tick in within for label in (tick.label1, tick.label2)]
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def test_the_trace_figure_shows_the_numbers_of_the_trace():
    trace = some_trace(layers=3, heads=2, blocks=5)
    overlap, taken, _ = trace.figure().axes
    torch.testing.assert_close(torch.tensor(overlap.images[0].get_array()), 100 * trace.overlap)
    torch.testing.assert_close(torch.tensor(taken.images[0].get_array()), trace.chosen.double().mean(1))
    assert [label.get_text() for label in overlap.get_yticklabels()] == ["0", "1", "2"]
    figure = trace.figure()
    assert f"{float(trace.share_of_keys.mean()):.1%} of the keys" in figure.get_suptitle()
    assert figure.axes[-1].get_ylabel() == "share of the chosen blocks (left),\nof the queries (right)"


def test_figures_can_be_written(tmp_path):
    visualize(select()).savefig(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


# matplotlib


def test_matplotlib_is_imported_by_the_first_figure_and_pyplot_never(fresh):
    code = """
import sys, torch, moba_flex
assert "matplotlib" not in sys.modules
x = torch.randn(1, 2, 20, 8)
figure = moba_flex.visualize(moba_flex.select_blocks(x, x, block_size=4, top_k=2))
figure.draw_without_rendering()
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: visualize(select()), some_trace().figure):
        with pytest.raises(ImportError, match=r'pip install "moba_flex\[viz\]"'):
            draw()


# What bad input gets


@pytest.mark.parametrize(
    ("selection", "changes", "error", "words"),
    [
        (torch.zeros(1, 4, 30, 2), {}, TypeError, ["selection", "Tensor", "select_blocks"]),
        (None, {"row": 1}, ValueError, ["row", "0 to 0", "1"]),
        (None, {"row": -1}, ValueError, ["row", "-1"]),
        (None, {"heads": [4]}, ValueError, ["heads", "0 to 3", "[4]"]),
        (None, {"heads": []}, ValueError, ["heads", "[]"]),
        (None, {"heads": 2}, ValueError, ["heads", "2"]),
        ("empty", {}, ValueError, ["no queries"]),
    ],
    ids=str,
)
def test_bad_input_is_named(selection, changes, error, words):
    selection = select(n_query=0, n_key=4) if selection == "empty" else select() if selection is None else selection
    with pytest.raises(error) as raised:
        visualize(selection, **changes)
    for word in words:
        assert word in str(raised.value)


def test_the_package_exports_it():
    assert moba_flex.visualize is visualize
