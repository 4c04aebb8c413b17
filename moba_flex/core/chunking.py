"""Splits a call into chunks whose routed rows fit into the working memory and into a kernel's offset range.

B batch rows, H query heads, G key heads, Q query blocks, C key blocks, P slots per block, D and Dv head dimensions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from .layout import BlockLayout
from .settings import AttentionSettings

QUERY_TILE = 128  # routed rows per tile; a tile reads exactly one block
MASK_TILE = 64  # queries, and keys, per tile of a dense mask: on an H200 faster than 128
# Maximum batch rows times query heads per launch: CUDA's limit on all but the first grid dimension.
MAX_HEADS = 65_535

Parts = list[tuple[slice, slice]]
Chunk = tuple[slice, slice, Parts]


class Piece(NamedTuple):
    """The unit of work: one part of a chunk, and its index among the parts."""

    rows: slice
    groups: slice
    heads: slice
    blocks: slice  # query blocks
    number: int
    n_parts: int

    @property
    def alone(self) -> bool:
        """Whether no other piece reads these keys."""
        return self.n_parts == 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.n_parts - 1


def pieces(chunks: Iterable[Chunk]) -> list[Piece]:
    """The parts of all chunks, in order."""
    return [Piece(rows, groups, *part, i, len(parts)) for rows, groups, parts in chunks for i, part in enumerate(parts)]


def chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    settings: AttentionSettings,
    reach: int,
    elements_per_row: int,
    head_by_head: bool = False,
) -> Iterator[Chunk]:
    """Slices of batch rows and key heads, all of one shape, whose routed rows, of `elements_per_row` elements each, fit into the working
    memory. Each slice comes with its parts: slices of query heads and query blocks.

    A part has no tensor of more than `reach` elements. The smallest chunk, whatever the budget, is one key head of one batch row with its
    query heads; several share a chunk if they fit. A chunk has more than one part only if one key head exceeds `reach`. A chunk of
    several key heads has at most `MAX_HEADS` query heads, over all its batch rows. With `head_by_head`, each query head of each batch row
    is a part.

    Raises ValueError if one head's keys, or the routed rows of one query block, are more than `reach` elements.
    """
    n_rows, n_groups, repeats = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    width, row_bytes = max(query.shape[-1], value.shape[-1]), elements_per_row * query.element_size() + 24
    parts = _parts(repeats, width, layout, settings, reach, 1 if head_by_head else repeats)
    fit = (
        1
        if head_by_head
        else min(
            MAX_HEADS // repeats,
            settings.working_memory // max(1, repeats * layout.n_query * settings.n_routed * row_bytes),
            reach // max_elements(repeats, layout.n_query_blocks, width, layout, settings),
        )
    )
    rows_fit = max((n for n in range(1, n_rows + 1) if n_rows % n == 0 and n * n_groups <= fit), default=1)
    groups_fit = max((n for n in range(1, n_groups + 1) if n_groups % n == 0 and n <= max(1, fit)), default=1)
    for row in range(0, n_rows, rows_fit):
        for group in range(0, n_groups, groups_fit):
            first, more = group * repeats, (groups_fit - 1) * repeats  # several key heads are one part
            shifted = [(slice(first + heads.start, first + heads.stop + more), blocks) for heads, blocks in parts]
            yield slice(row, row + rows_fit), slice(group, group + groups_fit), shifted


def launches(n_rows: int, heads: int) -> list[slice]:
    """Slices of batch rows with `heads` heads each: as many rows as one launch supports, and at least one."""
    step = max(1, MAX_HEADS // heads)
    return [slice(row, min(row + step, n_rows)) for row in range(0, n_rows, step)]


def _parts(repeats: int, width: int, layout: BlockLayout, settings: AttentionSettings, reach: int, most_heads: int) -> Parts:
    """The parts of one key head: `most_heads` query heads with all query blocks, or fewer heads, or some blocks of one head."""

    def elements(heads: int, blocks: int) -> int:
        return max_elements(heads, blocks, width, layout, settings)

    n_blocks = layout.n_query_blocks
    if elements(1, 1) > reach:
        raise ValueError(
            f"key has {layout.n_key} tokens of width {width} in blocks of {layout.block_size}: the keys of one head, and the rows that one "
            f'block of queries sends to {settings.n_routed} blocks, may be at most {reach} elements on a GPU: use implementation="eager"'
        )
    heads = max((n for n in range(1, most_heads + 1) if repeats % n == 0 and elements(n, n_blocks) <= reach), default=1)
    blocks = max(1, bisect_right(range(1, n_blocks + 1), reach, key=lambda n: elements(heads, n)))
    each_head, each_block = range(0, repeats, heads), range(0, n_blocks, blocks)
    return [(slice(h, h + heads), slice(b, min(b + blocks, n_blocks))) for h in each_head for b in each_block]


def max_elements(heads: int, blocks: int, width: int, layout: BlockLayout, settings: AttentionSettings) -> int:
    """Upper bound on the elements of any tensor of one key head, for `heads` of its query heads and `blocks` of their query blocks."""
    pairs = heads * blocks * min(layout.block_size, layout.query_width) * min(settings.n_routed, layout.n_key_blocks)
    routed = tiles_needed(pairs, layout.n_key_blocks, QUERY_TILE) * QUERY_TILE
    return max(routed, heads * blocks * layout.query_width, layout.n_key_blocks * layout.width) * width


def tiles_needed(max_pairs: int, n_blocks: int, tile: int) -> int:
    """T: enough tiles for `max_pairs` pairs, however they are distributed over `n_blocks` blocks."""
    return -(-max_pairs // tile) + min(n_blocks, max_pairs)
