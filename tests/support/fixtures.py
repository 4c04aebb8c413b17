"""What all tests share: fixed seeds, a tiny model on disk, and the demo's model. `conftest.py` loads this where tests run."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from filelock import FileLock
from shared import demo_weights as demo
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from moba_flex import set_cuda_graphs
from moba_flex.core.weak_set import SharedWeakSet
from moba_flex.models import by_name, state

from .fresh import FreshPython


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _graphs_of_its_own() -> None:
    """No test replays what another one captured, perhaps with other parts of the package replaced."""
    set_cuda_graphs(False)
    set_cuda_graphs(True)


@pytest.fixture(autouse=True)
def _patched_models_of_its_own() -> None:
    """A model that is loaded by name takes the settings of those that this test patched, not of what others have left."""
    state._STATES = SharedWeakSet()
    by_name._DEFAULTED.clear()


@pytest.fixture(autouse=True)
def _precision_of_its_own() -> Iterator[None]:
    """No test computes with the shortened float32 that a script has asked for in another one."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _progress_bars_of_its_own() -> None:
    """No test misses the progress bar that another one has switched off."""
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshPython]:
    """Runs programs in processes that have not loaded moba_flex."""
    with FreshPython() as python:
        yield python


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
def byte_llama(tmp_path_factory) -> Path:
    """The folder of a small random Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("byte_llama")
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=1024, eos_token_id=256, **sizes)).save_pretrained(folder)
    letters_and_end = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    read = Tokenizer(BPE(letters_and_end, merges=[]))
    read.pre_tokenizer, read.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=read, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """120 files of prose and 120 of code, of random words, 600 bytes or more each."""
    folder, choice = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(120):
        for end in ("md", "py"):
            lines = [" ".join("".join(choice.choices("abcdefgh", k=6)) for _ in range(8)) for _ in range(12)]
            (folder / f"{i}.{end}").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def demo_weights() -> Path:
    """The demo's weights, for tests marked `weights`. Only a missing network excuses such a test."""
    try:
        return demo.demo_weights()
    except demo.NoNetwork as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(demo_weights: Path, tmp_path_factory) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """SmolLM2-135M-Instruct and its tokenizer, for tests marked `weights`. All tests share it: leave it unpatched.

    Reading the GGUF file takes half a minute of a core, so the process that comes first leaves what it has read to the others.
    """
    import gguf
    import llama

    own = tmp_path_factory.getbasetemp()
    copy = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smollm2.pt"
    with FileLock(f"{copy}.lock"):
        if copy.is_file():
            loaded = torch.load(copy, weights_only=False)
        else:
            # Of transformers, which parses the file five times, and makes the map of names anew for each tensor.
            once = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
            with patch.multiple(gguf, **once):
                loaded = llama.load(None, "cpu", "float32")
            torch.save(loaded, copy)
    yield loaded
    with FileLock(f"{copy}.lock"):  # nobody reads it meanwhile
        copy.unlink(missing_ok=True)  # half a gigabyte
