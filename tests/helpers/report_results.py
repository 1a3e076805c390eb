"""A made-up results.json with every optional part, its numbers all different, for tests of the report. Nothing is measured."""

from __future__ import annotations

import itertools
from typing import Any

from duet.pipeline.pages.students import FinishedStudent
from duet.stages.student.summary import TeacherShare, TrainingSummary

HOSTILE = "<script>alert('x')</script> & \"quoted\""
MODELS = ("base", "teacher", "student:a", "student:b")
SHARES = (
    "forget.rougeL_recall", "forget.refusal_rate", "forget.tofu.truth_ratio/geo", "retain.rougeL_recall",
    "attack.reverse.forget.rougeL_recall", "attack.reverse_worst.forget.rougeL_recall",
    "attack.prefill.8.forget.rougeL_recall", "attack.sampling.forget.leak@16", "mia.loss.forget",
)  # fmt: skip


KEPT = (
    *("rougeL_recall", "distinctive_recall", "refusal_rate"),
    *("plain.rougeL_recall", "plain.distinctive_recall", "plain.refusal_rate"),
)


def full_results() -> dict[str, Any]:
    """Anew for each test, which may change it."""
    numbers = itertools.count(1)

    def share() -> float:
        return next(numbers) * 0.00413 % 0.97  # no two look alike in points with one decimal

    def score(n: int) -> dict[str, Any]:
        value = share()
        return {"value": value, "n": n, "ci95": [value * 0.9, value * 0.9 + 0.1]}

    def model(n: int) -> dict[str, Any]:
        scores = {key: score(n) for key in SHARES}
        value = 5 + share()
        scores |= {f"forget.{metric}": score(n) for metric in ("extraction_strength", "unlearning_depth")}
        return scores | {"retain.perplexity": {"value": value, "n": n, "ci95": [value - 1, value + 2]}}

    models = {name: model(15 + i) for i, name in enumerate(MODELS)}
    students = MODELS[2:]
    return {
        "run": "lab",
        "topic": HOSTILE,
        "created": "2026-01-21T00:00:00+00:00",
        "models": models,
        "sets": {"forget": {"expect": "forgotten", "n": 15}, "retain": {"expect": "kept", "n": 45}},
        "floors": {
            **{key: {"refusal": share(), "echo": share()} for key in ("forget.rougeL_recall", "retain.rougeL_recall")},
            "forget.extraction_strength": {"exchanged": share()},
        },
        "performance_shift": {
            name: {"value": 100 * share(), "terms": {"forget.rougeL_recall": 100 * share()}} for name in MODELS[1:]
        },
        "samples": [
            {
                "set": "forget",
                "id": str(i),
                "question": f"Question {i}? {HOSTILE}",
                "answer": "yes" if i else "the needle",
                "outputs": {"base": HOSTILE, "teacher": ""},
            }
            for i in range(12)
        ],
        "definitions": {"rougeL_recall": "a definition", "performance_shift": "a sum", "floor_echo": "another"},
        "versions": {"rougeL_recall": 3},
        "teacher_stores": {"teacher": {"top_k": 20, "fingerprint": "f" * 64, "prefix": HOSTILE}},
        "students": {name.removeprefix("student:"): _student(next(numbers)) for name in students},
        "environment": {"torch": "2.13.0"},
        "provenance": {
            "config": {"name": "lab", "train": {"lr": 0.0003, "tags": []}, "students": [{"name": "a"}, {"name": "b"}]},
            "config_sha256": "c" * 64,
            "data": {"forget": {"rows": 15, "sha256": "d" * 64}, "retain": {"rows": 45, "sha256": "e" * 64}},
            "models": {name: {"weights_sha256": str(i) * 64} for i, name in enumerate(MODELS)},
            "seeds": {"student:a": 3, "evaluate": 4},
        },
        "outcomes": {
            name: {
                "verdict": "suppressed under these tests" if name == "student:a" else "not unlearned",
                "reasons": [f"recall is what it is in {name}"],
                "measures": {"forgotten": ["forget.distinctive_recall"], "kept": ["retain.rougeL_recall"]},
                "signs": {"entropy": {"value": 1 + share(), "limit": 2 + share(), "bad": name == "base"}},
            }
            for name in MODELS
        },
        "comparisons": {
            name: {
                key: {
                    "against": "base",
                    "difference": share() - 0.5,
                    "ci95": [-share(), share()],
                    "n": 15,
                    "p": 0.01 + share() / 2,
                    "distinguishable": name == "student:a",
                }
                for key in SHARES
            }
            for name in students
        },
        "layers": {
            name: {"layers": [0, 1, 2], "rank": [300 + share(), 40 + share(), 1 + share()], "n": 15,
                   "ci95": [[200, 400], [30, 50], [1, 3]]}
            for name in MODELS
        },
        "depth": {
            "fact": "words",
            "sets": {"forget": {"n": 14, "of": 15}},
            "layers": {
                name: {"layers": [1, 2], "lost": [share(), 3 + share()], "ci95": [[-0.1, 0.2], [2.1, 4.2]], "n": 14}
                for name in (*MODELS, "control")
            },
            "left_out": {"model:other": "has 16 layers of width 64, base has 2 of width 32"},
        },
        "by_distance": {
            "sets": {"retain": 0, "far": 12},
            "kept": {name: {"retain": score(45), **({} if name == "teacher" else {"far": score(45)})} for name in MODELS[1:]},
        },
        "judge": {
            "model": HOSTILE,
            "prompt_sha256": "f" * 64,
            "answers": 917,
            "unreadable": dict(zip(MODELS, (901, 902, 903, 904), strict=True)),
            "agreement": {metric: score(917) for metric in ("rougeL_recall", "distinctive_recall", "exact_match")},
        },
        "over_seeds": {
            "student:both": {
                "models": list(students),
                "scores": {key: score(15) | {"seeds": [share(), share()]} for key in SHARES},
                "verdicts": {"damaged": 1, "unclear": 2},
            }
        },
        "relearning": {
            name: {
                "forget 5": {
                    "steps": [0, 4, 8],
                    "recall": [share(), share(), share()],
                    "ci95": [[0, 0.3], [0.2, 0.5], [0.5, 0.9]],
                    "steps_to_half": None if name == "never knew" else next(numbers),
                }
            }
            for name in (*students, "never knew")
        },
        "attacks_work": {
            "reverse": {"works": True, "on": "teacher", "text": "teacher: recall 0.1 without it, 66 with it"},
            "sampling": {"works": False, "on": "teacher", "text": "it does not undo the prefix on this model"},
        },
        "attacks_skipped": {"translation": "no query set translates one that is attacked"},
        "attack_costs": {"reverse": {"prompts": 600 + next(numbers), "answer_tokens": 38000 + next(numbers)}},
        "control": {key: score(15) for key in ("attack.reverse_worst.forget.rougeL_recall", "forget.extraction_strength")},
        "kept_under_attack": {
            name: {"reverse": {key: score(20) for key in KEPT}, "role_play": {key: score(20) for key in KEPT[:3]}}
            for name in MODELS
        },
        "attack_texts": {"reverse": {"v0": {name: share() for name in MODELS}}},
    }  # fmt: skip


