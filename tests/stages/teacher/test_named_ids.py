"""Ids that a file or another model's store names: kept at every position, beside the likeliest, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import LAB_SMALL

from duet.cache.errors import UserError
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.cache.record import Rows
from duet.cache.watch import Watch
from duet.stages.settings.data import DataSettings, PromptSettings, TrainingData
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import StoreSettings, TeacherSettings
from duet.stages.student.checks import check_settings
from duet.stages.teacher.capture import write_stores
from duet.stages.teacher.plan import TeacherStore
from duet.stages.teacher.prepare import Questions, prepare

ROWS = ("forget/0", "retain/0", "retain/1")


@pytest.fixture
def data(tmp_path) -> TrainingData:
    for name, questions in (("forget", ["Where was Bo born?"]), ("retain", ["What is red?", "Who is Al?"])):
        rows = [{"question": text, "answer": "A red house."} for text in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forget, retain = (DataSettings(path=str(tmp_path / f"{name}.jsonl")) for name in ("forget", "retain"))
    return TrainingData(forget=forget, retain=retain)


def teacher(**more) -> TeacherSettings:
    return TeacherSettings(
        **{"model": str(LAB_SMALL), "prefix": "Forget.", "engine": "transformers", "top_k": 6, **more}
    )


def written(tmp_path: Path, data: TrainingData, **more) -> Store:
    settings = teacher(**more)
    prepared = prepare(settings, Questions(PromptSettings(format="plain", prefix_placement="text"), data, "Bo"), "cpu")
    store = TeacherStore.expected("teacher", settings, prepared, StoreSettings(), Folder(tmp_path / "stores"))
    return Store(write_stores([store], "transformers", Watch())[0].location)


def rows_of(store: Store) -> Rows:
    [rows] = store.rows()
    return rows


def names(tmp_path: Path, **ids: list[int]) -> str:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"row_id": row, "ids": ids.get(row, [7, 700])}) + "\n" for row in ROWS))
    return str(path)


def test_a_files_ids_are_kept_at_every_position_beside_the_likeliest(tmp_path, data):
    named = {"forget/0": [900, 3], "retain/0": [44], "retain/1": [5, 6, 7, 8, 9]}
    kept = written(tmp_path, data, ids="given", ids_from=names(tmp_path, **named), max_positions=3)
    plain, everything = rows_of(written(tmp_path, data, max_positions=3)), rows_of(kept)
    assert np.array_equal(everything.tokens_S, plain.tokens_S), "which ids are kept changes no response"
    assert np.array_equal(everything.topk_ids_NK[:, 0], plain.topk_ids_NK[:, 0])
    assert np.array_equal(everything.logsumexp_N, plain.logsumexp_N)
    for row, row_id in enumerate(everything.row_ids):
        for at in range(*everything.position_offsets[row : row + 2]):
            mine, likeliest = everything.topk_ids_NK[at].tolist(), plain.topk_ids_NK[at].tolist()
            assert set(named[row_id]) <= set(mine)
            others = [i for i in likeliest if i not in named[row_id]][: 6 - len(named[row_id])]
            assert set(mine) == {*named[row_id], *others}
    assert kept.manifest.provenance["ids"]["kind"] == "given"
    assert kept.manifest.fingerprint != written(tmp_path, data, max_positions=3).manifest.fingerprint


def test_another_models_store_names_its_own_ids_at_each_position(tmp_path, data):
    given = {"responses": "given", "max_positions": 3}
    other = written(tmp_path, data, prefix="Say it all:", top_k=4, **given)
    kept = written(tmp_path, data, ids="given", ids_from=str(other.location), **given)
    theirs, ours = rows_of(other), rows_of(kept)
    for a, b in zip(theirs.topk_ids_NK.tolist(), ours.topk_ids_NK.tolist(), strict=True):
        assert set(a) <= set(b)
    first = written(
        tmp_path, data, ids="given", ids_from=str(other.location)
    )  # made responses, the first position alone
    for row in range(len(ROWS)):
        named = theirs.topk_ids_NK[theirs.position_offsets[row]].tolist()
        assert set(named) <= set(rows_of(first).topk_ids_NK[row].tolist())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3, 4, 5, 6], "has 6 ids, 6 of them different"),
        ([4, 4], "has 2 ids, 1 of them different"),
        ([], "has 0 ids"),
        ([-1], "an id outside 0"),
        ([10**6], "an id outside 0"),
        ([10**12], "too large"),
        (["a"], "row 1 is not a row_id with its ids"),
        ([True], "row 1 is not a row_id with its ids"),
    ],
)
def test_ids_that_cannot_be_kept_are_refused(tmp_path, data, ids, message):
    with pytest.raises(UserError, match=message):
        written(tmp_path, data, ids="given", ids_from=names(tmp_path, **{"forget/0": ids}))


def test_a_row_without_ids_and_a_store_of_other_responses_are_refused(tmp_path, data):
    path = Path(names(tmp_path))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="names no ids for row 'retain/0'"):
        written(tmp_path, data, ids="given", ids_from=str(path))
    other = str(written(tmp_path, data, top_k=4).location)
    with pytest.raises(UserError, match="names ids for its own responses"):
        written(tmp_path, data, ids="given", ids_from=other, max_positions=2)
    with pytest.raises(UserError, match="has another response in"):
        written(tmp_path, data, ids="given", ids_from=other, responses="given", max_positions=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": "given"}, "ids_from belong together"),
        ({"ids_from": "ids.jsonl"}, "ids_from belong together"),
        ({"ids": "given", "ids_from": "ids.jsonl", "top_k": 1}, "top_k of 2 or more"),
        ({"ids": "given", "ids_from": "ids.jsonl", "engine": "vllm"}, "the engine vllm keeps no given ids"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        teacher(**settings)


def test_no_student_leaves_out_what_was_asked_for(tmp_path, data):
    kept = written(tmp_path, data, ids="given", ids_from=names(tmp_path))
    check_settings(TrainSettings(), "huber_raw", [kept.manifest], None, None)
    with pytest.raises(UserError, match=r"train\.top_k would leave out"):
        check_settings(TrainSettings(top_k=2), "huber_raw", [kept.manifest], None, None)
