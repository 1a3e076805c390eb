"""Control and floor beside extraction strength, on the lab's models."""

from __future__ import annotations

import pytest
from support import ROOT

from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.given_answers import Pairs
from duet.stages.exam.given_beside import exchanged, floors_of, memorised, read_beside
from duet.stages.exam.reading import read_all
from duet.stages.questions.queries import load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

BASE, ORACLE = ROOT / "lab/models/base", ROOT / "lab/models/oracle"


def test_answers_stand_behind_the_other_prompts():
    pairs = Pairs([[1], [2], [3]], [[[10], [11]], [[10]], [[20]]], [0, 0, 1], True, True)
    found = exchanged(pairs, [[5], [6], [7], [8], [9], [4]])
    assert found.prompts == [[5], [7], [9]]
    assert exchanged(pairs, [[5], [6]]).prompts == [[5], [5], [6]]
    assert found.answers == [[[10]], [[10]], [[20]]]
    assert found.num_end == [0, 0, 1]
    assert (found.has_paraphrase, found.has_perturbed) == (False, False)


@pytest.mark.parametrize("control", [ORACLE, None])
def test_base_stands_above_control_and_floor(tmp_path, control):
    queries = {
        name: load_queries(DataSettings(path=str(ROOT / f"lab/data/{name}.jsonl"), id_field="id"), name)
        for name in ("forget", "retain")
    }
    sets = {"forget": QuerySet(queries["forget"], "forgotten"), "retain": QuerySet(queries["retain"][:30], "kept")}
    settings = EvaluateSettings(attacks=("reverse",), dtype="float32")
    asked = Exam(sets, "them", PromptSettings(), settings, "cpu", control=control)
    base = Subject("base", BASE, "", "base")
    given = read_all([base], asked, tmp_path, tmp_path, Watch())[0]["base"]
    of_control, floor = read_beside(base, asked, tmp_path, Watch())
    floors = floors_of(floor)
    strength = memorised(given["forget"])["extraction_strength"].mean()
    assert strength > 0.9
    assert floors["forget.extraction_strength"]["exchanged"] < 0.5 * strength
    assert floors["forget.exact_memorisation"]["exchanged"] < memorised(given["forget"])["exact_memorisation"].mean()
    if control:
        assert memorised(of_control["forget"])["extraction_strength"].mean() < 0.5 * strength
    else:
        assert of_control == {}
    again = read_beside(base, asked, tmp_path, Watch(should_stop=lambda: True))  # all is on disk
    assert floors_of(again[1]) == floors
    assert [list(of_set) for of_set in again] == [["forget"] if control else [], ["forget"]]