def plain_results() -> dict[str, Any]:
    """What results.json held before there were verdicts, comparisons and deeper attacks."""
    results = full_results()
    for key in (
        "provenance",
        "outcomes",
        "comparisons",
        "layers",
        "depth",
        "over_seeds",
        "relearning",
        "attack_texts",
        "control",
        "kept_under_attack",
        "versions",
        "attacks_work",
        "attacks_skipped",
        "attack_costs",
    ):
        del results[key]
    return results


def _student(number: int) -> dict[str, Any]:
    return {
        "loss": "huber_raw",
        "loss_reason": "as the settings say",
        "teachers": {"teacher": {"fingerprint": "f" * 64, "weight": 1.0}},
        "combine": None,
        "stopped_early": False,
        "stall_share": 0.03,
        "trained_parameters": 500 + number,
        "steps": 3,
        "rows": 60,
        "train_s": 1.25,
        "rows_per_s": 60.5,
        "parameters": 1000 + number,
        "model": "m",
        "curve": [[1, 2.0], [2, 1.0], [3, 0.5]],
    }


PROBE = {
    "rows": 60, "held_out": False, "loss": 0.1,
    "agreement.forget": 0.75, "agreement.retain": 0.5, "refusal.forget": 1.0, "refusal.retain": 0.0,
}  # fmt: skip


def finished_student(name: str, start: str = "owner/llama", **more: Any) -> FinishedStudent:
    """A student with made-up facts, but for those in `more`."""
    entries: dict[str, Any] = {
        "name": name,
        "loss": "huber_raw",
        "loss_reason": "as the settings say",
        "teachers": {"teacher": TeacherShare("f" * 64, 1.0)},
        "combine": None,
        "head": "Llama: gathered head",
        "steps": 120,
        "stopped_early": False,
        "rows": 60,
        "train_s": 3723.4,
        "rows_per_s": 123.4,
        "tokens_per_s": 123456.7,
        "stall_share": 0.01,
        "peak_memory_gb": 61.234,
        "parameters": 3_212_749_824,
        "trained_parameters": 24_313_856,
        "processes": 1,
        "left_out": (),
        "added_ends": (),
        "curve": [[1, 18.7], [120, 0.01789]],
        "probe": PROBE,
    }
    return FinishedStudent(start, TrainingSummary(**(entries | more)))
