"""The gate as a public function: `select_blocks` returns the blocks that each query reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .attention import gate, placed_keys, placed_queries
from .backends import backend_of
from .core import validation
from .core.autocast import without_autocast
from .core.layout_builders import layout_of
from .dispatch import LARGE_TOP_K, with_bounded_top_k
from .functional import checked_settings
from .reference import block_of_key

_TILE = 128


@dataclass(frozen=True, eq=False)
class Selection:
    """The blocks that each query reads.

    Attributes:
        indices: `[B, H, Nq, top_k - 1]` int32, the chosen past blocks in ascending order, padded with -1 at the end. The own block is
            not among them. With `causal=False` there is no own block, and the shape is `[B, H, Nq, top_k]`. A `top_k` above both 64 and
            the number of blocks counts as the larger of these two.
        block_of_key: `[B, Nk]` int64, the block of each key, -1 for padding. The queries are the last Nq of these positions.
        n_blocks: maximum number of blocks of a batch row.
        causal: whether queries see only the keys up to their own position.

    >>> import torch
    >>> from moba_flex import select_blocks
    >>> query, key = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    >>> selection = select_blocks(query, key, block_size=16, top_k=3)
    >>> selection.to_dense()[0, 0, -1].sum()  # the last query reads three of seven blocks
    tensor(3)
    >>> selection.to_block_mask().shape
    (1, 4, 100, 100)
    """

    indices: Tensor
    block_of_key: Tensor
    n_blocks: int
    causal: bool

    def to_dense(self) -> Tensor:
        """`[B, H, Nq, n_blocks]` bool: True for the blocks that a query reads, its own block included. All False at padded queries."""
        picked = torch.where(self.indices < 0, self.n_blocks, self.indices).long()
        dense = torch.zeros(*self.indices.shape[:3], self.n_blocks + 1, dtype=torch.bool, device=self.indices.device)
        dense.scatter_(-1, picked, True)
        if self.causal:
            own = self.block_of_key[:, None, self.block_of_key.shape[1] - self.indices.shape[2] :, None]
            dense.scatter_(-1, torch.where(own < 0, self.n_blocks, own).expand(*dense.shape[:3], 1), True)
        return dense[..., : self.n_blocks].contiguous()

    def to_block_mask(self) -> BlockMask:
        """A BlockMask for your own calls: `flex_attention(query, key, value, block_mask=selection.to_block_mask())`.

        Its `mask_mod` is exact per token. Its tiles hold 128 queries and list the union of the blocks that these read, which on random
        data is nearly all blocks. `moba_attention` does not compute this union and is faster.
        """
        dense, of_key, causal = self.to_dense(), self.block_of_key, self.causal
        rows, _, n_query, n_blocks = dense.shape
        n_key = of_key.shape[1]
        ahead = n_key - n_query

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            block = of_key[b, kv]
            seen = dense[b, h, q, block.clamp(min=0)] & (block >= 0)
            return seen & (kv <= q + ahead) if causal else seen

        q_tiles, kv_tiles = -(-n_query // _TILE), -(-n_key // _TILE)
        pad = q_tiles * _TILE - n_query
        read = torch.nn.functional.pad(dense, (0, 0, 0, pad)).unflatten(2, (q_tiles, _TILE)).any(3)  # [B, H, tiles, blocks]
        holds = torch.zeros(rows, n_blocks + 1, kv_tiles, dtype=torch.bool, device=dense.device)  # [B, blocks, key tiles]
        tile = torch.arange(n_key, device=dense.device) // _TILE
        row = torch.arange(rows, device=dense.device)[:, None]
        holds[row, torch.where(of_key < 0, n_blocks, of_key), tile] = True
        tiles = (read.float() @ holds[:, None, :n_blocks].float()) > 0
        if causal:
            last = torch.arange(1, q_tiles + 1, device=dense.device) * _TILE - 1 + ahead
            tiles &= torch.arange(kv_tiles, device=dense.device) * _TILE <= last[:, None]
        counts = tiles.sum(-1, dtype=torch.int32)
        indices = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=_TILE, mask_mod=mask_mod, seq_lengths=(n_query, n_key))


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    recent_blocks: int = 0,
    share_selection: bool = False,
    causal: bool = True,
    padding_mask: Tensor | None = None,
) -> Selection:
    """The gate alone (report, equations 5 and 6): the blocks that `moba_attention` reads with the same arguments.

    Arguments, dtypes and errors are those of `moba_attention`; tensors without values (meta, FakeTensor) raise ValueError, and
    torch.func.vmap raises NotImplementedError. The selection has no gradient.

    >>> import torch
    >>> from moba_flex import select_blocks
    >>> query, key = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    >>> selection = select_blocks(query, key, block_size=16, top_k=3)
    >>> selection.indices.shape, selection.to_dense().shape
    (torch.Size([1, 4, 100, 2]), torch.Size([1, 4, 100, 7]))
    """
    validation.check_query_key(query=query, key=key)
    validation.check_not_mapped("select_blocks", query=query, key=key)
    validation.check_padding_mask(padding_mask, query, key)
    validation.check_values("select_blocks", query=query, key=key)
    settings = checked_settings(
        query,
        query.shape[1],
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        share_selection=share_selection,
        causal=causal,
    )
    n_blocks = -(-key.shape[2] // block_size)
    settings = with_bounded_top_k(settings, n_blocks)
    width = min(top_k, max(LARGE_TOP_K, n_blocks)) - causal
    backend = backend_of(settings)
    with without_autocast(query), torch.no_grad(), torch.cuda.device_of(query):  # as in the operator
        layout = layout_of(query, key, padding_mask, None, block_size, backend)
        if query.numel():
            placed = placed_queries(query, layout, backend, False), placed_keys(key, layout, backend, False)
            chosen = gate(*placed, layout.in_slots(), settings, backend)
            indices = layout.query_tokens(chosen, fill=-1)
        else:
            indices = torch.full((*query.shape[:3], settings.n_routed), -1, dtype=torch.int32, device=query.device)
        last = torch.iinfo(torch.int32).max
        indices = torch.where(indices < 0, last, indices).sort(dim=-1).values
        indices = torch.where(indices == last, -1, indices)[..., :width]
        return Selection(indices, block_of_key(key, padding_mask, block_size), n_blocks, causal)
