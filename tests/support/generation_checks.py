"""What the processes of `test_distributed.py` do about generation. Every function runs on all of them, and raises where they differ from
one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support import small_models
from support.cases import Case, assert_same, attend, operands
from support.distributed_checks.models import context_mesh, mesh, says, sharded, tiny, tokens
from support.stuck import here
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, LlamaForCausalLM

import moba_flex
from moba_flex.core.settings import AttentionSettings
from moba_flex.distributed import context_parallel, decoding
from moba_flex.distributed.cache import share, shared_layer
from moba_flex.distributed.decoding import attend_shared
from moba_flex.distributed.placement import Placement
from moba_flex.models.state import means_beside
from moba_flex.models.upstream import cache_in

BLOCK, NEW = 7, 9
FLOAT32 = {"rtol": 1e-3, "atol": 1e-4}


def small_model(decode: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A patched Llama with one layer of full attention, the same on all processes, whose attention is far from uniform."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(initializer_range=0.3, eos_token_id=None, bos_token_id=None, **changes)).to(here(), dtype).eval()
    return moba_flex.patch(model, block_size=BLOCK, top_k=3, sink_blocks=1, full_attention_layers=[1], decode=decode)


def generated(model: nn.Module, ids: torch.Tensor, **options: Any) -> Any:
    return model.generate(ids, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, **{"do_sample": False, **options})


def tokens_are_equal(size: int, by: str, decode: str, n_tokens: int) -> int:
    """Greedily in float32, for prompts that divide nothing; how many tokens' keys this process holds in the end."""
    model, ids = small_model(decode, torch.float32), tokens(2, n_tokens)
    expected = generated(model, ids)
    context_parallel(model, context_mesh(size), exchange=by)
    cache = DynamicCache()
    actual = generated(model, ids, past_key_values=cache)
    assert actual.sequences.equal(expected.sequences)
    for i, (x, y) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_same(x, y, f"logits of token {i}", **FLOAT32)
    assert cache.get_seq_length() == n_tokens + NEW - 1  # the last one is never read
    return cache.layers[0].keys.shape[2]


def every_way_to_cut_is_equal(size: int, decode: str, one_then_many: bool) -> None:
    """A prompt, a later turn of many tokens, single tokens, and the same again from a cache that was cut back, rows changing places."""
    ids, model = tokens(2, 120), small_model(decode)
    parts = [41, 23, 1, 1, 9, 1] if one_then_many else [3, 1, 1, 50, 1, 1]
    caches, outs = {}, {}
    for who in ("one", "many"):
        context = context_parallel(model, context_mesh(size)) if who == "many" else None
        caches[who], outs[who], done = DynamicCache(), [], 0

        def call(first: int, n: int, rows: torch.Tensor, who: str = who) -> None:
            outs[who].append(model(ids[rows, first : first + n], past_key_values=caches[who]).logits)

        with torch.no_grad():
            for n in parts:
                call(done, n, torch.arange(2))
                done += n
            caches[who].crop(-(done - 50))
            call(50, 3, torch.arange(2))
            caches[who].reorder_cache(torch.tensor([1, 0], device=here()))
            call(53, 20, torch.tensor([1, 0]))
            caches[who].batch_select_indices(torch.tensor([1], device=here()))
            call(73, 1, torch.tensor([0]))
            caches[who].batch_repeat_interleave(2)
            call(74, 1, torch.tensor([0, 0]))
            again = copy.deepcopy(caches[who])
            call(75, 8, torch.tensor([0, 0]))
            before, caches[who] = caches[who], again
            call(75, 8, torch.tensor([0, 0]))
            assert_same(outs[who][-1], outs[who][-2], "from a copy of the cache")
            caches[who] = before
    for i, (x, y) in enumerate(zip(outs["many"], outs["one"], strict=True)):
        assert_same(x, y, f"logits of call {i}", rtol=1e-7, atol=1e-8)
    layer = shared_layer(caches["many"], model.model.layers[0].self_attn)
    assert layer.get_seq_length() == 83
    means = layer.block_means(context.group)
    if decode == "sparse":
        kept = means_beside(caches["one"].layers[0])
        assert not kept.stale and means.equal(kept.means[:, :, : means.shape[2]])  # bit for bit, so that ties fall alike
    caches["many"].crop(-83)
    assert caches["many"].get_seq_length() == 0
    with torch.no_grad():
        once_more = model(ids[:, : parts[0]], past_key_values=caches["many"]).logits
    assert_same(once_more, outs["many"][0], "from a cache that was emptied", rtol=1e-7, atol=1e-8)
    context.remove()


