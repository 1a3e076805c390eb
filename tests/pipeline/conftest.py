"""For every test of the pipeline: signal handlers that a command set are put back."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def _restore_signals():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
