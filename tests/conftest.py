"""Settings of every test run, and the study that tests run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sharpscope.studies

# The problems are small: a second thread costs more than it does, many times more on a busy processor.
torch.set_num_threads(1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a study of half a second, found beside those of the package while a test lasts."""
    folder = str(Path(__file__).parent / "tiny_studies")
    monkeypatch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, folder])
    yield "tiny"
