"""What all tests share: fixed seeds, and the demo's model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Beside other busy programs PyTorch's threads lose minutes waiting for each other in a busy loop, see examples/llama.py. Only
# possible before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import demo_weights as demo

settings.register_profile("same cases in every run", derandomize=True, deadline=None)
settings.load_profile("same cases in every run")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_weights() -> Path:
    """The demo's weights, for tests marked `weights`. Only a missing network excuses such a test."""
    try:
        return demo.demo_weights()
    except demo.NoNetwork as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(demo_weights: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, for tests marked `weights`. All tests share it: leave it unpatched."""
    import llama

    return llama.load(None, "cpu", "float32")
