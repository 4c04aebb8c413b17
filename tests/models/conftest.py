"""What tests of decoding share. Imports are within: the process that hands tests out to others needs no PyTorch."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_recomputation(monkeypatch):
    """From here on no decoding may compute the means of a whole cache."""
    from moba_flex.models import attention_function

    def refuse(*args):
        raise AssertionError("all block means were computed again")

    monkeypatch.setattr(attention_function, "write_means", refuse)
