"""Students in attack contexts: what a batch becomes, that a resumed training reads the same, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from student_jobs import assert_resumes_exactly, job, train
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, write_store

from duet.cache.errors import UserError
from duet.cache.location import Folder
from duet.cache.order import Cursor
from duet.cache.record import counts_of, offsets_of, prompt_and_response
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.questions.contexts import Contexts
from duet.stages.questions.prompts import open_renderer
from duet.stages.questions.queries import Query
from duet.stages.questions.requests import AskedAbout
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.contexts import MOST_BEGUN, Wide, begun_by, first_tokens
from duet.stages.student.passes import passes_of
from duet.stages.student.targets import mixed
from duet.stages.student.train import open_store

NUM_ROWS, FORGET, POSITIONS = 12, 5, 3
PROMPT = PromptSettings()


def row_ids() -> list[str]:
    return [f"{'forget' if row < FORGET else 'retain'}/{row}" for row in range(NUM_ROWS)]


ASKED = {
    row_id: AskedAbout(Query(str(row), f"Where was number {row} born?", None), "the numbers")
    for row, row_id in enumerate(row_ids())
}


@pytest.fixture(scope="module")
def asked_store(tmp_path_factory):
    """A store whose rows are the questions of ASKED."""
    location, tokenizer = Folder(tmp_path_factory.mktemp("asked") / "s"), load_tokenizer(LAB_SMALL)
    known = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64, "engine": "none"}
    plan = make_plan(
        NUM_ROWS, FORGET, top_k=5, vocab_size=LAB_VOCAB_SIZE, max_positions=POSITIONS,
        provenance=known | {"dtype": "float32", "prompt": open_renderer(LAB_SMALL, PROMPT).provenance},
    )  # fmt: skip
    write_store(location, plan, asked_rows(), tokenizer_files(tokenizer))
    return open_store(location, verify=True)


def asked_rows():
    rows = make_rows(range(NUM_ROWS), positions=POSITIONS, top_k=5, vocab_size=LAB_VOCAB_SIZE, forget=FORGET)
    renderer = open_renderer(LAB_SMALL, PROMPT)
    contexts = Contexts(renderer, ASKED)
    tokens = [
        np.concatenate([contexts.prompt(row_id), prompt_and_response(rows, row)[1]]).astype(np.int32)
        for row, row_id in enumerate(row_ids())
    ]
    offsets = offsets_of([len(of_row) for of_row in tokens])
    return replace(rows, row_ids=row_ids(), token_offsets=offsets, tokens_S=np.concatenate(tokens))


def wide_job(student_dir: Path, asked=ASKED, contexts="attacks", **settings):
    return replace(job(student_dir, contexts=contexts, **settings), asked=asked)


@pytest.fixture
def wide(asked_store) -> Wide:
    contexts = Contexts(open_renderer(LAB_SMALL, PROMPT), ASKED)
    return Wide.of(wide_job(Path("unused")), contexts, asked_store[0], [], torch.device("cpu"))


def test_targets_stay_those_of_the_plain_question(wide, asked_store):
    rows = mixed([asked_store[0].block_of(np.arange(NUM_ROWS))], [1.0])
    begun_rows = 0
    for slot in range(8):
        found = wide.around(rows, Cursor(0, slot))
        for row, row_id in enumerate(found.row_ids):
            prompt, response = prompt_and_response(found, row)
            _, plain = prompt_and_response(rows, row)
            num_begun = len(response) - len(plain)
            begun_rows += num_begun > 0
            assert response[num_begun:].tolist() == plain.tolist()
            assert row_id.startswith("forget") or num_begun == 0, "answers to be kept are not begun"
            assert response[:num_begun].tolist() == list(wide.own_answers.get(row_id, ()))[:num_begun]
            first, plain_first = int(found.position_offsets[row]), int(rows.position_offsets[row])
            expected = [*[plain_first] * num_begun, *range(plain_first, plain_first + len(plain))]
            for name in ("topk_ids_NK", "topk_logits_NK", "logsumexp_N"):
                here, there = getattr(found, name), getattr(rows, name)
                assert np.array_equal(here[first : first + len(response)], there[expected]), (name, row_id)
            assert prompt.tolist() == wide.contexts.drawn(row_id, (wide.seed, 0, slot))
    assert FORGET * 8 * 0.25 < begun_rows < FORGET * 8 * 0.75, "half of the answers to forget are begun"
    passes = passes_of(found, TrainSettings(), 0)
    assert sum(len(one.weight_N) for one in passes) == found.position_offsets[-1]
    assert sum(int(one.is_first_N.sum()) for one in passes) == NUM_ROWS


def test_a_row_of_no_query_stays_as_it_is(wide, asked_store):
    rows = mixed([asked_store[0].block_of(np.arange(NUM_ROWS))], [1.0])
    without = replace(wide, contexts=Contexts(wide.contexts.renderer, {"retain/11": ASKED["retain/11"]}))
    found = without.around(rows, Cursor(0, 4))
    for row in range(NUM_ROWS - 1):
        for here, there in zip(prompt_and_response(found, row), prompt_and_response(rows, row), strict=True):
            assert here.tolist() == there.tolist()


def test_rows_that_were_read_once_for_several_teachers_still_are(wide, asked_store):
    block = asked_store[0].block_of(np.arange(NUM_ROWS))
    found = wide.around(mixed([block, block], [0.5, 0.5]), Cursor(2, 8))
    assert found.sequence_R.tolist() == [*range(NUM_ROWS)] * 2
    assert counts_of(found.token_offsets)[:NUM_ROWS].tolist() == counts_of(found.token_offsets)[NUM_ROWS:].tolist()


def test_begun_answers_are_drawn_with_weight_one_by_length_and_leave_the_response_where_it_agrees():
    response = np.array([7, 8, 9], np.int32)
    drawn = [begun_by([1, 2, 3, 4], response, np.random.default_rng(seed)) for seed in range(4000)]
    lengths = np.bincount([len(begun) for begun, _ in drawn], minlength=5) / 4000
    whole = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert np.allclose(lengths, [0.5, *(0.5 / k / whole for k in range(1, 5))], atol=0.03)
    assert all(not positions.any() for _, positions in drawn)
    agreeing = [begun_by([7, 8, 1, 2], response, np.random.default_rng(seed)) for seed in range(200)]
    assert {tuple(positions) for _, positions in agreeing} == {(), (0, 1, 2), (0, 1, 2, 0)}
    assert all(len(begun_by(same, response, np.random.default_rng(1))[0]) == 0 for same in ([], [7, 8, 9, 1]))
    longest = [begun_by(range(100, 200), response, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert max(map(len, longest)) == MOST_BEGUN


def test_a_model_begins_its_answers_as_it_generates_them():
    model, prompt = load_model(LAB_SMALL, "float32"), [1, 5, 9]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=MOST_BEGUN, do_sample=False, pad_token_id=0)[0, 3:]
    end = int(expected[2])
    assert first_tokens(model, prompt, []) == expected.tolist() or end in expected[:2]
    assert first_tokens(model, prompt, [end]) == expected.tolist()[: expected.tolist().index(end)]


def test_interrupted_and_resumed_is_the_unbroken_run_bit_for_bit(tmp_path, asked_store):
    whole = assert_resumes_exactly(wide_job, tmp_path, asked_store)
    assert whole != train(job(tmp_path / "plain"), asked_store)
    assert whole != train(wide_job(tmp_path / "seeded", seed=1), asked_store)


def test_contexts_are_in_the_identity_and_the_summary_only_where_there_are_some(tmp_path, asked_store):
    train(wide_job(tmp_path / "wide", epochs=1), asked_store)
    train(job(tmp_path / "plain", epochs=1), asked_store)
    wide, plain = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("wide", "plain"))
    assert wide["trained_on"] == ["reverse", "prefix_injection", "prefill"]
    assert "trained_on" not in plain
    later = job(tmp_path / "later", epochs=1, model_dir=tmp_path / "wide" / "model")
    train(later, asked_store)
    assert json.loads((tmp_path / "later/training.json").read_text())["trained_on"] == wide["trained_on"], "its start's"
    identities = [json.loads((tmp_path / name / "student.json").read_text()) for name in ("wide", "plain")]
    assert identities[0]["train"]["contexts"] == "attacks"
    assert set(identities[0]) - set(identities[1]) == {"contexts"}
    assert "contexts" not in deciding_settings(TrainSettings())
    other = {row_id: replace(one, topic="others") for row_id, one in ASKED.items()}
    with pytest.raises(UserError, match="holds another run"):
        train(wide_job(tmp_path / "wide", asked=other, epochs=1), asked_store)


def test_texts_are_attacks_with_no_answer_begun(tmp_path, asked_store, wide):
    rows = mixed([asked_store[0].block_of(np.arange(NUM_ROWS))], [1.0])
    texts = Wide.of(wide_job(Path("unused"), contexts="texts"), wide.contexts, asked_store[0], [], torch.device("cpu"))
    for slot in range(4):
        found, both = texts.around(rows, Cursor(0, slot)), wide.around(rows, Cursor(0, slot))
        for row in range(NUM_ROWS):
            prompt, response = prompt_and_response(found, row)
            assert prompt.tolist() == prompt_and_response(both, row)[0].tolist()
            assert response.tolist() == prompt_and_response(rows, row)[1].tolist()
        assert np.array_equal(found.topk_logits_NK, rows.topk_logits_NK)
    train(wide_job(tmp_path / "texts", contexts="texts", epochs=1), asked_store)
    assert json.loads((tmp_path / "texts/training.json").read_text())["trained_on"] == ["reverse", "prefix_injection"]
    assert json.loads((tmp_path / "texts/student.json").read_text())["train"]["contexts"] == "texts"
    with pytest.raises(UserError, match="holds another run"):
        train(wide_job(tmp_path / "texts", epochs=1), asked_store)


def test_questions_that_are_not_the_stores_are_refused_before_a_folder_is_made(tmp_path, asked_store, store):
    other = ASKED | {"retain/7": AskedAbout(Query("7", "Where was number 8 born?", None), "the numbers")}
    with pytest.raises(UserError, match=r"row 'retain/7' of the store is another question"):
        train(wide_job(tmp_path / "a", asked=other), asked_store)
    with pytest.raises(UserError, match=r"train.contexts needs the questions"):
        train(wide_job(tmp_path / "b"), store)  # made by no prompts that are known
    with pytest.raises(UserError, match=r"train.contexts needs the questions"):
        train(wide_job(tmp_path / "c", asked=None), asked_store)
    long = {row_id: replace(one, topic="very long " * 400) for row_id, one in ASKED.items()}
    with pytest.raises(UserError, match=r"tokens"):
        train(wide_job(tmp_path / "d", asked=long), asked_store)
    assert not any((tmp_path / name).exists() for name in "abcd")
