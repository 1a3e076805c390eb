"""Scores of lm-evaluation-harness (EleutherAI), through its Python API: tasks that others use, as they use them.

The harness renders prompts, chooses few-shot examples and scores by its own rules; of the run it gets the model, the unlearning
prefix as its system instruction (a teacher's), and whether there is a chat template to apply. It reads its data from the
Hugging Face hub, or as the task files in `evaluate.lm_eval_dir` say. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject, by_directory, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.exam.reading import Reader
from duet.stages.metrics.metric import Metric
from duet.stages.settings.evaluate import HarnessTask

WIDTH = 1.96  # standard errors of a normal distribution on either side of its mean that hold 95 % of it


def lm_eval(result: Mapping[str, Any], task: str, num_fewshot: int) -> dict[str, dict[str, Any]]:
    """Scores of one task by `lm_eval.<task>/<n>.<metric>`, with value, n and interval.

    `result` is what `simple_evaluate` returns. A metric whose filter is not "none" has it after a slash. A group's n is that
    of all its tasks. A task inside a group has its own scores.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, scores in result["results"].items():
        count = sum(result["n-samples"][leaf]["effective"] for leaf in _leaves(result, name))
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            error = scores.get(f"{metric}_stderr,{chosen}")
            if not chosen or metric.endswith("_stderr") or not isinstance(error, float):
                continue  # not a score, or one without a standard error to make an interval of
            if not (math.isfinite(value) and math.isfinite(error)):
                continue  # of weights that have diverged
            ending = metric if chosen == "none" else f"{metric}/{chosen}"
            ci95 = [value - WIDTH * error, value + WIDTH * error]
            found[f"lm_eval.{name}/{num_fewshot}.{ending}"] = {"value": value, "n": count, "ci95": ci95}
    if not found:
        raise UserError(
            f"evaluate.lm_eval: task {task} has no score with a standard error", "take another task, or leave it out"
        )
    return found


METRICS = (
    Metric(
        "lm_eval",
        lm_eval,
        "Score of a task of lm-evaluation-harness, by the harness's own rules; `lm_eval.<task>/<n>.<metric>` is with n "
        "few-shot examples. The interval is the harness's standard error times 1.96 on either side.",
        better="see the task",
        range="that of the task's metric",
    ),
)


def ask_harness(
    subjects: Sequence[Subject],
    exam: Exam,
    folder: Path,
    watch: Watch,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By subject and metric id, the scores of `evaluate.lm_eval`; kept in `folder` under what decides them.

    Raises Interrupted when `watch` stops it between two tasks; the subjects before are kept.
    """
    tasks, version = exam.settings.lm_eval, _version()
    found = {}
    for model_dir, of_directory in by_directory(subjects).items():
        reader = Reader(model_dir, exam)
        for subject in of_directory:
            identity = [
                *reader.hashes, subject.prefix, reader.renderer.provenance,
                [task.model_dump() for task in tasks], _task_files(exam), version, exam.settings.dtype, exam.device,
            ]  # fmt: skip
            found[subject.name] = recalled(
                folder / f"{stem_of(subject.name)}.json",
                sha256_json(identity),
                functools.partial(_ask, reader, subject, watch),
            )
    return {subject.name: found[subject.name] for subject in subjects}


def _ask(reader: Reader, subject: Subject, watch: Watch) -> dict[str, dict[str, Any]]:
    """The scores of one subject on all tasks, by metric id."""
    exam, renderer = reader.exam, reader.renderer
    wrapped = _part("models.huggingface").HFLM(
        pretrained=reader.model, tokenizer=renderer.tokenizer, batch_size=exam.settings.batch_size,
        chat_template_args=renderer.chat.arguments if renderer.chat else None,
    )  # fmt: skip
    tasks, found = exam.settings.lm_eval, {}
    for number, task in enumerate(tasks):
        watch.pause(f"{subject.name}, lm-evaluation-harness,")
        found |= lm_eval(_evaluated(wrapped, task, exam, renderer.system(subject.prefix)), task.task, task.num_fewshot)
        watch.on_progress(f"{subject.name}: lm-evaluation-harness", number + 1, len(tasks))
    return found


def _evaluated(wrapped: Any, task: HarnessTask, exam: Exam, system: str) -> Mapping[str, Any]:
    manager = _tasks(exam.settings.lm_eval_dir)
    if task.task not in manager.all_tasks:
        raise UserError(
            f"evaluate.lm_eval: no task {task.task!r}",
            "`lm-eval ls tasks` lists them; your own go into evaluate.lm_eval_dir",
        )
    try:
        result = _part("evaluator").simple_evaluate(
            model=wrapped, tasks=[task.task], num_fewshot=task.num_fewshot, limit=task.limit, log_samples=False,
            bootstrap_iters=1000, task_manager=manager, system_instruction=system or None,
            apply_chat_template=exam.prompt.format == "chat",
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"evaluate.lm_eval: task {task.task} cannot get its data: {str(error).splitlines()[0]}",
            "the harness reads from the Hugging Face hub: check that it can be reached, or name a task with local files",
        ) from None
    assert result is not None  # it is, in the first process of a launch, and stage three has no other
    return result


@functools.cache
def _tasks(folder: str | None) -> Any:
    """All tasks that there are; the harness reads thousands of files for it."""
    return _part("tasks").TaskManager(include_path=folder)


def _version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "evaluate.lm_eval needs lm-evaluation-harness, which is not installed",
            "pip install 'duet-unlearn[lm-eval]'",
        ) from None


def _part(name: str) -> Any:
    """A module of the harness, whose decorators hide its types."""
    return importlib.import_module(f"lm_eval.{name}")


def _task_files(exam: Exam) -> dict[str, str]:
    """The texts of the user's own task files, which decide what is asked; where they lie does not change a result."""
    if exam.settings.lm_eval_dir is None:
        return {}
    folder = Path(exam.settings.lm_eval_dir)
    if not folder.is_dir():
        raise UserError(f"evaluate.lm_eval_dir: no such folder: {folder}", "name a folder with task files (.yaml)")
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.yaml"))}


def _leaves(result: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, whatever its depth; of a task, itself."""
    inside = result.get("group_subtasks", {}).get(name) or []
    return [leaf for one in inside for leaf in _leaves(result, one)] if inside else [name]
