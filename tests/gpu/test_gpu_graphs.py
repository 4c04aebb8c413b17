"""What only a GPU can show of CUDA graphs: replays give the bits of eager calls, wherever they are made, and captures leave nothing behind.

All calls share heads, widths and block size, so that few kernels are compiled.
"""

from __future__ import annotations

import gc
import threading
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from moba_flex import moba_attention, moba_attention_varlen, patch, set_cuda_graphs
from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS, GraphCache, Place
from moba_flex.cuda_graphs.capture import CudaGraph, CudaMarks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CUDA graphs are captured from its streams"),
]

HEADS, GROUPS, WIDTH, SETTINGS = 4, 2, 64, {"block_size": 64, "top_k": 3}


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The threads that replayed a graph, one entry for each time."""
    seen, real = [], CudaGraph.replay
    monkeypatch.setattr(CudaGraph, "replay", lambda graph: seen.append(threading.get_ident()) or real(graph))
    return seen


def leaves(seed: int, batch: int = 2, n_query: int = 700, n_key: int = 700, tokens_first: bool = False) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (HEADS, n_query), (GROUPS, n_key), (GROUPS, n_key)
    if tokens_first:
        drawn = [torch.randn(batch, n, heads, WIDTH, generator=generator, device="cuda").transpose(1, 2) for heads, n in shapes]
    else:
        drawn = [torch.randn(batch, heads, n, WIDTH, generator=generator, device="cuda") for heads, n in shapes]
    return [x.bfloat16().requires_grad_() for x in drawn]


def results(tensors: list[Tensor], with_lse: bool = True, **more) -> list[Tensor]:
    """Output, log-sum-exp and gradients of a loss."""
    out, lse = moba_attention(*tensors, return_lse=True, **SETTINGS, **more)
    loss = out.float().sin().sum() + (lse.cos().sum() if with_lse else 0)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def assert_same_bits(got: list[Tensor], wanted: list[Tensor], case: object = "") -> None:
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, wanted):
        assert a.stride() == b.stride(), (name, case)
        whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
        assert torch.equal(a.contiguous().view(whole), b.contiguous().view(whole)), (name, case)  # NaN has bits too


def without_graphs(run, *arguments, **more):
    before = set_cuda_graphs(False)
    try:
        return run(*arguments, **more)
    finally:
        set_cuda_graphs(before)


HERE = Place(0, 0)
CASES = {
    "contiguous": ({}, {}),
    "as a model projects": ({"batch": 1, "tokens_first": True}, {}),
    "two rows, tokens first": ({"tokens_first": True}, {}),
    "few queries": ({"n_query": 130}, {}),
    "shared selection": ({}, {"share_selection": True}),
    "without a gradient of the log-sum-exp": ({}, {"with_lse": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_replays_give_the_bits_of_eager_calls(name, replays):
    shape, more = CASES[name]
    wanted = without_graphs(lambda: [results(leaves(seed, **shape), **more) for seed in range(6)])
    for seed in range(6):
        assert_same_bits(results(leaves(seed, **shape), **more), wanted[seed], (name, seed))
    assert len(replays) == 2 * (6 - EAGER_CALLS - 1)
    assert len(set(replays)) == 2  # backward passes come from autograd's own thread


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("padded", "flex"), ("padded", "triton"), ("packed", "flex"), ("packed", "triton"), ("packed, more keys", "flex")],
)
def test_a_graph_serves_any_padding_and_any_sequences(kind, implementation, replays):
    """What follows from them is computed in the graph: each call has others."""

    def given(seed: int) -> dict[str, Tensor]:
        cuts = torch.randint(100, 600, (2,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
        if kind == "padded":
            real = torch.tensor(cuts, device="cuda")[:, None]
            return {"padding_mask": torch.arange(700, device="cuda") < real if seed % 2 else torch.arange(700, device="cuda") >= real}
        bounds = torch.tensor([0, *cuts, 700], device="cuda", dtype=torch.int32)
        if kind == "packed":
            return {"cu_seqlens": bounds}
        few = bounds.diff().clamp(max=100)
        few[bounds.diff().argmax()] += 300 - few.sum()
        return {"cu_seqlens": torch.nn.functional.pad(few.cumsum(0), (1, 0)).int(), "cu_seqlens_k": bounds}

    def results_of(seed: int) -> list[Tensor]:
        n_query = 300 if "more keys" in kind else 700
        tensors = leaves(seed, batch=2 if kind == "padded" else 1, n_query=n_query)
        if kind == "padded":
            return results(tensors, with_lse=False, implementation=implementation, **given(seed))
        flat = [x[0].transpose(0, 1) for x in tensors]
        out, lse = moba_attention_varlen(*flat, **given(seed), return_lse=True, implementation=implementation, **SETTINGS)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.float().sin().sum() + lse.cos().sum(), tensors)]

    wanted = without_graphs(lambda: [results_of(seed) for seed in range(7)])
    for seed in range(7):
        assert_same_bits(results_of(seed), wanted[seed], (kind, seed))
    assert len(replays) == 2 * (7 - EAGER_CALLS - 1)


def test_a_graph_takes_nan_and_equal_scores_as_they_come(replays):
    def spoilt(seed: int) -> list[Tensor]:
        query, key, value = leaves(seed)
        with torch.no_grad():
            if seed == 4:
                key[:, :, 100:400] = key[:, :, 100:101]
            if seed == 5:
                key[0, :, 300] = torch.nan
        return [query, key, value]

    wanted = without_graphs(lambda: [results(spoilt(seed)) for seed in range(7)])
    for seed in range(7):
        assert_same_bits(results(spoilt(seed)), wanted[seed], seed)
    assert replays


def test_shapes_may_alternate_and_graphs_come_and_go(replays, monkeypatch):
    """Four graphs have room, where six are wanted."""
    monkeypatch.setattr(cache, "MAX_GRAPHS", 4)
    lengths = [n for n in (700, 513, 300) for _ in range(4)] + [700, 513, 300] * 6
    wanted = without_graphs(lambda: [results(leaves(seed, n_query=n, n_key=n)) for seed, n in enumerate(lengths)])
    got = [results(leaves(seed, n_query=n, n_key=n)) for seed, n in enumerate(lengths)]
    for seed, n in enumerate(lengths):
        assert_same_bits(got[seed], wanted[seed], (seed, n))
    assert len(replays) >= 6
    assert len(cache._graphs) <= 4


def test_while_the_gpu_is_far_behind_a_large_call_is_launched_kernel_by_kernel(replays, monkeypatch):
    """Some hundred million cycles of nothing keep the GPU from where the calls before began."""
    monkeypatch.setattr(cache, "LARGE", 0)
    tensors = [leaves(seed) for seed in range(16)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got = [results(x) for x in tensors[:4]]
    captured = len(replays)
    torch.cuda.synchronize()
    got += [results(x) for x in tensors[4:6]]
    assert len(replays) == captured + 4
    torch.cuda._sleep(500_000_000)
    got += [results(x) for x in tensors[6:14]]
    far_ahead = len(replays)
    assert captured + 4 <= far_ahead <= captured + 4 + cache.CALLS_AHEAD  # the first ones do not know yet
    torch.cuda.synchronize()
    got += [results(x) for x in tensors[14:]]
    assert len(replays) == far_ahead + 4
    for seed, x in enumerate(got):
        assert_same_bits(x, wanted[seed], seed)


def test_marks_say_how_far_the_gpu_is_behind_its_host():
    marks = CudaMarks()
    for _ in range(90):  # numbers begin again in between
        torch.cuda._sleep(50_000_000)
        for n in range(3):
            assert marks.behind == n
            marks.mark()
        torch.cuda.synchronize()
        assert marks.behind == 0


def test_a_capture_in_another_thread_is_not_disturbed(replays, monkeypatch):
    """In PyTorch's default mode it ends where any thread asks for an event."""
    monkeypatch.setattr(cache, "LARGE", 0)
    tensors = [leaves(seed) for seed in range(EAGER_CALLS + 6)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got = [results(x) for x in tensors[: EAGER_CALLS + 2]]
    more = [results(x) for x in tensors[EAGER_CALLS + 2 :]]
    del more  # their memory stays with PyTorch: in that mode no thread may ask CUDA for any
    x, captured, open_, over = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph(), threading.Event(), threading.Event()

    def capture() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            captured.capture_begin()  # torch.cuda.graph would empty PyTorch's cache first
            x.mul_(2)
            open_.set()
            over.wait(60)
            captured.capture_end()

    thread = threading.Thread(target=capture)
    thread.start()
    assert open_.wait(60)
    try:
        got += [results(x) for x in tensors[EAGER_CALLS + 2 :]]
    finally:
        over.set()
        thread.join()
    captured.replay()
    assert (x == 2).all()
    assert replays
    for seed, each in enumerate(got):
        assert_same_bits(each, wanted[seed], seed)


def test_another_stream_has_its_own_graphs(replays):
    tensors = [leaves(seed) for seed in range(12)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    side, got = torch.cuda.Stream(), {}
    for seed, x in enumerate(tensors):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if seed % 2 else torch.cuda.current_stream()):
            got[seed] = results(x)
    torch.cuda.synchronize()
    for seed in got:
        assert_same_bits(got[seed], wanted[seed], seed)
    assert len(cache._graphs) == 4
    assert len(replays) == 4 * (6 - EAGER_CALLS - 1)


def test_two_threads_may_call_at_once(replays):
    tensors = [leaves(seed) for seed in range(24)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got, failed = {}, []

    def work(mine: range) -> None:
        try:
            for seed in mine:
                got[seed] = results(tensors[seed])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(range(first, 24, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for seed, x in got.items():
        assert_same_bits(x, wanted[seed], seed)
    assert len(got) == 24
    assert len(replays) == 2 * (24 - EAGER_CALLS - 1)


def test_a_capture_of_ones_own_takes_the_call_itself(replays):
    query, key, value = (x.detach() for x in leaves(0))
    for _ in range(EAGER_CALLS + 2):
        wanted = moba_attention(query, key, value, **SETTINGS)
    replayed = len(replays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moba_attention(query, key, value, **SETTINGS)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert len(replays) == replayed == 1
    assert torch.equal(captured, moba_attention(query, key, value, **SETTINGS))


def test_nothing_is_read_back_to_the_host(replays):
    tensors, wanted = leaves(7), without_graphs(results, leaves(7))
    for seed in range(EAGER_CALLS + 1):
        results(leaves(seed))
    replays.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 2
    assert_same_bits(got, wanted)


def test_in_inference_mode_and_out_of_it(replays):
    tensors = [[x.detach() for x in leaves(seed)] for seed in range(10)]
    wanted = without_graphs(lambda: [moba_attention(*x, **SETTINGS) for x in tensors])
    for seed, x in enumerate(tensors):
        with torch.inference_mode(seed % 2 == 0):
            got = moba_attention(*x, **SETTINGS)
        assert got.is_inference() == (seed % 2 == 0)
        assert torch.equal(got, wanted[seed]), seed
    assert len(replays) == 2 * (5 - EAGER_CALLS - 1)


def test_torch_compile_calls_graphs_too(replays):
    compiled = torch.compile(lambda query, key, value: moba_attention(query * 2, key, value, **SETTINGS) + 1, fullgraph=True)

    def run(seed: int) -> list[Tensor]:
        tensors = leaves(seed)
        out = compiled(*tensors)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]

    wanted = without_graphs(lambda: [run(seed) for seed in range(6)])
    for seed in range(6):
        for a, b in zip(run(seed), wanted[seed], strict=True):
            assert torch.equal(a, b), seed
    assert len(replays) == 2 * (6 - EAGER_CALLS - 1)


def test_a_model_trains_with_the_same_losses(replays):
    sizes = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "intermediate_size": 256}
    ids = torch.randint(64, (5, 1, 700), generator=torch.Generator().manual_seed(0)).cuda()

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)).to("cuda", torch.bfloat16)
        patch(model, **SETTINGS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        each = []
        for batch in ids:
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.append(loss.item())
        return each

    wanted = without_graphs(losses)
    assert losses() == wanted
    assert len(set(wanted)) == len(wanted)
    assert len(replays) == 2 * (3 * 5 - EAGER_CALLS - 1)


def test_memory_is_bounded_and_comes_back():
    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def work() -> None:
        for n in (700, 900, 1100):
            for seed in range(EAGER_CALLS + 2):
                results(leaves(seed, n_query=n, n_key=n))

    without_graphs(work)
    before = reserved()
    work()
    assert len(cache._graphs) == 6
    inputs_of_a_graph = sum(x.nbytes for x in leaves(0))
    assert cache._graphs.n_bytes > 6 * inputs_of_a_graph
    held = reserved() - before
    assert held > 0
    set_cuda_graphs(False)
    assert cache._graphs.n_bytes == 0
    assert reserved() <= before


def test_calls_within_another_memory_pool_are_replayed_or_a_warning_says_why_not(replays, monkeypatch):
    """Which of two pools gets the memory of a capture is PyTorch's to say, and differs between its versions."""
    monkeypatch.setattr(cache._graphs, "_warned", False)  # a process is warned once
    tensors = [[x.detach() for x in leaves(seed)] for seed in range(6)]
    wanted = without_graphs(lambda: [moba_attention(*x, **SETTINGS) for x in tensors])
    pool = torch.cuda.MemPool()
    with warnings.catch_warnings(record=True) as caught, torch.cuda.use_mem_pool(pool):
        warnings.simplefilter("always")
        got = [moba_attention(*x, **SETTINGS) for x in tensors[:5]]
    got.append(moba_attention(*tensors[5], **SETTINGS))  # by the same graph, if there is one
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert bool(replays) != any("memory is not the graph's own" in str(warning.message) for warning in caught)


def test_pytorchs_own_cuda_graphs_take_a_shape_that_nobody_saw_before():
    """They warm up in a memory pool of theirs, and raise if anything that they do not know of is left in it."""
    torch.compiler.reset()

    def three_layers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(EAGER_CALLS + 1):
            query = moba_attention(query, key, value, **SETTINGS) + query
        return query

    def run(function, seed: int) -> list[Tensor]:
        tensors = leaves(seed, n_query=620, n_key=620)
        out = function(*tensors)
        return [out.detach().clone(), *(x.clone() for x in torch.autograd.grad(out.float().square().mean(), tensors))]

    compiled = torch.compile(three_layers, mode="reduce-overhead", fullgraph=True)
    skipped, got = counters["inductor"]["cudagraph_skips"], []
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got.append(run(compiled, seed))
    assert counters["inductor"]["cudagraph_skips"] == skipped, "PyTorch made graphs of its own"
    for seed, tensors in enumerate(got):
        for a, b in zip(tensors, run(three_layers, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def square(x: Tensor) -> tuple[Tensor, ...]:
    return (x * x,)


def in_order() -> None:
    """Captures, random numbers and the allocator work as if nothing had happened."""
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.randn(8, device="cuda").isfinite().all()
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))
    big = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    with_big = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= with_big - (1 << 28)
    store, x = GraphCache(CudaGraph), torch.randn(8, device="cuda")
    for _ in range(EAGER_CALLS + 3):
        assert torch.equal(store(HERE, "square", square, (x,), 1 << 30)[0], x * x)
        x = x + 1
    assert len(store) == 1
    store.enable(False)


def test_a_capture_that_cuda_forbids_costs_a_warning_and_nothing_else():
    def reads_back(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x.sum().item(),)

    store = GraphCache(CudaGraph)
    x = torch.arange(8.0, device="cuda")
    for _ in range(EAGER_CALLS + 3):  # a graph that shares its pool with the failure
        store(HERE, "square", square, (x,), 1 << 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(EAGER_CALLS + 3):
            assert torch.equal(store(HERE, "reads back", reads_back, (x,), 1 << 30)[0], x * 28)
    assert sum("set_cuda_graphs" in str(warning.message) for warning in caught) == 1
    assert torch.equal(store(HERE, "square", square, (x,), 1 << 30)[0], x * x)
    in_order()
    for _ in range(EAGER_CALLS + 3):
        y = torch.randn(9, device="cuda")
        assert torch.equal(store(HERE, "square of nine", square, (y,), 1 << 30)[0], y * y)
    assert len(store) == 2
    store.enable(False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_an_exception_within_a_capture_leaves_none_open(error):
    def fails(x: Tensor) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            raise error
        return (x * x,)

    x = torch.randn(8, device="cuda")
    with pytest.raises(error):
        CudaGraph(fails, (x,), None)
    in_order()


def test_a_graph_may_be_dropped_while_the_gpu_is_at_it():
    x = torch.randn(1 << 24, device="cuda")

    def slow(x: Tensor) -> tuple[Tensor, ...]:
        y = x
        for _ in range(50):
            y = (y * x).tanh()
        return (y,)

    wanted = slow(x)[0]
    store = GraphCache(CudaGraph)
    for _ in range(EAGER_CALLS + 1):
        store(HERE, "slow", slow, (x,), 1 << 30)
    torch.cuda.synchronize()
    got = [store(HERE, "slow", slow, (x,), 1 << 30)[0] for _ in range(5)]
    store.enable(False)
    torch.cuda.empty_cache()
    others = [torch.full_like(x, torch.nan) for _ in range(20)]
    for y in got:
        assert torch.equal(y, wanted)
    assert len(others) == 20