def drawn_attention_is_equal(case: Case, size: int, prompt: int, reads_all: bool) -> tuple[int, int]:
    """`attend_shared` of the last queries of a case, whose first `prompt` keys are a prompt; how many readers read anything here, and how
    many keys this process holds."""
    whole = {name: x.to(here()) for name, x in operands(case).items()}
    expected, _ = attend(all_blocks(case) if reads_all else case, whole, implementation="naive")
    actual, read, held = shared_attention(case, whole, size, prompt, reads_all)
    assert_same(actual, expected, f"{case}, {prompt}")
    return read, held


def all_blocks(case: Case) -> Case:
    return case.but(top_k=case.n_key, sink_blocks=0, recent_blocks=0)


def later_tokens_reach_no_earlier_ones(case: Case, size: int, prompt: int, reads_all: bool) -> None:
    """What the last new tokens hold, NaN say, reaches the new tokens that see them and no others."""
    clean = {name: x.to(here()) for name, x in operands(case).items()}
    expected, n_spoilt = shared_attention(case, clean, size, prompt, reads_all)[0], 2
    for name in ("query", "key", "value"):
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = {other: x.clone() for other, x in clean.items()}
            spoilt[name][:, :, -n_spoilt:, 0] = bad
            actual = shared_attention(case, spoilt, size, prompt, reads_all)[0]
            assert_same(actual[:, :, :-n_spoilt], expected[:, :, :-n_spoilt], f"{bad} in {name}, {case}, {prompt}")
            if bad != bad:
                assert not actual[:, :, -n_spoilt:].isfinite().all(-1).any(), f"{name} of {bad} is not seen"
            elif name == "value":
                assert (actual[:, :, -n_spoilt:, 0] == bad).all(), f"{name} of {bad} is not seen"


def shared_attention(case: Case, whole: dict[str, torch.Tensor], size: int, prompt: int, reads_all: bool) -> tuple[torch.Tensor, int, int]:
    """`attend_shared` of `whole`, as `drawn_attention_is_equal` says, and the two numbers that it returns."""
    of_cp = context_mesh(size)["cp"].get_group()
    place, read = Placement(of_cp.rank(), size, case.block_size, prompt), []
    layer, length = share(DynamicCache(), 1)[0], place.slice_length
    for first, stop in ((0, prompt), (prompt, case.n_key)):
        layer.shared.announce(stop - first, None if first else place)
        key, value = (whole[name][:, :, first:stop] for name in ("key", "value"))
        if not first:
            padded = (nn.functional.pad(x, (0, 0, 0, length * size - prompt)) for x in (key, value))
            key, value = (x[:, :, of_cp.rank() * length : (of_cp.rank() + 1) * length] for x in padded)
        if stop > first:
            layer.update(key, value)
    settings = AttentionSettings(**{**case.settings, "scale": case.real_scale})
    across = decoding._across

    def seen(out, lse, *rest):
        read.append(int((lse > -torch.inf).sum()))
        return across(out, lse, *rest)

    decoding._across = seen
    try:
        out = attend_shared(whole["query"], layer, settings, whole.get("sinks"), reads_all, of_cp)
    finally:
        decoding._across = across
    return out, sum(read), layer.keys.shape[2]


def length_scaled_generation_is_equal(size: int, rope: dict) -> None:
    """Rotary embeddings whose frequencies depend on the length, which the prompt or what is generated may pass; any length."""
    lengths = {"rope_parameters": rope, "max_position_embeddings": 40 if rope["rope_type"] == "dynamic" else 256}
    model, whole = small_model("sparse", **lengths), small_model("sparse", **lengths)
    context_parallel(model, context_mesh(size))
    ids = tokens(2, 35)
    actual, expected = generated(model, ids), generated(whole, ids)
    assert actual.sequences.equal(expected.sequences)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits), **FLOAT32)


def other_ways_to_generate_are_equal(size: int) -> list[int]:
    """Beams, several answers, chunks of a prompt, embeddings; and draws, although each process has random numbers of its own."""
    model, ids = small_model("sparse"), tokens(1, 37)
    rank = context_mesh(size)["cp"].get_local_rank()
    ways = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ]
    expected = []
    for way in ways:
        torch.manual_seed(5)
        expected.append(generated(model, ids, **way).sequences)
    context = context_parallel(model, context_mesh(size))
    for way, sequences in zip(ways, expected, strict=True):
        torch.manual_seed(5 + rank)
        actual = generated(model, ids, **way).sequences
        assert actual.equal(sequences), way
    assert_same(*(model(ids).logits for model in unfold(model, context)), "logits of all tokens")
    return actual.flatten().tolist()


