"""The fixture that runs a page's code; `doc_pages.py` says what it stands in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from doc_pages import BOOK, GIVEN, Block, tiny_model, tiny_tokenizer

LAUNCHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Block], dict]]:
    """Runs a block as the first code of a program, and returns what it has defined."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.AutoConfig):

        def load(name, *args, original=auto.from_pretrained, **kwargs):
            return original(name if Path(name).is_dir() else hub_folder, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", load)
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(block: Block) -> dict:
        namespace = {"__name__": "__main__", **{name: GIVEN[name]() for name in block.given}}
        if "torch.distributed" in block.code:  # elsewhere Trainer would start a process group of its own
            for name, value in LAUNCHER.items():
                monkeypatch.setenv(name, value)
        torch.manual_seed(0)
        exec(compile("\n" * block.line + block.for_tests(), str(block.page), "exec"), namespace)
        return namespace

    yield call
    if dist.is_initialized():
        dist.destroy_process_group()
