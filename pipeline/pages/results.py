"""Reading results.json for the report: which models, sets, metrics and attacks it holds, whatever else is in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duet.pipeline.pages.charts import colours
from duet.pipeline.pages.page import Numbers
from duet.stages.attacks.names import CONTROL, Attacked, attacked_of
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE

if TYPE_CHECKING:
    from duet.stages.metrics.uncertainty import ScoreRecord

NOT_SHARES = ("perplexity",)  # metrics that are not 0..1 whatever their values happen to be


def models_of(numbers: Numbers) -> Mapping[str, Mapping[str, ScoreRecord]]:
    """Each model's scores by metric id."""
    return numbers.data["models"]


def students_of(numbers: Numbers) -> list[str]:
    """The models that are students."""
    return [name for name in models_of(numbers) if name.startswith("student:")]


def by_interest(numbers: Numbers) -> list[str]:
    """The names of the models: students, teachers, then bases."""
    order = ("student", "teacher", "base")
    kind = {name: name.split(":")[0] for name in models_of(numbers)}
    return sorted(kind, key=lambda name: order.index(kind[name]) if kind[name] in order else len(order))


def base_of(numbers: Numbers, model: str) -> str:
    """The model that a student or teacher started from, as `results.json` calls it."""
    own = f"base:{model.partition(':')[2]}"
    return own if own in models_of(numbers) else "base"


def trained_on(numbers: Numbers, model: str) -> Sequence[str]:
    """The attacks of whose kind a model saw texts in training, which do not speak for it."""
    return seen_by_models(numbers.data).get(model, [])


def seen_by_models(results: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The same of all models that saw some."""
    students = {f"student:{name}": facts.get("trained_on") for name, facts in (results.get("students") or {}).items()}
    return {model: seen for model, seen in (students | results.get("trained_on", {})).items() if seen}


def floor_of(numbers: Numbers, metric_id: str) -> float | None:
    """The higher of the two floors of a score."""
    return max((numbers.at("floors", metric_id) or {}).values(), default=None)


def is_share(numbers: Numbers, metric_id: str) -> bool:
    """Whether a metric is shown in points: 0..1 by its nature, and in every model."""
    scores = [scores[metric_id] for scores in models_of(numbers).values() if metric_id in scores]
    values = [value for score in scores for value in (score["value"], *score["ci95"])]
    return metric_id.rsplit(".", 1)[-1] not in NOT_SHARES and all(0 <= value <= 1 for value in values)


def metric_ids(numbers: Numbers) -> list[str]:
    """Those of all models, in the file's order."""
    return list(dict.fromkeys(key for scores in models_of(numbers).values() for key in scores))


def set_and_metric(numbers: Numbers, metric_id: str) -> tuple[str, str]:
    """`forget.tofu.probability` as `forget` and `tofu.probability`: both may have dots."""
    for name in sorted(numbers.data["sets"], key=len, reverse=True):
        before, found, metric = metric_id.partition(f"{name}.")
        if found and (not before or (before.startswith("attack.") and before.endswith("."))):
            return before + name, metric
    head, _, metric = metric_id.rpartition(".")
    return head, metric


def attacks_of(numbers: Numbers) -> list[Attacked]:
    """All that was attacked, in the file's order."""
    found = (attacked_of(metric_id, numbers.data["sets"]) for metric_id in metric_ids(numbers))
    return [attacked for attacked in found if attacked is not None]


def label_of(attack: Attacked) -> str:
    """The name of an attack's score: its kind, and its metric where that is not the headline."""
    return attack.kind if attack.metric == HEADLINE else f"{attack.kind}, {attack.metric}"


def palette_of(numbers: Numbers, models: Collection[str]) -> dict[str, str]:
    """The page's colours of those models of the file that are among these."""
    return {model: colour for model, colour in colours(list(models_of(numbers))).items() if model in models}


def worst_attack(numbers: Numbers, model: str, name: str, but: Collection[str] = ()) -> Attacked | None:
    """The attack, of other kinds than `but`, that brings most back of a set: of its facts, where they are counted, else in
    ROUGE-L recall. CONTROL is a model as well.
    """
    scores = numbers.at("control") if model == CONTROL else models_of(numbers)[model]
    tried = [a for a in attacks_of(numbers) if a.set == name and a.kind not in but and a.id in (scores or {})]
    counted = [a for a in tried if a.metric == DISTINCTIVE] or [a for a in tried if a.metric == HEADLINE]
    return max(counted, key=lambda attack: scores[attack.id]["value"], default=None)


def worst_held_out(numbers: Numbers, model: str, name: str) -> Attacked | None:
    """The worst of the attacks on whose texts the model was not trained."""
    return worst_attack(numbers, model, name, trained_on(numbers, model))
