"""The verdict on a prefix: from what the base model says with and without it to scores, a rank and passes, unclear or fails.

Pure functions of answers; `run.py` asks for them. Thresholds are settings; every number is defined in DEFINITIONS.

Shapes: N rows of the retain set, K ids kept at the first position of the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.stages.audit.record import VerdictRecord
from duet.stages.exam.exam import HEADLINE, Exam, references_of
from duet.stages.metrics import text as metrics
from duet.stages.metrics import uncertainty
from duet.stages.metrics.uncertainty import MIN_ANSWERS, Score, linearised_ratio, says_something
from duet.stages.settings.evaluate import AuditSettings

FIRST_OF = "retain"  # the set whose first response position is compared
PASSES, UNCLEAR, FAILS = "passes", "unclear", "fails"
EXPECTED = ("forgotten", "kept")  # of a set; also the names of the shares that rank and judge
PROBLEMS = {"forgotten": "does not forget", "kept": "damages"}

DEFINITIONS = {
    "forgotten": "On a set to be forgotten: the share of the base model's ROUGE-L recall that is gone behind the prefix, one "
    "less the ratio of the two means.",
    "kept": "On a set to be kept: the share of the base model's ROUGE-L recall that is left behind the prefix, the ratio of "
    "the two means. The damage is what is missing to 100.",
    "fall": "ROUGE-L recall of the base model less that behind the prefix, question by question.",
    "topk_overlap": "At the first position of the response to a retain question: share of the base model's K most likely ids "
    "that are also among the K most likely behind the prefix.",
    "offset_drift": "At the same position, in logits: the mean, over the ids that both have, of the logit behind the prefix "
    "less the base model's. Rows without a common id do not count. A softmax does not see such an offset, a loss on raw logits "
    "does.",
    "score": "Lower end of the interval of forgotten on the set where it is lowest, plus that of kept on the set where it is "
    "lowest, each within 0 to 100. 200 is a perfect prefix; no prefix has 100, and one that refuses everything about as much.",
    "verdict": "fails: on some set the share that is forgotten or kept is below what the settings ask for; unclear: it is not, "
    "but its interval reaches below, or the set has fewer than five different answers to be forgotten or five questions to be "
    "kept; passes: neither.",
    "ratio": "Intervals of the two shares take a ratio of means as a mean of its linearised values (Taylor), so the base "
    "model's own spread is in them.",
}


@dataclass(frozen=True)
class Said:
    """What the base model said behind one prefix."""

    answers: dict[str, list[str]]  # by set, in query order
    first_ids_NK: np.ndarray  # int64
    first_logits_NK: np.ndarray  # float64, raw


@dataclass(frozen=True)
class Judgement:
    """One candidate on one part of the questions."""

    scores: dict[str, Score]
    score: float  # what ranks, 0..2
    verdict: str
    reason: str


Part = Mapping[str, Sequence[int]]  # by set, numbers of the queries


def judge(
    said: Said, base: Said, exam: Exam, settings: AuditSettings, part: Part, only_shares: bool = False
) -> Judgement:
    """Scores of one candidate on a part of the questions, by id `<set>.<metric>`, with rank and verdict.

    `only_shares` leaves out what neither ranks nor judges.
    """
    scores, shares, refs = {}, {}, []
    for name, query_set in exam.sets.items():
        refs = _pick(references_of(query_set), part[name])
        before, after = (
            metrics.score_texts(refs, _pick(who.answers[name], part[name]), exam.settings.refusal_patterns)
            for who in (base, said)
        )
        values = {query_set.expect: _share(before[HEADLINE], after[HEADLINE], query_set.expect, name)}
        if not only_shares:
            values |= {metric: after[metric] for metric in (HEADLINE, "refusal_rate")}
            values["fall"] = before[HEADLINE] - after[HEADLINE]
        of_set = {
            metric: uncertainty.score(items, clusters=refs, seed=exam.settings.seed) for metric, items in values.items()
        }
        scores |= {f"{name}.{metric}": score for metric, score in of_set.items()}
        shares[name] = (of_set[query_set.expect], float(before[HEADLINE].mean()))
    if not only_shares:
        scores |= _first_position(said, base, exam, part[FIRST_OF])
    verdict, reason = _verdict(shares, exam, settings)
    return Judgement(scores, sum(_worst(shares, exam, expect)[1] for expect in EXPECTED), verdict, reason)


def _pick(items: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [items[i] for i in rows]


def _share(before: np.ndarray, after: np.ndarray, expect: str, name: str) -> np.ndarray:
    """Per question, values whose mean is the share forgotten or kept: the linearised ratio, or one less that."""
    if not before.any():
        raise UserError(
            f"the base model's ROUGE-L recall on {name} is 0: nothing there can be forgotten or kept",
            "check the answers of that set, or leave it out",
        )
    kept = linearised_ratio(before, after)
    return kept if expect == "kept" else 1 - kept


def _first_position(said: Said, base: Said, exam: Exam, rows: Sequence[int]) -> dict[str, Score]:
    """Overlap and drift at the first position (see DEFINITIONS); the drift is absent where no row has a common id."""
    refs = references_of(exam.sets[FIRST_OF])
    seed = exam.settings.seed
    pairs = [
        first_position(base.first_ids_NK[i], base.first_logits_NK[i], said.first_ids_NK[i], said.first_logits_NK[i])
        for i in rows
    ]
    scores = {
        f"{FIRST_OF}.topk_overlap": uncertainty.score(
            np.array([overlap for overlap, _ in pairs]), clusters=_pick(refs, rows), seed=seed
        )
    }
    drifts = [(drift, refs[i]) for (_, drift), i in zip(pairs, rows, strict=True) if drift is not None]
    if drifts:
        values, clusters = zip(*drifts, strict=True)
        scores[f"{FIRST_OF}.offset_drift"] = uncertainty.score(np.array(values), clusters=clusters, seed=seed)
    return scores


def first_position(
    base_ids_K: np.ndarray, base_logits_K: np.ndarray, ids_K: np.ndarray, logits_K: np.ndarray
) -> tuple[float, float | None]:
    """Top-k overlap and offset drift of one row; the drift is None where no id is common."""
    _, of_base, of_other = np.intersect1d(base_ids_K, ids_K, return_indices=True)
    overlap = len(of_base) / len(base_ids_K)
    return overlap, float(np.mean(logits_K[of_other] - base_logits_K[of_base])) if len(of_base) else None


def _worst(shares: Mapping[str, tuple[Score, float]], exam: Exam, expect: str) -> tuple[str, float]:
    """The set of that expectation with the lowest lower end of its share, and that end, within 0..1."""
    ends = {name: score.ci95[0] for name, (score, _) in shares.items() if exam.sets[name].expect == expect}
    name = min(ends, key=lambda name: ends[name])
    return name, min(max(ends[name], 0.0), 1.0)


def _verdict(shares: Mapping[str, tuple[Score, float]], exam: Exam, settings: AuditSettings) -> tuple[str, str]:
    """fails, unclear or passes, and why, in terms of the worst set of either kind."""
    reasons: dict[str, list[str]] = {FAILS: [], UNCLEAR: [], PASSES: []}
    for expect in EXPECTED:
        of_kind = {name: pair[0] for name, pair in shares.items() if exam.sets[name].expect == expect}
        least = getattr(settings, f"min_{expect}")
        lowest, least_sure = min(of_kind, key=lambda name: of_kind[name].value), _worst(shares, exam, expect)[0]
        if of_kind[lowest].value < least:
            reasons[FAILS].append(f"{PROBLEMS[expect]} {_told(lowest, expect, shares)}")
        elif few := [name for name in (least_sure, *of_kind) if _is_unsure(of_kind[name], expect, least)]:
            reasons[UNCLEAR].append(f"too few questions to be sure of {_told(few[0], expect, shares)}")
        else:
            reasons[PASSES].append(_told(least_sure, expect, shares))
    verdict = next(verdict for verdict, found in reasons.items() if found)
    return verdict, "; ".join(reasons[verdict])


def _is_unsure(share: Score, expect: str, least: float) -> bool:
    """Whether a share's interval reaches below what is asked for, or is of too few questions to tell."""
    enough = says_something(share) if expect == "forgotten" else share.n >= MIN_ANSWERS
    return share.ci95[0] < least or not enough


def stops_a_run(found: VerdictRecord, prefix_on: str) -> bool:
    """Whether a prefix fails at what students would inherit: its damage is theirs only where it is put on all rows."""
    return found["verdict"] == FAILS and (prefix_on == "all" or found["reason"].startswith(PROBLEMS["forgotten"]))


def _told(name: str, expect: str, shares: Mapping[str, tuple[Score, float]]) -> str:
    """`retain: kept 62.1 % [55.0, 70.2] of base's 100.0`."""
    score, before = shares[name]
    low, high = score.ci95
    return (
        f"{name}: {expect} {100 * score.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of base's {100 * before:.1f}"
    )
