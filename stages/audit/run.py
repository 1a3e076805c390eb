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
from duet.stages.audit.record import Found, Ranked, Search, VerdictRecord
from duet.stages.evaluate.answers import refusals_of, session_of
from duet.stages.evaluate.definitions import all_metrics, definitions
from duet.stages.exam.exam import HEADLINE, Exam, Subject, references_of, split_by_answer
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
        sets[name] = replace(query_set, queries=[query_set.queries[i] for i in drawn])
    return replace(exam, sets=sets, settings=exam.settings.model_copy(update={"attacks": (), "dtype": dtype}))


@dataclass(frozen=True)
class Asked:
    """What the base model said behind the prefixes so far, and the keys of verdicts on it, by candidate."""

    said: Mapping[str, Said]
    keys: Mapping[str, str]


def run_audit(plan: Audit, answers_dir: Path, watch: Watch) -> tuple[Found, dict[str, VerdictRecord]]:
    """Ask, judge and rank; the parts of audit.json that come from answers, and the verdicts on all questions by their keys.
    With a search, ranks are those of one part of the questions and every other number is of the other part.

    Raises Interrupted when `watch` stops it; what is on disk from the same model, prefix, questions and settings is not
    asked again.
    """
    everything = _everything(plan.exam)
    choosing, held_out = split(plan.exam, plan.settings) if plan.search else (everything, everything)
    asked = _ask_all(plan, plan.candidates, answers_dir, watch, Asked({}, {}), (choosing, held_out))
    if not plan.search:
        judged = [_judged(plan, asked, candidate, everything, everything) for candidate in plan.candidates]
        return _found(plan, asked, judged, everything, None), _verdicts(judged)
    parents = _best([c for c in plan.candidates if c.kind != "control"], asked.said, plan, choosing)
    made = variations(parents, plan.candidates, plan.search, plan.exam.topic, plan.settings.seed)
    asked = _ask_all(plan, made, answers_dir, watch, asked)
    judged = [_judged(plan, asked, candidate, choosing, held_out) for candidate in (*plan.candidates, *made)]
    counts = {"choosing": choosing, "held_out": held_out}
    search: Search = {
        "wanted": plan.search,
        "made": len(made),
        "parents": [parent.name for parent in parents],
        "n": {part: {name: len(rows) for name, rows in of_set.items()} for part, of_set in counts.items()},
    }
    return _found(plan, asked, judged, held_out, search), _verdicts(judged)


def _ask_all(
    plan: Audit,
    candidates: Sequence[Candidate],
    answers_dir: Path,
    watch: Watch,
    before: Asked,
    parts: Sequence[Part] = (),
) -> Asked:
    """`before` with these candidates, asked with one engine; each is on disk as soon as it is through.

    A base model that knows nothing of one of these `parts` is refused before any prefix is tried on it.
    """
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
            said[subject.name] = found = Said(kept["by_set"], np.array(first["ids"]), np.array(first["logits"]))
            for part in parts if subject.name == NO_PREFIX else ():
                judge(found, found, plan.exam, plan.settings, part, only_shares=True)
    finally:
        session.close()
    return Asked(said, {**before.keys, **_keys(plan, session, subjects)})


def _ask(session: ModelSession, subject: Subject, top_k: int, watch: Watch) -> dict[str, Any]:
    """One subject's answers to all sets and its first position, as JSON."""
    ids_NK, logits_NK = session.first_top_k(subject, FIRST_OF, top_k, watch)  # may refuse top_k, so it comes first
    return {"by_set": session.ask(subject, watch), "first": {"ids": ids_NK.tolist(), "logits": logits_NK.tolist()}}


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


@dataclass(frozen=True)
class Judged:
    """One candidate with its judgements."""

    candidate: Candidate
    key: str  # of its verdict
    found: Judgement  # on the questions that are shown
    overall: Judgement  # on all questions
    chosen_on: Judgement  # on the questions that it is ranked by

    def as_json(self, rank: int) -> Ranked:
        return {
            "rank": rank,
            "name": self.candidate.name,
            "kind": self.candidate.kind,
            "prefix": self.candidate.prefix,
            "template": self.candidate.template,
            "ranked_by": self.chosen_on.score,
            "score": self.found.score,
            "verdict": self.found.verdict,
            "reason": self.found.reason,
            "verdict_on_all": self.overall.verdict,
            "scores": {name: score.as_json() for name, score in self.found.scores.items()},
            "key": self.key,
        }


def _judged(plan: Audit, asked: Asked, candidate: Candidate, choosing: Part, shown: Part) -> Judged:
    said, base = asked.said[candidate.name], asked.said[NO_PREFIX]
    key, found = asked.keys[candidate.name], judge(said, base, plan.exam, plan.settings, shown)
    if choosing == shown:
        return Judged(candidate, key, found, found, found)
    overall, chosen_on = (
        judge(said, base, plan.exam, plan.settings, part, only_shares=True)
        for part in (_everything(plan.exam), choosing)
    )
    return Judged(candidate, key, found, overall, chosen_on)


def _found(plan: Audit, asked: Asked, judged: Sequence[Judged], shown: Part, search: Search | None) -> Found:
    """Candidates by their score on the questions that rank, with all numbers on those that are shown."""
    ranked = sorted(judged, key=lambda one: -one.chosen_on.score)  # stable: equals stay in the order of the candidates
    return {
        "sets": {name: {"n": len(shown[name]), "expect": s.expect} for name, s in plan.exam.sets.items()},
        "candidates": [one.as_json(rank) for rank, one in enumerate(ranked, start=1)],
        "refusals": refusals_of(plan.exam, {name: said.answers for name, said in asked.said.items()}),
        "definitions": DEFINITIONS
        | definitions(m for m in all_metrics() if m.id in (HEADLINE, "refusal_rate", "ci95")),
        "search": search,
    }


def _verdicts(judged: Sequence[Judged]) -> dict[str, VerdictRecord]:
    """The verdicts on all questions, by their keys."""
    return {
        one.key: {"prefix": one.candidate.prefix, "verdict": one.overall.verdict, "reason": one.overall.reason}
        for one in judged
    }


def _best(candidates: Sequence[Candidate], said: Mapping[str, Said], plan: Audit, part: Part) -> list[Candidate]:
    """The candidates that a search varies, best first."""

    def score(candidate: Candidate) -> float:
        return judge(said[candidate.name], said[NO_PREFIX], plan.exam, plan.settings, part, only_shares=True).score

    return sorted(candidates, key=score, reverse=True)[: plan.settings.parents]
