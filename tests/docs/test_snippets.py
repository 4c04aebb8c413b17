"""Every block of Python in README and docs runs alone, as it stands. What stands in for models and files: `doc_pages.py`."""

from __future__ import annotations

import ast

import pytest
import torch
from doc_pages import GIVEN, PAGES, ROOT, Block, blocks

from moba_flex import moba_attention, moba_attention_varlen

SPARSE = {"block_size": 16, "top_k": 3}
LANGUAGES = {"", "python", "yaml", "toml"}
FOUND = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in FOUND if block.language == "python"]
MIGRATING = [block for block in PYTHON if block.page.name == "migrate.md"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_it_runs_alone(run, block: Block):
    if "trl" in block.code:
        pytest.importorskip("trl", reason="TRL is not installed")
    run(block)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_the_page_tells_which_names_stand_for_the_readers(block: Block):
    text = block.page.read_text(encoding="utf-8")
    loaded = {node.id for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Name)}
    for name in block.given:
        assert name in GIVEN, f"{block}: doc_pages.py has no {name}"
        assert name in loaded, f"{block}: the code does not use {name}"
        assert f"`{name}`" in text, f"{block}: the page does not say what {name} is"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_of_code_is_overlooked(page):
    found = blocks(page)
    text = page.read_text(encoding="utf-8")
    assert sum(line.strip().startswith("```") for line in text.split("\n")) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES
    assert text.count("<!-- given:") == sum(bool(block.given) for block in found)
    assert text.count("<!-- smaller:") == sum(bool(block.smaller) for block in found)


def test_python_is_found_where_it_is_known_to_be():
    pages = {block.page.relative_to(ROOT).as_posix() for block in PYTHON}
    how_to = {page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name == "how-to"}
    assert pages == {"README.md", "docs/index.md"} | how_to


def _migrating(part: str) -> Block:
    found = [block for block in MIGRATING if part in block.code]
    assert len(found) == 1, f"{len(found)} blocks with {part!r}"
    return found[0]


@pytest.mark.parametrize("theirs", ["was: from moba.moba_efficient", "was: from flash_moba", "def parallel_moba"])
def test_the_other_implementations_functions_give_what_ours_give(run, theirs):
    found = run(_migrating(theirs))
    out = found["out"].squeeze(0)
    torch.testing.assert_close(out, moba_attention_varlen(*(found[x] for x in "qkv"), found["cu_seqlens"], **SPARSE))


def test_flex_attention_under_our_mask_takes_a_score_mod(run):
    found = run(_migrating("import flex_attention"))
    assert (found["out"] - found["same"]).abs().max() > 1e-3
    torch.testing.assert_close(found["same"], moba_attention(*(found[x] for x in ("query", "key", "value")), **SPARSE))


def test_scaled_dot_product_attention_aligns_fewer_queries_to_the_first_keys(run):
    found = run(_migrating("F.scaled_dot_product_attention"))
    query, key, value = (found[x] for x in ("query", "key", "value"))
    few = torch.nn.functional.scaled_dot_product_attention(query[:, :, -10:], key, value, is_causal=True)
    torch.testing.assert_close(few[:, :, 0], value[:, :, 0], msg="the first query sees the first key alone")
    ours = moba_attention(query[:, :, -10:], key, value, block_size=16, top_k=7)
    torch.testing.assert_close(ours, found["dense"][:, :, -10:])


def test_the_model_is_traced_and_unpatched(run):
    found = run(_migrating("moba_flex.unpatch(model)"))
    assert found["trace"].layers == tuple(range(found["model"].config.num_hidden_layers))
    assert not hasattr(found["model"].config, "moba")
    assert found["logits"].isfinite().all()


@pytest.mark.parametrize(("block_size", "top_k", "percent"), [(128, 8, 1.0), (512, 4, 0.4), (64, 16, 2.1)])
def test_the_figures_of_the_rounded_mean_are_the_ones_of_random_data(block_size, top_k, percent):
    page = (ROOT / "docs" / "how-to" / "migrate.md").read_text(encoding="utf-8")
    assert f"| {block_size}, {top_k} | {percent:.1f} % |" in page
    query, key = (torch.randn(16_384, 128, generator=torch.Generator().manual_seed(seed)).bfloat16().float() for seed in (0, 1))
    mean = key.view(-1, block_size, 128).mean(1)
    own = torch.arange(16_384) // block_size
    future = torch.arange(len(mean)) >= own[:, None]
    exact, rounded = (
        (query @ m.mT).masked_fill(future, -torch.inf).topk(top_k - 1).indices.sort().values for m in (mean, mean.bfloat16().float())
    )
    some = own >= top_k  # the others have nothing to choose
    changed = 100 * (exact != rounded).any(1)[some].float().mean()
    assert abs(changed - percent) < 0.4 * percent, f"block {block_size}, top-{top_k}: {changed:.2f} %"
