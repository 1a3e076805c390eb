"""The unlearning depth score on the lab's models: which tokens are the fact, what is 0 and what is 1, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_SMALL, ROOT, SHARED, write_jsonl

from duet.cache.errors import Interrupted, UserError
from duet.cache.watch import Watch
from duet.stages.evaluate.depth import as_json, scores_of
from duet.stages.exam.depth import Depth, check, facts_of, read_depth
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import load_queries
from duet.stages.questions.spans import touched
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

SPANS = SHARED / "data" / "tofu_entity_spans" / "forget10_entities.jsonl"
BASE, ORACLE = ROOT / "lab/models/base", ROOT / "lab/models/oracle"
SUBJECTS = [
    Subject("base", BASE, "", "base"),
    Subject("teacher", BASE, "You have forgotten everything about Bromyx Zopira.", "base"),
    Subject("model:never knew", ORACLE, "", "base"),
    Subject("model:small", LAB_SMALL, "", "base"),
]


def exam(depth: str = "words", control: Path = ORACLE) -> Exam:
    queries = {
        name: load_queries(DataSettings(path=str(ROOT / f"lab/data/{name}.jsonl"), id_field="id"), name)
        for name in ("forget", "retain")
    }
    sets = {"forget": QuerySet(queries["forget"], "forgotten"), "retain": QuerySet(queries["retain"], "kept")}
    settings = EvaluateSettings(attacks=(), dtype="float32", depth=depth, control_model=str(control))
    return Exam(sets, "Bromyx Zopira", PromptSettings(), settings, "cpu", control=control)


def test_the_labs_base_has_depth_0_and_its_oracle_1(tmp_path):
    asked = exam()
    check(SUBJECTS, asked)
    depth = read_depth(SUBJECTS, asked, tmp_path, Watch())
    base, oracle = (
        scores_of(depth, subject, asked)["forget.unlearning_depth"] for subject in (SUBJECTS[0], SUBJECTS[2])
    )
    assert base.items.tolist() == [0.0] * base.n
    assert oracle.items == pytest.approx(np.ones(oracle.n), abs=1e-9)
    assert base.n == oracle.n >= 14  # of 15 facts that the oracle never learned
    assert depth.left_out == {
        "teacher": "its prefix is not in its weights",
        "model:small": depth.left_out["model:small"],
    }
    assert "of width" in depth.left_out["model:small"]
    assert scores_of(depth, SUBJECTS[1], asked) == {}
    found = as_json(depth, asked)
    assert found["sets"] == {"forget": {"n": 15, "of": 15}}
    assert set(found["layers"]) == {"base", "model:never knew", "control"}
    assert found["layers"]["base"]["lost"] == [0.0, 0.0, 0.0]
    assert found["layers"]["control"]["lost"] == found["layers"]["model:never knew"]["lost"]
    assert found["layers"]["control"]["lost"][-1] > 1  # nats
    first = (tmp_path / "base.depth.json").stat().st_mtime_ns
    again = read_depth(SUBJECTS, asked, tmp_path, Watch(should_stop=lambda: True))  # all is on disk
    assert (again.lost["base"]["forget"] == depth.lost["base"]["forget"]).all()
    assert (tmp_path / "base.depth.json").stat().st_mtime_ns == first
    fewer = replace(asked, sets={**asked.sets, "forget": QuerySet(asked.sets["forget"].queries[:3], "forgotten")})
    with pytest.raises(Interrupted, match="depth"):  # other questions are not what is on disk
        read_depth(SUBJECTS, fewer, tmp_path, Watch(should_stop=lambda: True))


def test_a_model_that_has_diverged_is_left_out_and_the_others_are_measured(tmp_path):
    model = load_model(BASE, "float32")
    with torch.no_grad():
        next(model.model.layers[0].parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(BASE).save_pretrained(tmp_path / "model")
    asked = exam()
    asked = replace(asked, sets={"forget": QuerySet(asked.sets["forget"].queries[:3], "forgotten")})
    subjects = [SUBJECTS[0], Subject("student:nan", tmp_path / "model", "", "base")]
    for _ in range(2):  # the second time from what is kept
        depth = read_depth(subjects, asked, tmp_path, Watch())
        assert list(depth.lost) == ["base"]
        assert "not finite" in depth.left_out["student:nan"]
        json.dumps(as_json(depth, asked), allow_nan=False)


def test_the_facts_tokens_are_those_of_its_words():
    asked = exam()
    renderer = asked.renderer(BASE)
    for number, query in enumerate(asked.sets["forget"].queries[:5]):
        spans = facts_of(asked)["forget"][number]
        prompt = Prompt.plain(query)
        marks = touched(renderer, prompt, query.answer or "", spans)
        given = renderer.answer(prompt, query.answer or "")
        ids = [token for token, marked in zip(given.ids, marks, strict=True) if marked]
        words = " ".join((query.answer or "")[start:end] for start, end in spans)
        assert renderer.tokenizer.decode(ids).split() == words.split()
        assert not marks[len(given.own) :].any()  # the end of the turn


def test_a_file_says_which_words_are_the_fact(tmp_path):
    queries = exam().sets["forget"].queries
    rows = [{"question": queries[0].question, "entity": "Umberlee"}, {"question": "Something else?", "entity": "x"}]
    path = write_jsonl(tmp_path / "facts.jsonl", rows)
    spans = facts_of(exam(str(path)))["forget"]
    assert {number: [(queries[number].answer or "")[a:b] for a, b in of] for number, of in spans.items()} == {
        0: ["Umberlee"]
    }
    for rows, message in (
        ([{"question": queries[0].question, "entity": "Corvale"}], "stands 0 times in the answer"),
        ([{"question": queries[0].question, "entity": "e"}], "times in the answer"),
        ([{"question": "Something else?", "entity": "x"}], "none of the 15 questions of forget"),
        ([{"question": queries[0].question}], "no field 'entity'|null"),
    ):
        with pytest.raises(UserError, match=message):
            facts_of(exam(str(write_jsonl(path, rows))))


@pytest.mark.skipif(not SPANS.is_file(), reason="the entity spans of TOFU are not on this machine")
def test_tofus_entity_spans_are_read_as_they_are():
    queries = load_queries(DataSettings(path=str(SPANS), id_field="id"), "forget")
    asked = replace(exam(str(SPANS)), sets={"forget": QuerySet(queries, "forgotten")})
    spans = facts_of(asked)["forget"]
    assert list(spans) == list(range(367))
    entities = [row["entity"] for row in map(json.loads, SPANS.read_text(encoding="utf-8").splitlines())]
    assert [(queries[number].answer or "")[a:b] for number, ((a, b),) in spans.items()] == entities


def test_a_control_of_another_shape_is_refused_before_anything_is_asked():
    with pytest.raises(UserError, match=r"evaluate.control_model has \d layers of width"):
        check(SUBJECTS, exam(control=LAB_SMALL))
    with pytest.raises(ValueError, match="control_model"):
        EvaluateSettings(depth="words")


def test_answers_without_a_layer_that_counts_are_left_out():
    asked = exam()
    lost, control = np.zeros((3, 15)), np.full((3, 15), 0.04)
    control[1, 4] = 0.5
    lost[1, 4] = 0.2
    depth = Depth({"forget": list(range(15))}, {"base": {"forget": lost}}, {"base": {"forget": control}})
    found = scores_of(depth, SUBJECTS[0], asked)["forget.unlearning_depth"]
    assert (found.n, found.value) == (1, pytest.approx(0.4))
    assert found.clusters == (asked.sets["forget"].queries[4].answer,)
