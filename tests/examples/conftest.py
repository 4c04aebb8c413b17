"""What tests of `benchmark.py` and of `pretrain.py` share: no GPU, and runs that are trained once per process.

Imports are within: the process that hands tests out to others needs no PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def file(tmp_path, cpu) -> Path:
    """For the results of `benchmark.py`, on a CPU."""
    return tmp_path / "results.json"


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    from support import pretrain_runs

    with pretrain_runs.signals_as_before():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of three packages of Python's standard library, for `pretrain.py`."""
    from pretraining.corpus import corpus
    from support.pretrain_runs import STDLIB

    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder, list(STDLIB))
    return folder


@pytest.fixture(scope="session")
def words(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that is the same with any version of Python, so that losses are too."""
    from pretraining.corpus import corpus

    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder, [text_folder])
    return folder


@pytest.fixture(scope="session")
def trained(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs and a sweep, for two seeds; the logs are in `logs`, the models in `checkpoints`, what the bars showed in `progress`."""
    import pretrain
    from pretraining.runs import NAMES
    from support import pretrain_runs

    folder = tmp_path_factory.mktemp("trained")
    with pretrain_runs.signals_as_before():
        with contextlib.redirect_stderr((folder / "progress").open("w")):
            assert pretrain.pretrain(pretrain_runs.arguments(folder, words, "--runs", *NAMES, "--blocks", "4", "8")) == 0
        assert pretrain.pretrain(pretrain_runs.arguments(folder, words, "--runs", "full", "moba", "--seeds", "1")) == 0
    return folder
