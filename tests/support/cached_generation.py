"""Generation with caches: a small model, prompts for it, ways to generate, and what recomputation without a cache gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moba_flex.models import patch
from moba_flex.models.state import means_beside

VOCABULARY, PROMPT, NEW = 64, 53, 14
SPARSE = {"block_size": 8, "top_k": 3, "decode": "sparse"}
FULL = {"block_size": 8, "top_k": 2, "decode": "full"}
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def build(seed: int = 0, layers: int = 2, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return patch(model, **settings) if settings else model


def tokens(rows: int = 1, length: int = PROMPT, seed: int = 1) -> Tensor:
    """Six words again and again, so that n-grams of the prompt are good drafts."""
    words = torch.randint(2, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return words.repeat(1, length // 6 + 1)[:, :length].clone()


def padded() -> dict[str, Tensor]:
    ids, mask = tokens(3), torch.ones(3, PROMPT, dtype=torch.int64)
    mask[1, :21] = mask[2, :40] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def recomputed(model: PreTrainedModel, inputs: dict[str, Tensor] | Tensor, **call) -> Tensor:
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    return model.generate(**inputs, use_cache=False, **{**GREEDY, **call})


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cache, **inputs) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, **inputs).logits


def means(cache, layer: int = 0):
    return means_beside(cache.layers[layer])


def filled(model: PreTrainedModel, ids: Tensor, **inputs) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    run(model, ids, cache, **inputs)
    return cache


WAYS = {
    "growing cache": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 9},
    "chunked prefill of few tokens": {"prefill_chunk_size": 33},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "long prompt lookup": {"prompt_lookup_num_tokens": 40},
    "assisted": {"assistant_model": lambda: build(3, 1)},
    "assisted by itself": {"assistant_model": lambda: build()},
}


def ways(names=WAYS):
    return pytest.mark.parametrize("way", [{k: v for k, v in WAYS[name].items()} for name in names], ids=list(names))


def call_of(way: dict) -> dict:
    return {**GREEDY, **{name: value() if callable(value) else value for name, value in way.items()}}
