"""All metrics of results.json, in one list, with their definitions; `docs/metrics.md` is written from here.

The modules that compute scores list them as `METRICS`, each with its definition. A metric's full name is `id@version`; a change
that can change a number makes a new version.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from duet.stages.attacks import scores
from duet.stages.evaluate import collapse, distance, harness, judged, muse, verdict
from duet.stages.exam import given_beside
from duet.stages.metrics import choices, depth, membership, memorisation, perplexity, text, tofu, uncertainty
from duet.stages.metrics.metric import Metric


def all_metrics() -> tuple[Metric, ...]:
    """Every metric, in the order of the page; two with the same id are a fault in the code (ValueError)."""
    found = (
        *text.METRICS,
        *memorisation.METRICS,
        *given_beside.METRICS,
        *depth.METRICS,
        *tofu.METRICS,
        *choices.METRICS,
        *muse.METRICS,
        *distance.METRICS,
        *judged.METRICS,
        *membership.METRICS,
        *perplexity.METRICS,
        *collapse.METRICS,
        *verdict.METRICS,
        *uncertainty.METRICS,
        *harness.METRICS,
        *scores.METRICS,
    )
    ids = [metric.id for metric in found]
    if repeated := sorted({one for one in ids if ids.count(one) > 1}):
        raise ValueError(f"two metrics are called {repeated[0]}")
    return found


def definitions(metrics: Iterable[Metric]) -> dict[str, str]:
    """Definition by id, as results.json has it."""
    return {metric.id: metric.definition for metric in metrics}


def versions(metrics: Iterable[Metric]) -> dict[str, int]:
    """Version by id, as results.json has it."""
    return {metric.id: metric.version for metric in metrics}


def as_markdown(metrics: Iterable[Metric]) -> str:
    """The page of definitions."""
    sections = []
    for metric in metrics:
        where = (
            f"`{metric.function.__module__.removeprefix('duet.').replace('.', '/')}.py`, `{metric.function.__name__}`"
        )
        facts = f"Range: {metric.range}. Better: {metric.better}. Computed by {where}."
        sections.append(f"## {metric.id}@{metric.version}\n\n{_wrapped(metric.definition)}\n\n{_wrapped(facts)}\n")
    return PAGE + "\n".join(sections)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


PAGE = """# What the numbers mean

This page is written from the lists of metrics in the code by `make docs-metrics`: change those, not this file.

In `results.json` a score stands under `models`, model by model, as `<query set>.<id>`, with `value`, `n` and `ci95`;
`definitions` and `versions` hold what stands here for the code that made the file. A metric's full name is `id@version`:
scores of different versions do not compare.

Memorisation and TOFU's scores are made of how likely a model finds given answers, which `evaluate.likelihood: false` switches
off. Truth ratios also need wrong answers, in the field of the data that `perturbed_field` names, and take a paraphrase of the
answer where `paraphrased_field` names one. `evaluate.tofu` switches TOFU's two aggregates on:

```yaml
evaluate:
  tofu:
    { retain: retain, real_authors: real_authors, world_facts: world_facts, forget: forget, reference: runs/other/results.json }
```

The reference is a model that never saw the forget set: `results.json` of a run that evaluated it on the same forget questions,
`TOFU_EVAL.json` of open-unlearning, or with `reference_model` alone a model of the same run.

"""
