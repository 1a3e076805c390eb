"""Prefix audit: what a prefix does to the base model, before anything is trained. The teacher bounds the student.

`run_audit` asks the base model everything behind every candidate prefix (`prefixes.py`), keeps the answers on disk as the
evaluation does, and has them judged (`judge.py`) and ranked; with a search it adds variations of the best, chosen on one
part of the questions and reported on the other. `verdict_keys` ties a verdict to all that decides it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import Interrupted
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.audit.judge import DEFINITIONS, FIRST_OF, Judgement, Part, Said, judge
from duet.stages.audit.prefixes import NO_PREFIX, Candidate, variations
from duet.stages.evaluate.answers import refusals_of, session_of
from duet.stages.evaluate.definitions import all_metrics, definitions
from duet.stages.exam.exam import HEADLINE, Exam, QuerySet, Subject, references_of, split_by_answer
from duet.stages.exam.kept import recalled
from duet.stages.exam.session import ModelSession
from duet.stages.settings.evaluate import AuditSettings


@dataclass(frozen=True)
class Audit:
    """What is audited, and how."""

    candidates: list[Candidate]
    model_dir: Path
    exam: Exam  # of the audit: without attacks, its sets reduced to the rows that are asked
    top_k: int
    settings: AuditSettings
    search: int  # variations to be tried; 0 for no search


def audit_exam(exam: Exam, settings: AuditSettings, dtype: str) -> Exam:
    """The evaluation's exam as the audit asks it: in the teacher's dtype, no attacks, at most `rows` queries of each set."""
    rng = np.random.default_rng(settings.seed)
    sets = {}
    for name, query_set in exam.sets.items():
        count = len(query_set.queries)
        drawn = sorted(rng.choice(count, min(settings.rows, count), replace=False).tolist())
        sets[name] = QuerySet([query_set.queries[i] for i in drawn], query_set.expect)
    return replace(exam, sets=sets, settings=exam.settings.model_copy(update={"attacks": (), "dtype": dtype}))


@dataclass(frozen=True)
class Asked:
    """What the base model said behind the prefixes so far, and the keys of verdicts on it, by candidate."""

    said: Mapping[str, Said]
    keys: Mapping[str, str]


def run_audit(plan: Audit, answers_dir: Path, watch: Watch) -> dict[str, Any]:
    """Ask, judge and rank; the parts of audit.json that come from answers. With a search, ranks are those of one part of the
    questions and every other number is of the other part.

    Raises Interrupted when `watch` stops it; what is on disk from the same model, prefix, questions and settings is not
    asked again.
    """
    asked = _ask_all(plan, plan.candidates, answers_dir, watch, Asked({}, {}))
    if not plan.search:
        everything = _everything(plan.exam)
        return _results(plan, asked, plan.candidates, everything, everything) | {"search": None}
    choosing, held_out = split(plan.exam, plan.settings)
    parents = _best([c for c in plan.candidates if c.kind != "control"], asked.said, plan, choosing)
    made = variations(parents, plan.candidates, plan.search, plan.exam.topic, plan.settings.seed)
    asked = _ask_all(plan, made, answers_dir, watch, asked)
    results = _results(plan, asked, [*plan.candidates, *made], choosing, held_out)
    counts = {"choosing": choosing, "held_out": held_out}
    return results | {
        "search": {
            "wanted": plan.search,
            "made": len(made),
            "parents": [parent.name for parent in parents],
            "n": {part: {name: len(rows) for name, rows in of_set.items()} for part, of_set in counts.items()},
        }
    }


def _ask_all(plan: Audit, candidates: Sequence[Candidate], answers_dir: Path, watch: Watch, before: Asked) -> Asked:
    """`before` with these candidates, asked with one engine; each is on disk as soon as it is through."""
    subjects = _subjects(plan, candidates)
    session = session_of(plan.model_dir, plan.exam, subjects)
    said = dict(before.said)
    try:
        for subject in subjects:
            if watch.should_stop():
                raise Interrupted(f"{len(said)} prefixes are through, {subject.name!r} is next")
            identity = sha256_json([session.identity(subject), FIRST_OF, plan.top_k])
            path = answers_dir / f"{identity[:16]}.json"
            kept = recalled(path, identity, functools.partial(_ask, session, subject, plan.top_k, watch))
            first = kept["first"]
            said[subject.name] = Said(kept["by_set"], np.array(first["ids"]), np.array(first["logits"]))
    finally:
        session.close()
    return Asked(said, {**before.keys, **_keys(plan, session, subjects)})


def _ask(session: ModelSession, subject: Subject, top_k: int, watch: Watch) -> dict[str, Any]:
    """One subject's answers to all sets and its first position, as JSON."""
    answers = session.ask(subject, watch)
    ids_NK, logits_NK = session.first_top_k(subject, FIRST_OF, top_k, watch)
    return {"by_set": answers, "first": {"ids": ids_NK.tolist(), "logits": logits_NK.tolist()}}


