"""The promises of `sweep.py`, for a part of the classes of transformers; `MOBA_SWEEP=all` for all of them."""

from __future__ import annotations

import os

import pytest
from support.small_models import loaded, names
from sweep import PROMISES, sweep, table
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from moba_flex.models import attention_function, call_hooks, visible

EVERY = names()
PART = list(EVERY) if os.environ.get("MOBA_SWEEP") == "all" else list(EVERY)[1::9]
pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", PART)
def test_a_class_keeps_every_promise_or_is_refused_by_name(name):
    report = sweep(*loaded(name, *EVERY[name]))
    assert report.state != "broken", report.broken
    if report.state == "not built":
        pytest.skip(f"{report.name} cannot be built small: {report.reason}")
    if report.state == "refused":
        assert report.name in report.reason, f"the error does not name {report.name}: {report.reason}"


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, GPT2LMHeadModel, MistralForCausalLM])
def test_well_known_classes_are_built_and_accepted_with_all_that_is_promised(model_class):
    report = sweep("causal", model_class, model_class.config_class)
    assert report.state == "accepted" and report.kept == list(PROMISES) and not report.left_out


def test_a_class_with_position_biases_is_refused():
    name = "T5ForConditionalGeneration"
    report = sweep(*loaded(name, *EVERY[name]))
    assert report.state == "refused" and "T5ForConditionalGeneration" in report.reason


BREAKS = {
    "full attention is the unpatched model, bit for bit": lambda m: m.setattr(
        attention_function, "_original", lambda call, weights=False: (call.query.transpose(1, 2).contiguous(), None)
    ),
    "a padded row is the row alone": lambda m: m.setattr(visible, "_padding", lambda attention_mask, n_key: None),
    "drafts are greedy": lambda m: m.setattr(call_hooks, "_drafts", lambda model, kwargs: 0),
}


@pytest.mark.parametrize("promise", BREAKS)
def test_a_promise_that_is_broken_is_reported(promise, monkeypatch):
    BREAKS[promise](monkeypatch)
    report = sweep("causal", LlamaForCausalLM, LlamaConfig)
    assert report.state == "broken" and promise in report.broken


def test_the_list_counts_and_names_every_class():
    reports = [sweep("causal", cls, cls.config_class) for cls in (LlamaForCausalLM, GPT2LMHeadModel)]
    reports[1].state = "refused"
    text = table(reports)
    assert "1 classes are accepted" in text and "1 are refused" in text
    accepted, refused = text.split("### Refused")
    assert "`LlamaForCausalLM`" in accepted and "`GPT2LMHeadModel`" in refused
