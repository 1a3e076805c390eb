"""What a stage has to tell beside its result and its errors: one line each, which the pipeline shows and logs."""

from __future__ import annotations

import logging

LOGGER = "duet.notes"  # `pipeline/terminal.py` listens to it; other programs may, too


def note(text: str) -> None:
    """Tell the user something that stops nothing."""
    logging.getLogger(LOGGER).info(text)
