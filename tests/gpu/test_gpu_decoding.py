"""Decoding on a GPU: the Triton kernels against the specification, and what they promise there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from support.pages import PagedCase

from moba_flex import moba_attention
from moba_flex.core.settings import AttentionSettings
from moba_flex.decoding import decode, decode_pages
from moba_flex.ops import pages as plain
from moba_flex.ops.decoding import decode_plain, means_for, write_means

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: Triton kernels")]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    heads: int = 8
    groups: int = 2
    new: int = 1
    length: int = 3000
    room: int = 0
    width: int = 128
    value_width: int = 128
    dtype: torch.dtype = torch.bfloat16
    starts: tuple[int, ...] = ()
    softcap: float | None = None
    blocks: dict = field(default_factory=lambda: {"block_size": 128, "top_k": 8})

    def tensors(self, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        shapes = ((self.heads, self.new, self.width), (self.groups, self.length, self.width), (self.groups, self.length, self.value_width))
        drawn = [torch.randn(self.batch, *shape, generator=generator, device="cuda").to(self.dtype) for shape in shapes]
        rubbish = torch.full((), torch.nan, device="cuda", dtype=self.dtype)
        room = [rubbish.expand(self.batch, self.groups, self.room, x.shape[3]) for x in drawn[1:]]
        return [drawn[0], *(torch.cat(pair, 2) for pair in zip(drawn[1:], room))]

    @property
    def start(self) -> torch.Tensor | None:
        return torch.tensor(self.starts, device="cuda") if self.starts else None

    @property
    def tokens(self) -> torch.Tensor | None:
        return torch.tensor(self.length, device="cuda") if self.room else None

    @property
    def settings(self) -> AttentionSettings:
        return AttentionSettings(**self.blocks, scale=self.width**-0.5, softcap=self.softcap, implementation="flex")

    def means(self, key: torch.Tensor) -> torch.Tensor:
        size = self.settings.block_size
        return write_means(means_for(key, max(1, key.shape[2] // size)), key[:, :, : self.length - self.new], self.start, size)

    def decoded(self, tensors: list[torch.Tensor], means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(*tensors, means, self.tokens, self.start, self.settings)

    def wanted(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (x[:, :, : self.length].float() for x in tensors)
        mask = None if self.start is None else torch.arange(self.length, device="cuda") >= self.start[:, None]
        settings = {**self.blocks, "padding_mask": mask, "softcap": self.softcap, "return_lse": True, "implementation": "naive"}
        return moba_attention(query, key, value, **settings)


def blocks(block_size: int, top_k: int, **more) -> dict:
    return {"block_size": block_size, "top_k": top_k, **more}


SHARED = {"share_selection": True}
CASES = [
    Case("plain"),
    Case("shared", blocks=blocks(128, 8, **SHARED)),
    Case("static cache", room=1000),
    Case("static cache, shared, batch 1", batch=1, heads=32, groups=8, room=500, blocks=blocks(128, 8, **SHARED)),
    Case("end of a block", length=2944),
    Case("first of a block", length=2945),
    Case("several tokens", new=5, length=2946),
    Case("many tokens", new=32, length=2950, blocks=blocks(16, 6, **SHARED)),
    Case("many tokens of many heads", new=32, heads=32, groups=2, length=2950),
    Case("padding", starts=(0, 777), room=100),
    Case("padding, a row of nothing else", starts=(2999, 3000), new=2),
    Case("sink and recent blocks", blocks=blocks(64, 6, sink_blocks=1, recent_blocks=2)),
    Case("only forced blocks", blocks=blocks(64, 3, sink_blocks=1, recent_blocks=1)),
    Case("top-k 1", blocks=blocks(64, 1)),
    Case("many blocks", blocks=blocks(16, 70), dtype=torch.float16),
    Case("odd blocks", blocks=blocks(100, 5, **SHARED)),
    Case("blocks of one", length=300, blocks=blocks(1, 5)),
    Case("large blocks", blocks=blocks(1000, 3)),
    Case("one block", length=50),
    Case("one token", length=1),
    Case("soft-capped", softcap=2.0),
    Case("width 64", width=64, value_width=64),
    Case("width 24, values 40", width=24, value_width=40),
    Case("width 256", width=256, value_width=256),
    Case("latent attention", heads=4, groups=1, width=192, value_width=128),
    Case("very wide", heads=4, groups=1, width=576, value_width=512),
    Case("float32", dtype=torch.float32),
    Case("float32, width 256, shared", dtype=torch.float32, width=256, value_width=256, blocks=blocks(128, 4, **SHARED)),
    Case("float16", dtype=torch.float16),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@each_case
def test_decoding_equals_the_specification(case):
    tensors = case.tensors()
    out, lse = case.decoded(tensors, case.means(tensors[1]))
    wanted, wanted_lse = case.wanted(tensors)
    empty = wanted_lse == -torch.inf
    assert out.dtype == case.dtype and torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    assert distance(out, wanted) < TOLERANCE[case.dtype], case
    assert distance(lse.masked_fill(empty, 0), wanted_lse.masked_fill(empty, 0)) < 1e-3, case


@each_case
def test_the_means_that_new_tokens_complete_are_those_of_plain_pytorch(case):
    query, key, value = case.tensors()
    got, wanted = case.means(key), case.means(key)
    case.decoded([query, key, value], got)
    decode_plain(query, key, value, wanted, case.tokens, case.start, case.settings)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_equal_scores_go_to_the_earlier_block_and_nan_is_infinity():
    case = Case("ties", batch=1, length=3000, dtype=torch.float32, blocks=blocks(8, 3))
    query, key, value = case.tensors()
    key[:] = 1
    out, _ = case.decoded([query, key, value], case.means(key))
    own = slice(2992, 3000)
    wanted = torch.cat([value[:, :, :16], value[:, :, own]], 2).mean(2, keepdim=True)
    torch.testing.assert_close(out, wanted.repeat_interleave(4, 1), rtol=1e-4, atol=1e-5)
    means = case.means(key)
    means[:, :, 200] = torch.nan
    out, _ = case.decoded([query, key, value], means)
    wanted = torch.cat([value[:, :, :8], value[:, :, 1600:1608], value[:, :, own]], 2).mean(2, keepdim=True)
    torch.testing.assert_close(out, wanted.repeat_interleave(4, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["static cache, shared, batch 1", "several tokens", "padding"])
def test_decoding_reads_nothing_back_and_can_be_captured(name):
    case = next(case for case in CASES if case.name == name)
    tensors, tokens = case.tensors(), torch.tensor(case.length, device="cuda")
    means, start, settings = case.means(tensors[1]), case.start, case.settings
    expected, _ = decode(*tensors, means.clone(), tokens, start, settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = decode(*tensors, means.clone(), tokens, start, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = decode(*tensors, means, tokens, start, settings)
    for length in (case.length - 200, case.length - 1, case.length):  # one graph for all lengths
        tokens.fill_(length)
        graph.replay()
        torch.testing.assert_close(captured, decode(*tensors, means.clone(), tokens, start, settings)[0], rtol=0, atol=0)


def test_token_by_token_over_a_static_cache():
    case = Case("walk", batch=2, length=700, width=64, value_width=64, dtype=torch.float32, starts=(0, 130), blocks=blocks(32, 4))
    query, key, value = replace(case, name="all", new=700).tensors()
    means = means_for(key, 700 // 32)
    mask = torch.arange(700, device="cuda") >= case.start[:, None]
    wanted = moba_attention(query, key, value, padding_mask=mask, implementation="naive", **case.blocks)
    for i in range(700):
        tokens = torch.tensor(i + 1, device="cuda")
        out, _ = decode(query[:, :, i : i + 1], key, value, means, tokens, case.start, case.settings)
        torch.testing.assert_close(out, wanted[:, :, i : i + 1], rtol=1e-4, atol=1e-4, msg=lambda m, i=i: f"token {i}: {m}")


def paged(block_size: int = 128, top_k: int = 8, dtype: torch.dtype = torch.bfloat16, width: int = 128, **more) -> PagedCase:
    """Four rows of up to 3,000 tokens, in pages of 256."""
    more = {"lengths": (3000, 1, 700, 2048), "groups": 2, "repeats": 4, "value_width": width, "page": 256, "stride": 256, **more}
    chosen = {name: more.pop(name) for name in ("sink_blocks", "recent_blocks", "share_selection", "softcap") if name in more}
    settings = AttentionSettings(block_size, top_k, scale=width**-0.5, implementation="flex", **chosen)
    return PagedCase(0, settings, width=width, dtype=dtype, device="cuda", **more)


PAGED = {
    "plain": paged(),
    "shared, several tokens": paged(new=5, share_selection=True),
    "sink and recent blocks, soft-capped, width 64": paged(64, 6, width=64, sink_blocks=1, recent_blocks=2, softcap=2.0),
    "a block of many pages, float32": paged(512, 3, torch.float32, page=64, stride=64),
    "blocks across pages, which lie among those of other layers": paged(96, 4, page=64, stride=100, interleaved=True),
    "many blocks": paged(16, 70, torch.float16),
    "many rows": paged(lengths=tuple(range(100, 3000, 40))),
    "width 24, values 40": paged(width=24, value_width=40),
    "width 256": paged(width=256),
}


@pytest.mark.parametrize("name", PAGED)
def test_decoding_from_pages_equals_plain_pytorch(name):
    case = PAGED[name]
    exact = plain.decode_pages(*case.operands(torch.float64), case.settings)
    query, pages = case.operands()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = decode_pages(query, pages, case.settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    empty = exact[1] == -torch.inf
    assert out.dtype == case.dtype and torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    assert distance(out, exact[0]) < TOLERANCE[case.dtype], case
    assert distance(lse.masked_fill(empty, 0), exact[1].masked_fill(empty, 0)) < 1e-3, case
    assert torch.equal(decode_pages(query, pages, case.settings)[0], out), "two runs differ"


def test_pages_beyond_32_bits():
    """Behind 2**24 slots of 128 numbers each."""
    case = paged(lengths=(2000,), groups=1)
    query, pages = case.operands()
    means, before = pages.means, (1 << 24) // case.page
    runs = before * case.page // pages.run

    def behind(x: torch.Tensor, n: int) -> torch.Tensor:
        return torch.cat([x.new_full((1, 1, 1), torch.nan).expand(n, 1, 128), x])

    key, value = (behind(x, before * case.page) for x in (pages.key, pages.value))
    far = replace(pages, key=key, value=value, means=behind(means, runs), table=pages.table + before)
    for x, y in zip(decode_pages(query, far, case.settings), decode_pages(query, pages, case.settings)):
        assert torch.equal(x, y) and not x.isnan().any()


@pytest.mark.parametrize("decode_by", ["sparse", "full"])
def test_continuous_batching_gives_the_tokens_of_generate(decode_by):
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

    from moba_flex import patch
    from moba_flex.models import upstream

    if not upstream.BATCHES_CONTINUOUSLY:
        pytest.skip("continuous batching with MoBA needs transformers 5.24 or newer")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, initializer_range=0.3, pad_token_id=0, eos_token_id=None)).eval().cuda()
    patch(model, block_size=16, top_k=3, decode=decode_by)
    prompts = [torch.randint(2, 64, (length,)).tolist() for length in (150, 7, 90)]
    greedy = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=64)
    out = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=batching)
    call = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for request, prompt in zip(out.values(), prompts):
        assert request.error is None, request.error
        assert request.generated_tokens == model.generate(torch.tensor([prompt]).cuda(), **call)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "offloaded_static"])
def test_a_model_generates_on_a_gpu_as_without_a_cache(cache):
    from transformers import LlamaConfig, LlamaForCausalLM

    from moba_flex import patch

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, initializer_range=0.3, pad_token_id=0, eos_token_id=None)).eval().cuda()
    patch(model, block_size=16, top_k=3, decode="sparse")
    ids = torch.randint(2, 64, (2, 150), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :61] = 0
    call = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **call)
    # transformers compiles decoding with a static cache by itself here, with CUDA graphs. Compiled with an offloaded one, PyTorch 2.11
    # crashes, patched or not.
    call["disable_compile"] = cache == "offloaded_static"
    assert torch.equal(model.generate(ids, cache_implementation=cache, **call), expected)
