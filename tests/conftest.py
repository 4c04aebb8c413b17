"""What all tests share: fixed seeds, a tiny model on disk, and the demo's model."""

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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import demo_weights as demo

settings.register_profile("same cases in every run", derandomize=True, deadline=None)
settings.load_profile("same cases in every run")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a small random Llama whose tokens are the words w0 to w49."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=51,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # with the default, attention is nearly uniform, whatever it reads
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=50,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({**{f"w{i}": i for i in range(50)}, "?": 50}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?").save_pretrained(folder)
    return folder


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