def sharded_model_is_equal() -> None:
    """FSDP2 over all four processes, two of which share a prompt each."""
    of_cp = context_mesh(2)
    ids = tokens(2, 40)[of_cp["dp"].get_local_rank()][None]
    expected = generated(small_model("sparse"), ids)
    model = sharded(small_model("sparse"), mesh(4, names=("dp_shard_cp",)))
    context_parallel(model, of_cp)
    actual = generated(model, ids)
    assert actual.sequences.equal(expected.sequences)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits), **FLOAT32)


def unfold(model: nn.Module, context: Any) -> Any:
    """The model, context-parallel and then not, without gradients."""
    with torch.no_grad():
        yield model
        context.remove()
        yield model


def what_cannot_be_shared_out_is_refused() -> None:
    """Each with one clear error on every process, so that none waits for another."""
    of_cp = context_mesh(4)
    other = small_models.small_model(DeepseekV3ForCausalLM, DeepseekV3Config).to(here())
    context_parallel(moba_flex.patch(other, block_size=BLOCK, top_k=3), of_cp)
    with says(ValueError, "DeepseekV3Attention 0 computes its keys from what it caches"):
        other.generate(small_models.tokens().to(here()), max_new_tokens=1)
    other = small_model("full")
    other.model.layers[2].self_attn.layer_idx = 0  # as in HRM, whose stacks share the numbers of their layers
    context_parallel(other, of_cp)
    with says(ValueError, "LlamaModel has several attention layers with the number 0"):
        other.generate(tokens(1, 20), max_new_tokens=1)
    model, ids = small_model("full"), tokens(2, 30)
    expected, full_cache = model.generate(ids, max_new_tokens=1), DynamicCache()
    model(ids, past_key_values=full_cache)
    context = context_parallel(model, of_cp)
    with says(ValueError, "called with gradients", "ContextParallel.shard", "torch.no_grad()"):
        model(ids)
    padded = torch.arange(30, device=here()).expand(2, -1) > 2
    with says(ValueError, "attention_mask", "must be ones for all 30 tokens", "without padding"):
        model.generate(ids, attention_mask=padded, max_new_tokens=1)
    with says(ValueError, "keeps its keys in a DynamicCache, but got a StaticCache", "cache_implementation"):
        model.generate(ids, max_new_tokens=1, cache_implementation="static", disable_compile=True)
    with says(ValueError, "logits of 5 tokens of a prompt", 'decode="sparse"'):
        model.generate(ids, max_new_tokens=1, logits_to_keep=5)
    with says(ValueError, "use_cache=True"):
        model.generate(ids, max_new_tokens=1, use_cache=False)
    with torch.no_grad():
        with says(ValueError, "30 tokens from a model that was not context-parallel"):
            model(ids[:, :1], past_key_values=full_cache)
        with says(ValueError, "position_ids", "count from 0 to 29"):
            model(ids, position_ids=torch.arange(30, device=here()) % 9)
        with says(ValueError, "output_hidden_states=False, but got True"):
            model(ids, output_hidden_states=True)
        with says(ValueError, "cannot share out token_type_ids"):
            model(ids, token_type_ids=ids)
        with says(ValueError, "the same tokens, but are not", "process 0: 2 x 30 behind 0", "process 3: 2 x 30"):
            model(ids.flip(0) if context.rank == 2 else ids)
        with says(ValueError, "attention_mask" if context.rank == 1 else "failed on process 1"):
            model(ids, attention_mask=padded if context.rank == 1 else None)
        out = model(ids)
        assert_same(context.unshard(model(**context.shard({"input_ids": ids})).logits, 30), out.logits, "logits of slices")
        cache = cache_in(out) or out["past_key_values"]
        with says(ValueError, "the same tokens, but are not", "process 3: 2 x 1 behind 30"):  # as if one had drawn another token
            model(ids[:, :1] if context.rank else ids[:, 1:2], past_key_values=cache)
        moba_flex.patch(model, block_size=5, top_k=3)  # settings may change under way
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()  # which reads all keys
        with says(ValueError, "block_size is 5, but the cached keys are shared out in blocks of 7"):
            model(ids[:, :2], past_key_values=cache)
        context.remove()
        with says(ValueError, "one process's share of the keys"):
            model(ids[:, :1], past_key_values=cache)
    moba_flex.patch(model, block_size=BLOCK, top_k=3, sink_blocks=1, full_attention_layers=[1])
    assert model.generate(ids, max_new_tokens=1).equal(expected)
