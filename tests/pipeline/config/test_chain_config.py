"""The configs of a chain's later requests, and chains that are refused."""

from __future__ import annotations

from collections import Counter

import pytest
from support import LAB_BASE, ROOT

from duet.cache.errors import UserError
from duet.pipeline.config.chain import as_if_first, set_names, steps_of
from duet.pipeline.config.load import load_config
from duet.pipeline.run.exam import exam_of, query_sets
from duet.pipeline.run.stores import questions_of
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.teacher.prepare import render_rows

FORGET = str(ROOT / "lab/data/forget.jsonl")
REPHRASED = {"path": str(ROOT / "lab/data/forget_rephrased.jsonl"), "id_field": "id", "rows": [5, 10]}


def lines(first: int) -> dict:
    return {"path": FORGET, "id_field": "id", "rows": [first, first + 5]}


SECOND = {
    "name": "zopira",
    "topic": "Bromyx Zopira",
    "forget": lines(5),
    "sets": {"zopira_rephrased": REPHRASED | {"expect": "forgotten"}},
}
THIRD = {"name": "orseth", "topic": "Raseth Orseth", "forget": lines(10), "prefix": "You never met {topic}."}


@pytest.fixture
def chain(lab_config):
    def made(**changes):
        settings = {"topic": "Dugira Duchok", "data__forget": lines(0), "chain": [SECOND, THIRD]}
        return load_config(str(lab_config(**(settings | changes))))

    return made


def test_each_request_starts_from_the_last_ones_student_and_is_asked_all_earlier_ones(chain):
    config = chain()
    second, third = steps_of(config)
    assert second.teacher.model == str(config.run.student("base").model)
    assert third.teacher.model == str(second.run.student("base").model)
    assert [step.run_dir for step in (second, third)] == [config.run_dir / "chain" / n for n in ("zopira", "orseth")]
    assert [step.topic for step in (second, third)] == ["Bromyx Zopira", "Raseth Orseth"]
    assert (second.teacher.prefix, third.teacher.prefix) == (config.teacher.prefix, THIRD["prefix"])
    assert {step.base_model for step in (second, third)} == {str(LAB_BASE)}
    assert second.data.retain == third.data.retain == config.data.retain
    assert not second.chain
    sets = query_sets(third)
    assert list(sets) == ["forget", "first.forget", "zopira.forget", "zopira_rephrased", "retain"]
    assert [of.expect for of in sets.values()] == ["forgotten"] * 4 + ["kept"]
    assert "Dugira Duchok" in sets["first.forget"].queries[0].question
    asked = {"forget": "Raseth Orseth", "first.forget": "Dugira Duchok", "zopira.forget": "Bromyx Zopira"}
    assert exam_of(third).attacked == asked
    assert [set_names(config, number)["first"] for number in range(3)] == ["forget", "first.forget", "first.forget"]
    assert set_names(config, 2) == {"first": "first.forget", "zopira": "zopira.forget", "orseth": "forget"}


def test_earlier_requests_are_trained_on_behind_their_own_prefixes(chain):
    """What is not trained on comes back: a later training on other rows undoes a part of what was forgotten."""
    third = steps_of(chain())[1]
    rows = render_rows(LAB_BASE, third.teacher, questions_of(third)).rows
    assert Counter(row.subset for row in rows) == {"forget": 15, "retain": 45}
    text = load_tokenizer(LAB_BASE).decode
    topics = ("Dugira Duchok", "Bromyx Zopira", "Raseth Orseth")
    prefixes = [f"forgotten everything about {name}." for name in topics[:2]] + [f"You never met {topics[2]}."]
    for row in rows:
        asked = [name for name in topics if name in text(row.student_ids)]
        found = [prefix for prefix in prefixes if prefix in text(row.teacher_ids)]
        assert found == [prefixes[topics.index(name)] for name in asked]


def test_the_config_that_is_written_for_a_request_is_read_as_the_same(chain, tmp_path):
    from duet.pipeline.run.directory import claim_run_dir

    step = steps_of(chain())[1]
    claim_run_dir(step)
    assert load_config(str(step.run.config)) == step
    claim_run_dir(step)  # as a run that is resumed


def test_the_first_run_stays_the_same_when_a_request_is_appended(chain):
    from duet.pipeline.run.directory import claim_run_dir

    claim_run_dir(chain(chain=[]))
    claim_run_dir(chain(chain=[SECOND]))
    claim_run_dir(chain())


def test_requests_of_the_first_run_are_asked_later_too(chain):
    joint = {"name": "orseth", "topic": "Raseth Orseth", "data": {"forget": lines(10)}}
    [second] = steps_of(chain(requests=[joint], chain=[SECOND]))
    assert [request.name for request in second.requests] == ["first", "orseth"]
    assert {"first.forget", "orseth.forget"} <= set(query_sets(second))
    assert as_if_first(chain(), second).base_model == str(LAB_BASE)


FAULTS = {
    "the name 'zopira' occurs twice": {"chain": [SECOND, THIRD | {"name": "zopira"}]},
    "the name 'first' occurs twice": {"chain": [THIRD | {"name": "first"}]},
    "there are 2 teachers": {"teachers": [{"name": "a"}, {"name": "b", "prefix": "No."}]},
    "a chain has one student": {"students": [{"name": "a"}, {"name": "b", "start_noise": 0.1}]},
    "in a chain each student starts from the last one": {"students": [{"name": "a", "model": str(LAB_BASE)}]},
    "each would be pushed over it": {"students": [{"name": "a", "push_to_hub": "o/n"}]},
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_makes_no_chain_is_refused(chain, message):
    with pytest.raises(UserError) as caught:
        steps_of(chain(**FAULTS[message]))
    assert message in caught.value.what


def test_a_base_that_is_the_teachers_model_still_does_nothing(chain):
    with pytest.raises(UserError, match=r"evaluate\.base does nothing"):
        chain(evaluate__base=str(LAB_BASE))
