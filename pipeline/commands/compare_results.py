"""The content of compare.json."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from duet.pipeline.commands.compare_parts import REPORTED, Part, Work
from duet.pipeline.commands.compare_plan import as_they_are
from duet.pipeline.config.chain import set_names
from duet.pipeline.pages.chain import by_request
from duet.pipeline.run.directory import environment
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.stores import store_summary


def results_of_parts(work: Work, parts: Sequence[Part]) -> dict[str, Any]:
    """The content of compare.json."""
    from duet.stages.compare.results import results_of
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.evaluate.results import Read
    from duet.stages.exam.given_beside import read_beside
    from duet.stages.exam.reading import read_given

    config, first, plan, watch = work.config, work.plans[0], work.plans[-1], work.watch
    rows = [row for part in parts for row in part.rows]
    subjects = [subject for row in rows for subject in row.subjects]
    answers = answer_all(subjects, plan.reported, config.run.compare_answers, watch)  # all of them are there
    folder = config.run.compare_likelihoods
    given = read_given(subjects, plan.reported, folder, watch)
    beside = read_beside(subjects[0], plan.reported, folder, watch) if given else ({}, {})
    results = {
        "format_version": 2,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "compare": without_places(config.compare.model_dump(mode="json")),
        "evaluate": without_places(config.evaluate.model_dump(mode="json")),
        "train": first.train.model_dump(mode="json"),
        "start": first.start_name,
        "methods": dict(part.method for part in parts if part.method),
        "oracle": next((part.oracle for part in parts if part.oracle), None),
        "split": {
            what: {name: len(s.queries) for name, s in exam.sets.items()}
            for what, exam in (("validation", plan.validation), ("reported", plan.reported))
        },
        "against": next(iter(first.modes)),
        **results_of(plan.reported, rows, answers, next(iter(first.modes)), Read(given, {}, *beside)),
        "teacher_stores": {
            row: {name: store_summary(store.location) for name, store in mode.stores.items()}
            for row, mode in first.modes.items()
        },
        "environment": environment(),
    }
    return results | ({"chain": _chain(work, parts, results)} if config.chain else {})


def _chain(work: Work, parts: Sequence[Part], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each request, how each method was chosen, and what its models then say of the questions that are reported."""
    from duet.stages.compare.results import scores_of_sets
    from duet.stages.evaluate.answers import answer_all

    found = []
    for number, plan in enumerate(work.plans):
        called, methods, after = set_names(work.config, number), results["methods"], results
        if number < len(work.plans) - 1:
            stages = {part.method[0]: part.earlier[number] for part in parts if part.method}
            subjects = [subject for stage in stages.values() for subject in stage.row.subjects]
            exam = as_they_are(plan.reported)
            answers = answer_all(subjects, exam, plan.folder / REPORTED, work.watch)  # all of them are there
            models = scores_of_sets(exam, [stage.row for stage in stages.values()], answers)
            methods, after = (
                {name: stage.facts for name, stage in stages.items()},
                {"sets": exam.sets, "models": models},
            )
        found.append(
            {
                "request": list(called)[-1],
                "methods": {name: {key: of[key] for key in ("setting", "grid")} for name, of in methods.items()},
                "models": {name: by_request(after, name, called) for name in after["models"]},
            }
        )
    return found
