"""Continuous batching gives each request the tokens that `generate` gives it alone, whatever becomes of the others."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
import transformers
from support.families import FAMILIES, build, each_decode, tokens
from support.serving import Serving, alone, generation
from transformers import AttentionInterface, ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_flex import full_attention, patch, set_attention, unpatch
from moba_flex.models import paged_attention, paged_cache, upstream
from moba_flex.ops.pages import Pages

pytestmark = pytest.mark.skipif(not upstream.BATCHES_CONTINUOUSLY, reason="this version of transformers hands MoBA too little")
SETTINGS = {"block_size": 16, "top_k": 2}


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def small(decode: str, family: str = "llama", **settings):
    model = build(family, initializer_range=0.3, num_hidden_layers=settings.pop("layers", 2))
    return patch(model, **{**SETTINGS, "decode": decode, **settings})


def check(model, serving: Serving, wanted: dict[str, list[int]], new: int = 8) -> None:
    got = serving.finish()
    expected = {prompt: alone(model, list(prompt), new) for prompt in {tuple(prompt) for prompt in wanted.values()}}
    for name, prompt in wanted.items():
        assert got[name] == expected[tuple(prompt)], f"{name}, a prompt of {len(prompt)} tokens"


@each_decode
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])  # grouped heads; norms of keys; windows; windows and sinks
def test_generate_batch_gives_the_tokens_of_generate(family, decode):
    windows = family in ("gemma3", "gpt_oss")  # two layers with windows share pages, and two without
    model = small(decode, family, layers=4 if windows else 2, sink_blocks=1)
    given = prompts(100, 7, 61, 33, 1, 130)
    config = ContinuousBatchingConfig(page_size=32, num_blocks=48, max_batch_tokens=96)
    out = model.generate_batch(given, generation_config=generation(8), continuous_batching_config=config)
    assert [o.error for o in out.values()] == [None] * len(given)
    assert [o.generated_tokens for o in out.values()] == [alone(model, prompt) for prompt in given]
    assert model.config._attn_implementation == "moba"


@each_decode
def test_tokens_are_streamed_and_requests_may_come_and_go(decode):
    model, seen = small(decode), []
    first, second, third = prompts(90, 40, 20)
    config = ContinuousBatchingConfig(page_size=16, num_blocks=48, max_batch_tokens=40)
    with model.continuous_batching_context_manager(generation(8), continuous_batching_config=config) as manager:
        manager.add_request(first, request_id="first", streaming=True)
        manager.add_request(third, request_id="third", max_new_tokens=200, streaming=True)
        while sum(output.is_finished() for output in seen) < 2:
            output = manager.get_result(timeout=60)
            assert output is not None, "nothing comes"
            if not any(one.request_id == "first" for one in seen) and output.request_id == "first":
                manager.cancel_request("third")
                manager.add_request(second, request_id="second", streaming=True)
            seen.append(output)
    of = {name: [o.generated_tokens for o in seen if o.request_id == name] for name in ("first", "second", "third")}
    assert [len(tokens) for tokens in of["first"]] == list(range(1, 9))
    assert of["first"][-1] == alone(model, first) and of["second"][-1] == alone(model, second)
    last = of["third"][-1] if of["third"] else []
    assert last == alone(model, third, 200)[: len(last)] and len(last) < 200


@each_decode
@pytest.mark.parametrize("most", [40, 33, 17, 5])  # the last chunk of a prompt of 34 has 34, 1, 17 and 4 tokens
def test_it_does_not_matter_how_prompts_are_cut_into_chunks(decode, most):
    model = small(decode)
    serving = Serving(model, max_batch_tokens=most)
    wanted = {serving.add(prompt): prompt for prompt in prompts(34, 70)}
    check(model, serving, wanted)


@pytest.mark.parametrize("inference", [False, True])
def test_all_layers_of_a_pass_share_the_tensor_whose_layout_is_kept(inference, monkeypatch):
    given, real = [], paged_attention.attend

    def noted(*args, cu_seqlens, **kwargs):
        given.append(cu_seqlens)  # which lives on, so that no other one has its id
        return real(*args, cu_seqlens=cu_seqlens, **kwargs)

    monkeypatch.setattr(paged_attention, "attend", noted)
    with torch.inference_mode(inference):
        model = small("full", layers=3)
        serving = Serving(model, max_batch_tokens=40)
        serving.add(prompts(100)[0])
        serving.finish()
    assert [x.dim() for x in given[:6]] == [1] * 3 + [2] * 3  # first no keys but those of the queries, then more
    assert len({id(x) for x in given[:3]}) == len({id(x) for x in given[3:6]}) == 1
    assert not any(x.is_inference() for x in given)  # they have no version to be remembered by


@each_decode
@pytest.mark.parametrize("page_size, block_size", [(16, 16), (32, 16), (16, 32), (64, 96), (16, 10)])
def test_blocks_need_not_be_pages(page_size, block_size, decode):
    model = small(decode, block_size=block_size)
    serving = Serving(model, page_size=page_size, num_blocks=24)
    assert (serving.cache._means is not None) == (decode == "sparse" and block_size != 10)
    wanted = {serving.add(prompt): prompt for prompt in prompts(150, 97, 5)}
    check(model, serving, wanted)


@each_decode
def test_requests_share_the_pages_of_a_common_beginning(decode):
    model = small(decode)
    serving, found = Serving(model, new=24), []
    match = serving.cache.search_prefix_match
    serving.cache.search_prefix_match = lambda *args: found.append(match(*args)) or found[-1]
    common, end, other = prompts(70, 9, 30)
    wanted = {serving.add(common + end): common + end}
    serving.finish()
    wanted.update({serving.add(prompt): prompt for prompt in (common + other, common + end + other)})
    check(model, serving, wanted, 24)
    assert found[1:] == [64, 64], "none was shared"


@each_decode
def test_an_answer_in_a_later_prompt_is_read_as_a_prompt(decode):
    """With decode="full" generated tokens read all keys, so that their keys are not those of the same tokens in a prompt."""
    model = small(decode)
    serving, found = Serving(model, new=40), []
    match = serving.cache.search_prefix_match
    serving.cache.search_prefix_match = lambda *args: found.append(match(*args)) or found[-1]
    (prompt, more) = prompts(70, 9)
    name = serving.add(prompt)
    answer = serving.finish()[name]
    later = prompt + answer + more
    check(model, serving, {name: prompt, serving.add(later): later}, 40)
    assert found[-1] == (64 if decode == "full" else 96)


@each_decode
@pytest.mark.parametrize("offload", [0.0, 0.01])
def test_requests_that_lose_their_pages_go_on_as_if_nothing_had_happened(decode, offload, monkeypatch):
    model, lost = small(decode), []
    again = upstream.RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        upstream.RequestState, "create_equivalent_initial_request", lambda self: lost.append(self.generated_len()) or again(self)
    )
    serving = Serving(model, new=40, num_blocks=12, cpu_offload_space=offload, allow_block_sharing=False)
    moved = []
    manager = serving.processor.offloading_manager
    restore = manager.restore_scheduled_requests
    monkeypatch.setattr(
        manager,
        "restore_scheduled_requests",
        lambda requests: moved.extend(r.state.request_id for r in requests if r.state.is_cpu_offloaded) or restore(requests),
    )
    wanted = {serving.add(prompt): prompt for prompt in prompts(60, 50, 45)}
    check(model, serving, wanted, 40)
    assert (moved and not lost) if offload else (lost and max(lost) > 0), "memory was never short"


@each_decode
@pytest.mark.parametrize("sharing", [True, False])
def test_several_answers_to_a_prompt_are_those_of_the_prompt_alone(decode, sharing):
    """They share its full pages, and get copies of the last one, in pages that others had before."""
    model = small(decode)
    serving = Serving(model, new=20, answers=3, page_size=64, num_blocks=12, allow_block_sharing=sharing)
    wanted = {}
    for length in (70, 100, 50, 110, 47):
        (prompt,) = prompts(length)
        name = serving.add(prompt)
        wanted.update({name: prompt, f"{name}__child#0": prompt, f"{name}__child#1": prompt})
        serving.finish()
    check(model, serving, wanted, 20)


@each_decode
@pytest.mark.parametrize("seed", range(3))
def test_no_mean_is_ever_out_of_date(seed, decode, monkeypatch):
    """Requests come and go in any order, with common beginnings, and memory is short: their tokens, and all means that are read."""
    block_means, n_read = Pages.block_means, 0

    def checked(self, block_size):
        nonlocal n_read
        means = block_means(self, block_size)
        for row, (mean, length) in enumerate(zip(means, self.length.tolist())):
            n = length // block_size
            keys = self.key[self.slots(torch.tensor(row), torch.arange(n * block_size))]
            true = keys.unflatten(0, (n, block_size)).mean(1).transpose(0, 1)
            torch.testing.assert_close(mean[:, :n], true, rtol=1e-5, atol=1e-5)
            n_read += n
        return means

    monkeypatch.setattr(Pages, "block_means", checked)
    draw, model = random.Random(seed), small(decode, block_size=32, top_k=2)
    serving = Serving(model, new=24, num_blocks=20, cpu_offload_space=draw.choice([0.0, 0.01]), allow_block_sharing=seed != 2)
    beginnings, wanted, open_ = prompts(40, 96), {}, []
    for _ in range(12):
        what = draw.random()
        if what < 0.75:
            prompt = draw.choice([[], *beginnings]) + draw.choices(range(2, 64), k=draw.randint(1, 60))
            open_.append(serving.add(prompt))
            wanted[open_[-1]] = prompt
            beginnings.append(prompt[: draw.randint(1, len(prompt))])
        elif open_:
            name = open_.pop(draw.randrange(len(open_)))
            serving.cancel(name)
            wanted.pop(name)
        serving.step(draw.randint(0, 8))
    check(model, serving, wanted, 24)
    assert (n_read > 20) == (decode == "sparse")


@each_decode
def test_full_layers_have_the_attention_of_the_unpatched_model(decode, monkeypatch):
    """The same function with the same mask, keys and values, bit for bit."""
    calls = {}

    def recorded(module, query, key, value, attention_mask, **kwargs):
        out = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        calls.setdefault(module.layer_idx, []).append((query, key, value, attention_mask.clone(), kwargs["is_causal"], out[0]))
        return out

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa", recorded)
    model, seen = build("gemma3", initializer_range=0.3), []
    for patched in (False, True):
        if patched:
            patch(model, block_size=16, top_k=2, decode=decode, full_attention_layers=[1])
        serving = Serving(model, new=2)
        for prompt in prompts(30, 50):
            serving.add(prompt)
        serving.finish()
        seen.append({layer: calls[layer] for layer in (0, 1, 2)})  # a window, full, a window
        calls.clear()
    before, after = seen
    for layer, first in before.items():
        for old, new in zip(first, after[layer], strict=True):
            assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(old, new)), f"layer {layer}"
        if layer == 2:  # behind a layer of MoBA
            break


@each_decode
def test_a_function_that_says_flash_is_told_lengths_in_place_of_a_mask(decode):
    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None and kwargs["is_causal"]
        q, k = (kwargs[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
        longest = [max(b - a for a, b in pairwise(bounds)) for bounds in (q, k)]
        assert longest == [kwargs["max_length_q"], kwargs["max_length_k"]]
        assert module.config._attn_implementation == "my_flash" and (q[-1], k[-1]) == (query.shape[2], key.shape[2])
        out = []
        for i in range(len(q) - 1):
            one, keys, values = query[:, :, q[i] : q[i + 1]], key[:, :, k[i] : k[i + 1]], value[:, :, k[i] : k[i + 1]]
            seen = torch.ones(one.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - one.shape[2])
            out.append(torch.nn.functional.scaled_dot_product_attention(one, keys, values, seen, enable_gqa=True))
        return torch.cat(out, 2).transpose(1, 2), None

    model = unpatch(small(decode))
    AttentionInterface.register("my_flash", flash)
    try:
        model.config._attn_implementation = "my_flash"
        patch(model, **SETTINGS, decode=decode, full_attention_layers=[0])
        reference = patch(build(initializer_range=0.3, num_hidden_layers=2), **SETTINGS, decode=decode, full_attention_layers=[0])
        serving = Serving(model)
        wanted = {serving.add(prompt): prompt for prompt in prompts(100, 20, 45)}
        check(reference, serving, wanted)
    finally:
        AttentionInterface._global_mapping.pop("my_flash")


def test_a_model_loaded_by_name_is_served_too(tmp_path):
    model = small("sparse")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    (prompt,) = prompts(100)
    serving = Serving(loaded)
    check(model, serving, {serving.add(prompt): prompt})


def test_settings_of_every_kind_give_the_tokens_of_generate():
    for settings in ({"recent_blocks": 1}, {"share_selection": True}, {"implementation": "naive"}, {"implementation": "eager"}):
        model = small("sparse", **settings)
        serving = Serving(model)
        check(model, serving, {serving.add(prompt): prompt for prompt in prompts(100, 20)})


def test_a_model_all_of_whose_layers_are_full_is_served_as_if_it_were_not_patched():
    model = small("sparse")
    with full_attention(model):
        assert type(Serving(model).cache) is upstream.PagedAttentionCache
    assert type(Serving(unpatch(model)).cache) is upstream.PagedAttentionCache


def test_memory_does_not_grow_with_the_requests_that_were_served():
    model = small("sparse")
    serving = Serving(model, new=2, num_blocks=12)
    for i in range(30):
        serving.add(tokens(1, 40, seed=i)[0].tolist())
    serving.finish()
    assert len(serving.cache._means._known) <= 12 and len(serving.cache._requests) <= 12
    assert not upstream.pages_of_full_attention(serving.cache).block_table


def test_a_model_that_is_switched_meanwhile_is_an_error():
    (prompt,) = prompts(60)
    for switch in (unpatch, lambda m: set_attention(m, "full"), lambda m: set_attention(m, "full", [0]), lambda m: patch(m, block_size=8)):
        model = small("sparse")
        serving = Serving(model)
        serving.add(prompt)
        serving.step(1)
        switch(model)
        with pytest.raises(ValueError, match=r"switched while continuous batching runs.*stop it, switch, and start again"):
            serving.step()
    model = build(initializer_range=0.3)
    serving = Serving(model)
    serving.add(prompt)
    serving.step(1)
    patch(model, **SETTINGS)
    with pytest.raises(ValueError, match="switched to MoBA after continuous batching had started: stop it, switch, and start again"):
        serving.step()


def test_a_manager_that_is_kept_serves_the_model_as_it_was():
    model, given = small("sparse"), prompts(60)
    config = ContinuousBatchingConfig(page_size=16, num_blocks=48, max_batch_tokens=40)
    kept = {"generation_config": generation(4), "continuous_batching_config": config, "persistent_manager": True}
    first, again = (next(iter(model.generate_batch(given, **kept).values())).generated_tokens for _ in range(2))
    assert first == again == alone(model, given[0], 4)
    set_attention(model, "full")
    with pytest.raises(ValueError, match=r"switched since its continuous batching began: call model.destroy_cached"):
        model.generate_batch(given, **kept)
    model.destroy_cached_continuous_batching_manager()
    assert next(iter(model.generate_batch(given, **kept).values())).generated_tokens == alone(model, given[0], 4)


def test_what_cannot_be_served_is_refused_before_any_request():
    def start(model, **config):
        return model.init_continuous_batching(generation(2), ContinuousBatchingConfig(**config))

    model = small("sparse")
    for option in ({"default_compile_level": 1}, {"use_async_batching": True}, {"use_cuda_graph": True}):
        with pytest.raises(ValueError, match=r"(compile_config|use_async_batching|use_cuda_graph).*leave that at its default"):
            start(model, **option)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has a key_conv.*call model.generate"):
        start(patch(build(), **SETTINGS, key_conv=3))


def test_cuda_graphs_are_among_the_options_that_are_refused():
    assert upstream.unsuited_options(ContinuousBatchingConfig(use_cuda_graph=True)) == ["use_cuda_graph"]
    assert upstream.unsuited_options(ContinuousBatchingConfig()) == []


@pytest.mark.parametrize("family", [family for family in ("gemma2", "gemma4") if family in FAMILIES])
def test_models_that_continuous_batching_would_get_wrong_are_refused(family):
    model = patch(build(family), **SETTINGS)
    serving = Serving(model)
    serving.add(prompts(60)[0])
    with pytest.raises(ValueError, match=r"caps its scores|keys are those of another layer"):
        serving.step(3)


def test_keys_that_a_layer_changes_behind_the_cache_are_an_error(monkeypatch):
    serving = Serving(small("sparse"))
    serving.add(prompts(60)[0])
    given = paged_cache.MobaPagedCache.update
    monkeypatch.setattr(paged_cache.MobaPagedCache, "update", lambda *args, **kwargs: tuple(x * 1 for x in given(*args, **kwargs)))
    with pytest.raises(ValueError, match="LlamaAttention 0 changes its keys or values after it has read them from the cache"):
        serving.step()
