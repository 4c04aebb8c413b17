"""The decoding kernels give what plain PyTorch gives in float64, in Triton's interpreter: of keys in rows, and of keys in pages.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_decoding_kernels.py

What no token may read holds NaN.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from support.pages import PagedCase
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which the extra `kernels` brings: pip install '.[kernels]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets Triton kernels: set TRITON_INTERPRET=1", allow_module_level=True)

from moba_flex import decoding
from moba_flex.core import chunking
from moba_flex.core.settings import AttentionSettings
from moba_flex.ops import triton as kernels
from moba_flex.ops.decoding import decode_plain, means_for, write_means
from moba_flex.ops.pages import decode_pages
from moba_flex.ops.triton import decoding as launched

BOUND = {torch.float32: 1e-5, torch.float16: 4e-3}


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype, case: object) -> None:
    for name, x, y in zip(("output", "log-sum-exp"), found, wanted):
        torch.testing.assert_close(
            x.double(), y.double(), rtol=BOUND[dtype], atol=BOUND[dtype], msg=lambda m, name=name: f"{name}: {m} in {case}"
        )


def settings_of(r: random.Random, block_size: int, width: int) -> AttentionSettings:
    top_k = r.choice([1, 2, 3, 5])
    sinks = r.randint(0, min(2, top_k - 1))
    recent = r.randint(0, min(2, top_k - 1 - sinks))
    softcap = r.choice([None, None, 1.5])
    return AttentionSettings(block_size, top_k, sinks, recent, r.random() < 0.4, scale=width**-0.5, softcap=softcap, implementation="flex")


def draw(seed: int) -> PagedCase:
    r = random.Random(seed)
    page, block_size = r.choice([(16, 16), (32, 16), (16, 32), (64, 32), (48, 32), (256, 16), (256, 128), (20, 10), (64, 96), (256, 1)])
    width = r.choice([16, 16, 24, 40, 64])
    return PagedCase(
        seed,
        settings_of(r, block_size, width),
        lengths=tuple(r.choice([1, 2, block_size, block_size + 1, r.randint(1, 8 * block_size)]) for _ in range(r.randint(1, 3))),
        groups=r.randint(1, 2),
        repeats=r.choice([1, 2, 3]),
        width=width,
        value_width=r.choice([16, 20, 64]),
        dtype=r.choice([torch.float32, torch.float32, torch.float16]),
        page=page,
        stride=page + r.choice([0, 0, 16, 7]),
        interleaved=r.random() < 0.4,
        new=r.choice([1, 1, 3]),
    )


def check(case: PagedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    query, pages = case.operands()
    exact = case.operands(torch.float64)
    monkeypatch.setattr(launched, "_PROGRAMS", random.Random(case.seed).choice([1, 64, 1024]))
    found = kernels.decode_pages(query, pages, case.settings)
    same(found, decode_pages(*exact, case.settings), case.dtype, case)


@pytest.mark.parametrize("seed", range(30))
def test_keys_in_pages(seed: int, monkeypatch):
    check(draw(seed), monkeypatch)


def test_more_means_than_one_program_scores(monkeypatch):
    settings = AttentionSettings(4, 67, 1, 1, scale=0.25, implementation="flex")
    check(PagedCase(0, settings, (300,), 1, 1, 16, 16, torch.float32, page=16, stride=16), monkeypatch)


@pytest.mark.parametrize("width, value_width", [(256, 128), (128, 256), (576, 512)])
def test_wide_heads(width: int, value_width: int, monkeypatch):
    settings = AttentionSettings(16, 3, scale=width**-0.5, implementation="flex")
    check(PagedCase(0, settings, (100, 37), 1, 2, width, value_width, torch.float32, page=32, stride=32), monkeypatch)


def test_pages_of_another_dtype_than_the_query():
    """As under autocast."""
    case = draw(3)
    query, pages = case.operands(torch.float32)
    exact = case.operands(torch.float64)
    same(kernels.decode_pages(query.half(), pages, case.settings), decode_pages(*exact, case.settings), torch.float16, case)


def test_more_heads_than_one_launch_serves(monkeypatch):
    settings = AttentionSettings(16, 3, scale=0.25, implementation="flex")
    case = PagedCase(0, settings, (100, 37, 60), 2, 2, 16, 16, torch.float32, page=32, stride=32)
    query, pages = case.operands()
    whole, launches = decoding.decode_pages(query, pages, settings), []
    monkeypatch.setattr(chunking, "MAX_HEADS", 9)
    kernel = kernels.decode_pages
    monkeypatch.setattr(kernels, "decode_pages", lambda query, *args: launches.append(query.shape[0]) or kernel(query, *args))
    for x, y in zip(decoding.decode_pages(query, pages, settings), whole):
        assert torch.equal(x, y)
    assert launches == [2, 1]


@pytest.mark.parametrize("seed", range(15))
def test_keys_in_rows(seed: int):
    r = random.Random(seed)
    block_size, width, dtype = r.choice([1, 5, 16, 32]), r.choice([16, 24, 64]), r.choice([torch.float32, torch.float32, torch.float16])
    settings, groups, room = settings_of(r, block_size, width), r.randint(1, 2), r.choice([0, 9])
    length, rows = r.randint(1, 12 * block_size), r.randint(1, 3)
    new = r.randint(1, min(5, length))
    torch.manual_seed(seed)
    shapes = (groups * r.choice([1, 2, 3]), new, width), (groups, length + room, width), (groups, length + room, r.choice([16, 20]))
    query, key, value = (torch.randn(rows, *shape).to(dtype) for shape in shapes)
    key[:, :, length:] = value[:, :, length:] = torch.nan
    start = torch.tensor([r.randint(0, length - 1) for _ in range(rows)]) if r.random() < 0.5 else None
    places = torch.tensor(length) if room else None, start

    def means(key: Tensor) -> Tensor:
        return write_means(means_for(key, max(1, key.shape[2] // block_size)), key[:, :, : length - new], start, block_size)

    exact = [x.double() for x in (query, key, value)]
    found = kernels.decode(query, key, value, means(key), *places, settings)
    same(found, decode_plain(*exact, means(exact[1]), *places, settings), dtype, (seed, settings))