def _everything(exam: Exam) -> Part:
    """All queries of every set, by number."""
    return {name: range(len(query_set.queries)) for name, query_set in exam.sets.items()}


def _subjects(plan: Audit, candidates: Sequence[Candidate]) -> list[Subject]:
    return [Subject(candidate.name, plan.model_dir, candidate.prefix, NO_PREFIX) for candidate in candidates]


def verdict_keys(plan: Audit) -> dict[str, str]:
    """By candidate, the hash of what decides its verdict: weights, tokenizer, prefix, prompts, references and thresholds.

    Device and engine are not in it: they only round otherwise. Needs no engine.
    """
    subjects = _subjects(plan, plan.candidates)
    return _keys(plan, session_of(plan.model_dir, plan.exam, subjects), subjects)


def _keys(plan: Audit, session: ModelSession, subjects: Sequence[Subject]) -> dict[str, str]:
    sets = [[name, s.expect, references_of(s)] for name, s in plan.exam.sets.items()]
    thresholds = plan.settings.model_dump(include={"min_forgotten", "min_kept"})
    common = [sets, thresholds, plan.exam.settings.seed]
    return {subject.name: sha256_json([session.identity(subject, anywhere=True), common]) for subject in subjects}


def split(exam: Exam, settings: AuditSettings) -> tuple[Part, Part]:
    """Numbers of the queries to choose on, and of those held out, by set."""
    hint = "ask more (audit.rows), move audit.choosing_share towards 0.5, or audit without --search"
    return split_by_answer(exam, settings.choosing_share, settings.seed, "--search", hint)


def _results(plan: Audit, asked: Asked, candidates: list[Candidate], choosing: Part, shown: Part) -> dict[str, Any]:
    """Candidates by their score on the one part, with all numbers on the other, and the verdict on all questions by key."""
    verdicts: dict[str, dict[str, str]] = {}
    rows = []
    for candidate in candidates:
        found, overall, chosen_on = _judged(plan, asked, candidate, choosing, shown)
        key = asked.keys[candidate.name]
        verdicts[key] = {"prefix": candidate.prefix, "verdict": overall.verdict, "reason": overall.reason}
        rows.append(
            {
                "name": candidate.name,
                "kind": candidate.kind,
                "prefix": candidate.prefix,
                "template": candidate.template,
                "ranked_by": chosen_on.score,
                "score": found.score,
                "verdict": found.verdict,
                "reason": found.reason,
                "verdict_on_all": overall.verdict,
                "scores": {name: score.as_json() for name, score in found.scores.items()},
                "key": key,
            }
        )
    ranked = sorted(rows, key=lambda row: -row["ranked_by"])  # stable: equals stay in the order of the candidates
    return {
        "sets": {name: {"n": len(shown[name]), "expect": s.expect} for name, s in plan.exam.sets.items()},
        "candidates": [{"rank": rank, **row} for rank, row in enumerate(ranked, start=1)],
        "verdicts": verdicts,
        "refusals": refusals_of(plan.exam, {name: said.answers for name, said in asked.said.items()}),
        "definitions": DEFINITIONS
        | definitions(m for m in all_metrics() if m.id in (HEADLINE, "refusal_rate", "ci95")),
    }


def _judged(plan: Audit, asked: Asked, candidate: Candidate, choosing: Part, shown: Part) -> tuple[Judgement, ...]:
    """Judgements of a candidate on the part that is shown, on all questions, and on the part that it is ranked by."""
    said, base = asked.said[candidate.name], asked.said[NO_PREFIX]
    found = judge(said, base, plan.exam, plan.settings, shown)
    if choosing == shown:
        return found, found, found
    parts = (_everything(plan.exam), choosing)
    return found, *(judge(said, base, plan.exam, plan.settings, part, only_shares=True) for part in parts)


def _best(candidates: Sequence[Candidate], said: Mapping[str, Said], plan: Audit, part: Part) -> list[Candidate]:
    """The candidates that a search varies, best first."""

    def score(candidate: Candidate) -> float:
        return judge(said[candidate.name], said[NO_PREFIX], plan.exam, plan.settings, part, only_shares=True).score

    return sorted(candidates, key=score, reverse=True)[: plan.settings.parents]
