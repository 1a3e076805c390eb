"""The list of metrics and its page: definitions, versions, and no two metrics of one name."""

from __future__ import annotations

import pytest

from duet.stages.evaluate.definitions import all_metrics, as_markdown, definitions, versions
from duet.stages.metrics import tofu
from duet.stages.metrics.metric import Metric


def example() -> None:
    """Computes the share."""


def test_a_metric_is_listed_with_its_definition_version_and_function():
    metric = Metric("share", example, "Share of the answers that are wanted.", better="high", version=3)
    assert definitions([metric]) == {"share": "Share of the answers that are wanted."}
    assert versions([metric]) == {"share": 3}
    page = as_markdown([metric])
    assert "## share@3\n\nShare of the answers that are wanted.\n\nRange: 0 to 1. Better: high." in page


def test_names_are_unique(monkeypatch):
    assert {"rougeL_recall", "tofu.truth_ratio/geo", "extraction_strength", "ci95"} <= {m.id for m in all_metrics()}
    monkeypatch.setattr(tofu, "METRICS", (*tofu.METRICS, tofu.METRICS[0]))
    with pytest.raises(ValueError, match="two metrics are called tofu"):
        all_metrics()
