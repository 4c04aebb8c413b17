"""What tests of `trace` share. Imports are within: the process that hands tests out to others needs no transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
