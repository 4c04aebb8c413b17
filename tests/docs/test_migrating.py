"""`docs/migrating.md`: its code runs as it stands, and gives what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from support.cases import random
from transformers import LlamaConfig

from moba_flex import moba_attention, moba_attention_varlen

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
TOKENS, HEADS, WIDTH = 100, 4, 8
SPARSE = {"block_size": 16, "top_k": 3}


@pytest.fixture(scope="module")
def names() -> dict[str, dict]:
    """What each section's code has defined, by the section's title; later sections see what earlier ones defined."""
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    tokens = random(3, TOKENS, HEADS, WIDTH, seed=0, dtype=torch.float32)
    given = dict(zip(("q", "k", "v"), tokens)) | dict(zip(("query", "key", "value"), tokens.transpose(1, 2)[:, None]))
    given |= {"cu_seqlens": torch.tensor([0, 30, TOKENS], dtype=torch.int32), "max_seqlen": 70}
    given |= {"model": transformers.AutoModelForCausalLM.from_config(config), "input_ids": torch.arange(64)[None] % 32}
    defined = {}
    for section in PAGE.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            exec(compile(block, f"docs/migrating.md, {title}", "exec"), given)
            defined[title] = dict(given)
    return defined


def test_every_block_of_code_is_run(names):
    assert PAGE.count("```") == 2 * PAGE.count("```python") == 2 * len(names)


@pytest.mark.parametrize("section", ["MoonshotAI/MoBA", "FlashMoBA", "flash-linear-attention"])
def test_the_other_implementations_functions_give_what_ours_give(names, section):
    found = names[section]
    out = found["out"].squeeze(0)
    torch.testing.assert_close(out, moba_attention_varlen(*(found[x] for x in "qkv"), found["cu_seqlens"], **SPARSE))


def test_flex_attention_under_our_mask_takes_a_score_mod(names):
    found = names["FlexAttention"]
    assert (found["out"] - found["same"]).abs().max() > 1e-3
    torch.testing.assert_close(found["same"], moba_attention(*(found[x] for x in ("query", "key", "value")), **SPARSE))


def test_the_model_is_traced_and_unpatched(names):
    found = names["A transformers model"]
    assert found["trace"].layers == (0, 1) and not hasattr(found["model"].config, "moba")
    assert found["logits"].isfinite().all()


def test_scaled_dot_product_attention_aligns_fewer_queries_to_the_first_keys(names):
    query, key, value = (names["scaled_dot_product_attention"][x] for x in ("query", "key", "value"))
    few = torch.nn.functional.scaled_dot_product_attention(query[:, :, -10:], key, value, is_causal=True)
    torch.testing.assert_close(few[:, :, 0], value[:, :, 0], msg="the first query sees the first key alone")
    ours = moba_attention(query[:, :, -10:], key, value, block_size=16, top_k=7)
    torch.testing.assert_close(ours, names["scaled_dot_product_attention"]["dense"][:, :, -10:])


def test_the_figures_of_the_rounded_mean_are_the_ones_of_random_data():
    for block_size, top_k, percent in ((128, 8, 1.0), (512, 4, 0.4), (64, 16, 2.1)):
        assert f"{percent:.1f} % " in PAGE and f"block {block_size} and top-{top_k}" in PAGE
        query, key = (random(16_384, 128, seed=seed, dtype=torch.bfloat16).float() for seed in (0, 1))
        mean = key.view(-1, block_size, 128).mean(1)
        own = torch.arange(16_384) // block_size
        future = torch.arange(len(mean)) >= own[:, None]
        exact, rounded = (
            (query @ m.mT).masked_fill(future, -torch.inf).topk(top_k - 1).indices.sort().values for m in (mean, mean.bfloat16().float())
        )
        some = own >= top_k  # the others have nothing to choose
        changed = 100 * (exact != rounded).any(1)[some].float().mean()
        assert abs(changed - percent) < 0.4 * percent, f"block {block_size}, top-{top_k}: {changed:.2f} %"
