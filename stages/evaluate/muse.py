"""MUSE's KnowMem: question answering in context, as MUSE-Bench asks and scores it (Shi et al. 2024, arXiv 2407.06460, C2).

A set with `shots` is asked a second time, in MUSE's plain form whatever `prompt` says, but for its `bos`: the first
`num_shots` of them with their answers, then the question. The set's own prefix, a teacher's or none, stands in front of all.
What a model says ends where it begins the next question (`cut`). How long it may get is `evaluate.max_new_tokens`; MUSE allows
32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.stages.exam.exam import Exam, Subject, Task, references_of
from duet.stages.metrics import uncertainty
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import EvaluationSet, PromptSettings

METRIC = "muse.knowmem"
TASK = "muse.knowmem."  # with the set's name: what the model is asked
FORM = PromptSettings(format="plain", template="Question: {question}\nAnswer: ", prefix_placement="text", separator="")
ENDS = ("\n\n", "\nQuestion", "Question:")  # MUSE-Bench, metrics/knowmem.py


def load_shots(settings: EvaluationSet, where: str) -> tuple[Query, ...]:
    """The first `num_shots` of a set's shots; none where it has no `shots`. `where` is the config key that errors name."""
    if settings.shots is None:
        return ()
    found = load_queries(settings.shots, f"{where}.shots", need_answers=True)
    if len(found) < settings.num_shots:
        raise UserError(
            f"{where}.num_shots is {settings.num_shots}, {settings.shots.path} gives {len(found)}", "ask for fewer"
        )
    shots = tuple(found[: settings.num_shots])
    if several := [shot.row_id for shot in shots if shot.is_conversation]:
        raise UserError(
            f"{where}.shots: row {several[0]!r} is a conversation of several turns, and shots are lines of plain text",
            "name a file of single questions",
        )
    return shots


def tasks_of(exam: Exam, subject: Subject) -> dict[str, Task]:
    """The second questions of all sets with shots."""
    tasks = {}
    for name, query_set in exam.sets.items():
        if query_set.shots:
            prefix = subject.prefix_of(name)
            shown = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in query_set.shots)
            in_front = (prefix + exam.prompt.separator if prefix else "") + shown
            prompts = [Prompt.plain(query, in_front) for query in query_set.queries]
            tasks[TASK + name] = Task(prompts, FORM.model_copy(update={"bos": exam.prompt.bos}), cut)
    return tasks


def cut(output: str) -> str:
    """What counts of an output: all before the first sign of a next question."""
    for end in ENDS:
        output = output.partition(end)[0]
    return output


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def knowmem(answers: Sequence[str], outputs: Sequence[str]) -> np.ndarray:
    """ROUGE-L F1 per item, through rouge-score, float64 [n]; `answers` are the references, `outputs` are cut."""
    return np.array(
        [_scorer().score(answer, output)["rougeL"].fmeasure for answer, output in zip(answers, outputs, strict=True)]
    )


def scores_of(answers: Mapping[str, Sequence[str]], exam: Exam) -> dict[str, Score]:
    """`<set>.muse.knowmem` of one model, from its answers by task."""
    scores = {}
    for name, query_set in exam.sets.items():
        if query_set.shots:
            references = references_of(query_set)
            values = knowmem(references, answers[TASK + name])
            scores[f"{name}.{METRIC}"] = uncertainty.score(values, clusters=references, seed=exam.settings.seed)
    return scores


def floors_of(exam: Exam) -> dict[str, dict[str, float]]:
    """What a constant refusal and an echo of the question score."""
    found = {}
    for name, query_set in exam.sets.items():
        if query_set.shots:
            references = references_of(query_set)
            outputs = {
                "refusal": [exam.settings.refusal] * len(references),
                "echo": [query.question for query in query_set.queries],
            }
            found[f"{name}.{METRIC}"] = {floor: float(knowmem(references, o).mean()) for floor, o in outputs.items()}
    return found


METRICS = (
    Metric(
        METRIC,
        knowmem,
        "MUSE's KnowMem (arXiv 2407.06460, section 3, C2): ROUGE-L F1, without stemming, of the answer to a question that "
        "stands after examples with answers. The answer ends before a blank line or the next question. 0..1 here, points in "
        "MUSE.",
    ),
)
