"""How many threads a loaded model has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from duet.stages.models import loading

SMALL = Path(__file__).parents[3] / "lab/models/small"


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    loading._threads_at_first.cache_clear()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    loading._threads_at_first.cache_clear()


def test_a_small_model_has_one_thread_and_a_larger_one_after_it_all(three_threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    loading.load_model(SMALL)
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(loading, "THREADED_FROM", 1)
    loading.load_model(SMALL)
    assert torch.get_num_threads() == 3


def test_who_says_how_many_threads_gets_them(three_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    loading.load_model(SMALL)
    assert torch.get_num_threads() == 3
