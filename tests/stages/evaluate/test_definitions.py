"""Definitions come from docstrings, and no two metrics share a name."""

from __future__ import annotations

import pytest

from duet.stages.evaluate import definitions as listed
from duet.stages.evaluate.definitions import all_metrics, as_markdown, definitions, versions
from duet.stages.metrics.metric import Metric


def example() -> None:
    """Share of what is
    wanted.

    Arguments and the like.
    """


def test_the_first_paragraph_of_the_docstring_is_the_definition():
    metric = Metric("share", example, better="high", version=3)
    assert metric.definition == "Share of what is wanted."
    assert definitions([metric]) == {"share": "Share of what is wanted."}
    assert versions([metric]) == {"share": 3}
    page = as_markdown([metric])
    assert "## share@3\n\nShare of what is wanted.\n\nRange: 0 to 1. Better: high." in page


def test_names_are_unique(monkeypatch):
    assert {"rougeL_recall", "tofu.truth_ratio/geo", "extraction_strength", "ci95"} <= {m.id for m in all_metrics()}
    monkeypatch.setattr(listed, "MODULES", ("duet.stages.metrics.tofu", "duet.stages.metrics.tofu"))
    with pytest.raises(ValueError, match="two metrics are called tofu"):
        all_metrics()
