"""FlexAttention's `BACKEND: "FLASH"` (flash-attn-4) for the forward pass of routed rows to large blocks, opt-in.

The package is young: versions differ in what they accept and in the unit of the log-sum-exp, and one gave wrong outputs. Before its first
use with a head dimension, dtype and block size, output and log-sum-exp are therefore compared with plain PyTorch on the same GPU. If they
differ, or anything is raised, a warning is issued once and Triton's kernel is used. The backward pass is always Triton's.

R routed rows, T tiles of rows, P slots per block, D and Dv head dimensions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from ..core.chunking import QUERY_TILE
from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..core.validation import check_choice
from ..ops.routing import Routes
from .compilation import any_length, compiled

Call = Callable[..., tuple[Tensor, Tensor]]
Kernel = Callable[[Tensor, Tensor, Tensor, Routes], tuple[Tensor, Tensor]]

BACKENDS = ("triton", "flash")
_OLDEST = "4.0.0b26"  # older ones could give wrong gradients on Hopper: Dao-AILab/flash-attention, pull request 2756
_LEAST_BLOCK = 1024  # with smaller blocks, both kernels are bound by loading rows
_MOST_WIDTH = 128  # up to this head dimension the kernel's tiles hold 128 keys, which is the unit of its lists
_KEY_TILE = 128
_DEVICE = "cuda"
_OUTPUT_TOLERANCE, _LSE_TOLERANCE = 0.02, 0.01
_DTYPES = (torch.bfloat16, torch.float16)

_backend = "triton"
_kernels: dict[tuple[Hashable, ...], Kernel | None] = {}  # by everything that a kernel is compiled for; None: not usable


def set_flex_backend(name: str = "triton") -> str:
    """Set which kernels compute routed rows on a GPU, and return the previous setting.

    Args:
        name: "triton", FlexAttention's own kernels; or "flash", the kernels of the package flash-attn-4, for Hopper GPUs. "flash" applies
            to causal forward passes in bfloat16 or float16 with blocks of at least 1,024 tokens (a multiple of 128), head dimensions up to
            128 (multiples of 8) and no `softcap`. The first call of each kind compares it with plain PyTorch, which takes some seconds and
            synchronizes the GPU. All other calls, and calls for which the comparison fails, use "triton".

    Raises:
        ValueError: an unknown name.
        ImportError: "flash" without the package, or with a version before 4.0.0b26.

    >>> from moba_flex import set_flex_backend
    >>> set_flex_backend("triton")
    'triton'
    """
    global _backend
    check_choice("name", name, BACKENDS)
    if name == "flash" and (missing := _missing()) is not None:
        raise ImportError(
            f'set_flex_backend("flash") needs the package flash-attn-4 {_OLDEST} or newer, {missing}: pip install "moba_flex[flash]"'
        )
    before, _backend = _backend, name
    return before


def enabled() -> bool:
    """Whether `set_flex_backend("flash")` is active."""
    return _backend == "flash"


def _missing() -> str | None:
    """Why flash-attn-4 cannot be used, as the end of a sentence, or None."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is None:
            return "which is not here"
        found = importlib.metadata.version("flash-attn-4")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return "which is not here"
    return None if Version(found) >= Version(_OLDEST) else f"but this is {found}"


def kernel_for(query: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings) -> Kernel | None:
    """The kernel for rows like `query [R, D]`, or None for Triton's."""
    if not enabled() or not _suits(query, value, layout, settings):
        return None
    compiled_for = layout.width, query.shape[-1], value.shape[-1], query.dtype, settings.scale, query.device
    if compiled_for not in _kernels:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # nothing can be compared while a CUDA graph is captured
        _kernels[compiled_for] = _checked(*compiled_for)
    return _kernels[compiled_for]


def _suits(query: Tensor, value: Tensor, layout: BlockLayout, settings: AttentionSettings) -> bool:
    """Whether every tile in use reads a whole block without a mask, in key tiles that the kernel supports."""
    whole = settings.causal and layout.whole and layout.width % _KEY_TILE == 0 and layout.width >= _LEAST_BLOCK
    widths = max(query.shape[-1], value.shape[-1]) <= _MOST_WIDTH and query.shape[-1] % 8 == value.shape[-1] % 8 == 0
    return whole and widths and settings.softcap is None and query.dtype in _DTYPES and query.device.type == _DEVICE


