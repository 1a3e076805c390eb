"""audit.json and verdicts.json as the audit writes them and the pages read them."""

from __future__ import annotations

from typing import Any, TypedDict

from duet.stages.metrics.uncertainty import ScoreRecord


class SetRecord(TypedDict):
    """One query set."""

    n: int  # queries that the numbers shown are of
    expect: str  # "forgotten" or "kept"


class Ranked(TypedDict):
    """One candidate."""

    rank: int  # from 1
    name: str
    kind: str
    prefix: str
    template: str
    ranked_by: float  # the score on the questions that the rank comes from; without a search, `score`
    score: float
    verdict: str
    reason: str
    verdict_on_all: str  # on all questions, the choosing ones among them
    scores: dict[str, ScoreRecord]  # by `<set>.<metric>`
    key: str  # of its verdict in verdicts.json


class Search(TypedDict):
    """What a search tried."""

    wanted: int
    made: int
    parents: list[str]
    n: dict[str, dict[str, int]]  # queries by part ("choosing" or "held_out") and set


class Found(TypedDict):
    """The parts of audit.json that come from answers."""

    sets: dict[str, SetRecord]
    candidates: list[Ranked]  # best first
    refusals: dict[str, Any]
    definitions: dict[str, str]
    search: Search | None


class AuditRecord(Found):
    """All of audit.json."""

    format_version: int
    run: str
    topic: str
    created: str
    audit: dict[str, Any]  # settings
    evaluate: dict[str, Any]  # settings
    top_k: int
    environment: dict[str, Any]


class VerdictRecord(TypedDict):
    """One entry of verdicts.json, by the hash of all that decides it."""

    prefix: str
    verdict: str
    reason: str
