"""Every Triton kernel compiles for GPUs that are not here, and a program of it takes no more than such a GPU has."""

from __future__ import annotations

import pytest
import torch
from support.gpu_compiler import GPUS, Gpu, compiling_for

from moba_flex.core.layout import slots_per_block
from moba_flex.core.layout_builders import dense_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.core.take import take_by_kernel
from moba_flex.ops import plain

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")

from moba_flex.ops import triton as kernels
from moba_flex.ops.triton import backward, decoding, dense_mask, forward, gate

# Block size, width, value width, top_k, dtype.
SHAPES = {
    "block 128": (128, 128, 128, 8, torch.bfloat16),
    "block 16": (16, 64, 64, 8, torch.bfloat16),
    "block 64, many blocks": (64, 64, 64, 16, torch.float16),
    "block 256": (256, 128, 128, 4, torch.bfloat16),
    "block 48, narrow values": (48, 96, 64, 4, torch.bfloat16),
    "width 256": (128, 256, 256, 4, torch.bfloat16),
    "float32": (128, 128, 128, 4, torch.float32),
    "float32, width 256": (64, 256, 256, 4, torch.float32),
}


def launch(block_size: int, width: int, value_width: int, top_k: int, dtype: torch.dtype, **more) -> None:
    """All kernels of a forward and a backward pass, and of decoding, that such a call launches."""
    heads, groups, n_tokens = 4, 2, 6 * block_size
    layout = dense_layout(1, n_tokens, n_tokens, block_size, slots_per_block(block_size), torch.device("cpu")).in_slots()
    settings = AttentionSettings(block_size, top_k, scale=width**-0.5, implementation="flex", **more)

    def tensor(h: int, w: int) -> torch.Tensor:
        return torch.zeros(1, h, layout.n_key_blocks * layout.width, w, dtype=dtype)

    query, key, value, out = tensor(heads, width), tensor(groups, width), tensor(groups, value_width), tensor(heads, value_width)
    lse = torch.zeros(query.shape[:3])
    take_by_kernel(query, torch.arange(n_tokens)[None])
    take_by_kernel(torch.zeros(query.shape[:3]), torch.arange(n_tokens)[None], fill=-torch.inf)
    chosen = kernels.choose(query, key, layout, settings)
    pairs = heads * layout.max_pairs(settings.n_routed, True)
    kernels.route(chosen, groups, layout.n_key_blocks, 128, pairs)
    routes = plain.route(torch.zeros_like(chosen), groups, layout.n_key_blocks, 128, pairs)
    rows = kernels.dispatch(query, routes)
    kernels.merge(out, lse, torch.zeros(routes.n_rows, value_width, dtype=dtype), torch.zeros(routes.n_rows), routes, layout, (out, lse))
    kernels.delta(out, out, lse)
    kernels.dispatch_backward(query, out, lse, lse, routes)
    kernels.sum_rows(query, rows, routes, query)
    if dtype != torch.float32:
        if kernels.forward.fits(query, value, layout.width):
            kernels.one_pass_forward(query, key, value, routes, layout, settings, (out, lse))
        if block_size % 64 == 0 and max(width, value_width) <= 128:
            kernels.dense_mask_forward(query, key, value, chosen, layout, settings)
        kernels.block_bits(chosen, layout)
        if kernels.backward.sub_blocks(query, value, layout.width) <= 3:
            kernels.one_pass_backward(query, key, value, out, lse, lse, routes, layout, settings, (query, key, value))
    means = torch.zeros(1, groups, layout.n_key_blocks, width)
    kernels.mark(torch.zeros((), dtype=torch.int32), 1)
    kernels.decode(query[:, :, :1], key, value, means, None, None, settings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_kernels_compile_and_fit(gpu: Gpu, shape: str, monkeypatch):
    for module in (gate, backward, forward, decoding, dense_mask):
        monkeypatch.setattr(module, "gpu_memory", lambda _: (gpu.shared_bytes, gpu.major))
    with compiling_for(gpu) as compiled:
        launch(*SHAPES[shape])
    assert {"_search_kernel", "_merge_kernel", "_rank_kernel", "_attend_kernel"} <= {kernel.name for kernel in compiled}
    for kernel in compiled:
        assert kernel.shared_bytes <= gpu.shared_bytes, f"{kernel.name} of {shape} wants too much shared memory of {gpu}"
        assert kernel.tensor_columns <= 512, f"{kernel.name} of {shape} wants too much tensor memory of {gpu}"
        assert kernel.registers <= 255, kernel


def test_softcaps_compile_too(monkeypatch):
    gpu = next(gpu for gpu in GPUS if gpu.name == "sm_90")
    for module in (gate, backward, forward, decoding, dense_mask):
        monkeypatch.setattr(module, "gpu_memory", lambda _: (gpu.shared_bytes, gpu.major))
    with compiling_for(gpu) as compiled:
        launch(128, 64, 64, 4, torch.bfloat16, softcap=3.0)
    assert {"_backward_kernel", "_forward_kernel", "_dense_mask_kernel"} <= {kernel.name for kernel in compiled}
