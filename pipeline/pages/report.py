"""report.html: one self-contained page, a pure function of results.json. Nothing is fetched; without its script it is whole.

The parts are in the files `report_*.py`, what they are made of in `page.py` and `charts.py`. What results.json lacks, the page
says in a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publishing
from duet.pipeline.pages.page import Numbers, page
from duet.pipeline.pages.report_attacks import attack_section
from duet.pipeline.pages.report_depth import SCRIPT, comparisons_section, layers_section, samples_section
from duet.pipeline.pages.report_distance import distance_section
from duet.pipeline.pages.report_facts import definitions_section, limits_section, run_section, training_section
from duet.pipeline.pages.report_inside import inside_section
from duet.pipeline.pages.report_judge import judge_section
from duet.pipeline.pages.report_relearning import relearning_section
from duet.pipeline.pages.report_scores import all_scores, main_table, summary, trade_off, verdict_section
from duet.pipeline.pages.report_seeds import seeds_section

SECTIONS = (
    verdict_section,
    main_table,
    seeds_section,
    trade_off,
    attack_section,
    layers_section,
    inside_section,
    relearning_section,
    distance_section,
    judge_section,
    comparisons_section,
    samples_section,
    all_scores,
    training_section,
    run_section,
    limits_section,
    definitions_section,
)


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Render and publish the page."""
    with publishing(path) as temporary:
        temporary.write_text(render(results), encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    numbers = Numbers(results)
    verdict, *rest = (make(numbers) for make in SECTIONS)
    heads = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', "".join(rest))
    contents = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title in heads)
    body = f'{verdict}<p class="lead">{summary(numbers)}</p><nav aria-label="Contents"><ul>{contents}</ul></nav>{"".join(rest)}'
    meta = f"Run {results['run']}, {results['created']}"
    return page(f"Forgetting {results['topic']}", meta, body, SCRIPT)


def rendered(results: Any, name: str) -> str:
    """The page of results that may come from anywhere; such as no report can be made of are a UserError."""
    try:
        return render(results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{name} holds no results that a report can be made of: {type(error).__name__} {error}",
            "write it again with `duet evaluate`",
        ) from error
