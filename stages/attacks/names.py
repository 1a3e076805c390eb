"""How attacks are named: the tasks whose answers are kept, the scores in results.json, and the model that is the control."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

CONTROL = "control"  # the name of the model that never knew
NO_ATTACK = "no attack"
WORST = "_worst"  # what the kind ends with in the id of a score of the worst variants


def task(kind: str, variant: str, name: str) -> str:
    """The name under which the answers to one variant on one query set are kept."""
    return f"attack.{kind}.{variant}.{name}"


def kept_as(kind: str) -> str:
    """The name, beside those of attacks, of the questions to be kept that are asked behind the texts of an attack."""
    return f"kept_{kind}"


def title(variant: str, name: str) -> str:
    """What a variant on a set is called in results.json: the forget set is not named."""
    return variant if name == "forget" else f"{variant}, {name}"


@dataclass(frozen=True)
class Attacked:
    """A metric id of an attack in its parts: `attack.<kind>[_worst].<set>.<metric>`."""

    id: str
    kind: str
    worst: bool
    set: str
    metric: str


def attacked_of(metric_id: str, sets: Collection[str]) -> Attacked | None:
    """The parts of a metric id, None if it is not of an attack on one of these sets; each part may contain dots."""
    rest = metric_id.removeprefix("attack.")
    name = next((name for name in sorted(sets, key=len, reverse=True) if f".{name}." in rest), None)
    if rest == metric_id or name is None:
        return None
    kind, _, metric = rest.partition(f".{name}.")
    return Attacked(metric_id, kind.removesuffix(WORST), kind.endswith(WORST), name, metric)