def _checked(width: int, query_width: int, value_width: int, dtype: torch.dtype, scale: float, device: torch.device) -> Kernel | None:
    """The kernel, if it agrees with plain PyTorch. Otherwise warns and returns None."""
    try:
        call = _compiled((width, query_width, value_width, dtype, scale))
        unit = _unit_of_lse(call, width, query_width, value_width, dtype, scale, device)
    except Exception as error:  # whatever a kernel's compilation can raise
        reason = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f'FlexAttention\'s BACKEND "FLASH" is not used for blocks of {width}, widths {query_width} and {value_width}, {dtype}, but '
            f"Triton's kernel: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        out, lse = call(*any_length(query, key, value, *_lists(routes.block_of_tile, routes.tile_in_use, width)))
        return out, lse / unit

    return kernel


def _compiled(settings: tuple[int, int, int, torch.dtype, float]) -> Call:
    scale = settings[-1]

    def moba_flex_flash(
        query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, full_counts: Tensor, full_indices: Tensor
    ) -> Any:
        # Never evaluated, since no tile is listed as partial; without a `mask_mod` the lists would be ignored.
        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv >= 0

        lists = counts, indices, full_counts, full_indices
        no_lists = (None, None, None, None)  # per key tile, for a backward pass only
        mask = BlockMask((query.shape[2], key.shape[2]), *lists, *no_lists, BLOCK_SIZE=(QUERY_TILE, _KEY_TILE), mask_mod=mask_mod)
        options: FlexKernelOptions = {"BACKEND": "FLASH"}
        out, aux = flex_attention(query, key, value, None, mask, scale, kernel_options=options, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return compiled(moba_flex_flash, settings)


def _lists(block_of_tile: Tensor, tile_in_use: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts `[1, 1, T]` and indices `[1, 1, T, P / 128]` of the partial, then of the full key tiles that each tile of rows reads."""
    per = width // _KEY_TILE
    index = block_of_tile[:, None] * per + torch.arange(per, device=block_of_tile.device, dtype=torch.int32)
    count = tile_in_use * per
    return torch.zeros_like(count)[None, None], torch.zeros_like(index)[None, None], count[None, None], index[None, None]


def _unit_of_lse(
    call: Call, width: int, query_width: int, value_width: int, dtype: torch.dtype, scale: float, device: torch.device
) -> float:
    """The unit of the kernel's log-sum-exp: 1, or ln 2 if PyTorch treats it as a base-2 logarithm.

    Raises ArithmeticError if the log-sum-exp or the output differs from plain PyTorch. The test has more tiles than an H100 has
    multiprocessors, blocks with many, one and no tiles, and spare tiles at the end. It runs three times.
    """
    block_of_tile = torch.tensor([0] * 80 + [1] + [3] * 59 + [0] * 9, device=device, dtype=torch.int32)
    used, total = 140, block_of_tile.numel()
    in_use = (torch.arange(total, device=device) < used).int()
    generator = torch.Generator(device).manual_seed(0)
    shapes = (total * QUERY_TILE, query_width), (4 * width, query_width), (4 * width, value_width)
    query, key, value = (torch.randn(1, 1, *shape, generator=generator, device=device).to(dtype) for shape in shapes)
    wanted, wanted_lse = _plain(query[:, :, : used * QUERY_TILE], key, value, block_of_tile, width, scale)

    units = {1.0, math.log(2)}
    for _ in range(3):
        out, lse = call(*any_length(query, key, value, *_lists(block_of_tile, in_use, width)))
        out, lse = (x[0, 0, : used * QUERY_TILE].double() for x in (out, lse))
        error = ((out - wanted).abs().max() / wanted.abs().max()).item()
        if not error < _OUTPUT_TOLERANCE:
            raise ArithmeticError(f"its output is not that of plain PyTorch: the largest difference is {error:.2g} of the largest value")
        units = {unit for unit in units if (lse / unit - wanted_lse).abs().max() < _LSE_TOLERANCE}
        if not units:
            raise ArithmeticError("its log-sum-exp is not that of plain PyTorch")
    return units.pop()


def _plain(query: Tensor, key: Tensor, value: Tensor, block_of_tile: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[R, Dv]` and log-sum-exp `[R]` of one tile after another, in float64."""
    results = []
    for q, block in zip(query[0, 0].split(QUERY_TILE), block_of_tile.tolist()):
        keys = slice(block * width, (block + 1) * width)
        score = q.double() @ key[0, 0, keys].double().mT * scale
        results.append((score.softmax(-1) @ value[0, 0, keys].double(), score.logsumexp(-1)))
    out, lse = zip(*results)
    return torch.cat(out), torch.cat(lse)
