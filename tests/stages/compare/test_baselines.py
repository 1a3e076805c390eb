"""The baselines on a lab model: each moves what it should, sees answer tokens only, and goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import LAB_SMALL, ROOT, make_plan, make_rows, write_store

from duet.cache.errors import Interrupted
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.cache.watch import Watch
from duet.stages.compare.methods import METHODS, Models, loss_of, rmu_layer
from duet.stages.compare.rows import QuestionAnswer, TrainingRows, row_of, shuffled_order, store_order
from duet.stages.compare.train import BaselineJob, train_baseline
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.student import TrainSettings
from duet.stages.student.targets import Teachers

CPU, PROMPT = torch.device("cpu"), PromptSettings()
SETTINGS = TrainSettings(epochs=3, batch_size=4, lr=1e-4, dtype="float32")


@pytest.fixture(scope="module")
def training_rows() -> TrainingRows:
    renderer = Renderer(load_tokenizer(LAB_SMALL), PROMPT)
    queries = {
        subset: load_queries(DataSettings(path=str(ROOT / f"lab/data/{subset}.jsonl")), subset)[:4]
        for subset in ("forget", "retain")
    }
    refused = [[row_of(renderer, query, "I know nothing about that person.")] for query in queries["forget"]]
    rows = {subset: [row_of(renderer, query) for query in found] for subset, found in queries.items()}
    return TrainingRows(**rows, refusals=refused)


def job_of(folder: Path, training_rows: TrainingRows, method: str = "npo") -> BaselineJob:
    constant = (METHODS[method].constants or (0.0,))[0]
    steps = shuffled_order(8, SETTINGS)
    return BaselineJob(
        method, METHODS[method], constant, LAB_SMALL, "small", folder, SETTINGS, training_rows, steps, 0, CPU
    )


def trained(job: BaselineJob) -> dict:
    return train_baseline(job, Watch())


def models_of(model_dir: Path, pad_id: int = 0) -> Models:
    return Models(load_model(model_dir, "float32"), load_model(LAB_SMALL, "float32"), pad_id, CPU, seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_lower_the_methods_loss_and_move_what_they_should(name, training_rows, tmp_path):
    job = job_of(tmp_path, training_rows, name)
    assert trained(job)["steps"] == 6
    everything = training_rows.batch(np.arange(8), 0, 0)
    loss, gold, refusal = {}, {}, {}
    for when, folder in (("before", LAB_SMALL), ("after", tmp_path / "model")):
        models = models_of(folder)
        with torch.no_grad():
            found = loss_of(job.method, models, everything, job.constant)
            assert found is not None
            loss[when] = found.item()
            gold[when] = models(everything.forget).logprob_N.mean().item()
            refusal[when] = models(everything.refused).logprob_N.mean().item()
    assert loss["after"] < loss["before"]
    if name != "refusal":  # which says nothing of the gold answer
        assert gold["after"] < gold["before"]
    if name in ("refusal", "dpo", "flat"):
        assert refusal["after"] > refusal["before"]


def test_rmu_leaves_all_layers_behind_its_own_and_the_embeddings_alone(training_rows, tmp_path):
    trained(job_of(tmp_path, training_rows, "rmu"))
    before, after = (load_file(folder / "model.safetensors") for folder in (LAB_SMALL, tmp_path / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layer = rmu_layer(load_model(LAB_SMALL))
    assert layer == 1
    assert {name.split(".")[2] for name in moved} == {"0", "1"}, moved


def test_answers_are_scored_at_their_own_tokens_whatever_stands_around_them(training_rows):
    """Equal to a forward pass of each row alone; padding, and what it is, changes nothing."""
    rows = [
        *training_rows.forget,
        QuestionAnswer(training_rows.retain[0].prompt_ids, list(training_rows.retain[0].answer_ids) * 3),
    ]
    models = models_of(LAB_SMALL)
    with torch.no_grad():
        found, other = models(rows).logprob_N, models_of(LAB_SMALL, pad_id=7)(rows).logprob_N
        alone = []
        for row in rows:
            ids_T = torch.tensor([*row.prompt_ids, *row.answer_ids])
            logprob_TV = models.model(input_ids=ids_T[None]).logits[0].float().log_softmax(-1)
            alone += [logprob_TV[at - 1, ids_T[at]] for at in range(len(row.prompt_ids), len(ids_T))]
    assert torch.allclose(found, torch.stack(alone), atol=1e-4)
    assert torch.equal(found, other)
    assert len(found) == sum(len(row.answer_ids) for row in rows)


def test_it_goes_on_bit_for_bit_where_it_was_stopped(training_rows, tmp_path):
    trained(job_of(tmp_path / "unbroken", training_rows))
    broken = job_of(tmp_path / "broken", training_rows)
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="step 2 of 6 is saved"):
        train_baseline(broken, Watch(should_stop=lambda: next(asked)))
    seen = []
    train_baseline(broken, Watch(on_progress=lambda name, step, total, note: seen.append(step)))
    assert seen == [3, 4, 5, 6]
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("unbroken", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_method_that_blows_up_ends_with_the_weights_before_that_step(training_rows, tmp_path):
    broken = replace(METHODS["ga"], forget=lambda models, batch, _: models(batch.forget).logprob_N.mean() / 0)
    done = trained(replace(job_of(tmp_path, training_rows, "ga"), method=broken))
    assert (done["diverged_at"], done["steps"], done["curve"]) == (1, 0, [])
    before, after = (load_file(folder / "model.safetensors") for folder in (LAB_SMALL, tmp_path / "model"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_each_step_has_the_rows_of_the_students_step(tmp_path):
    write_store(tmp_path / "s", make_plan(11, 4, shard_rows=3), make_rows(range(11), forget=4))
    settings = TrainSettings(epochs=3, batch_size=4, forget_share=0.5, seed=3)
    teachers = Teachers.of({"teacher": Store(Folder(tmp_path / "s"))}, settings)
    order = teachers.order(settings)
    steps = store_order(order, settings)
    batches = teachers.batches(order, settings.batch_size)
    for step in range(steps.total):
        _, (block,) = next(batches)
        assert [int(row_id.split("/")[1]) for row_id in block.decoded().row_ids] == steps.numbers(step).tolist()
    assert steps.total == 3 * 4  # 14 slots: each of 7 retain rows once, as many forget rows


def test_a_step_without_rows_for_a_method_has_no_loss(training_rows):
    batch = training_rows.batch(np.arange(4, 8), 0, 0)  # retain rows only
    models = models_of(LAB_SMALL)
    assert loss_of(METHODS["ga"], models, batch, 0.0) is None
    with torch.no_grad():
        assert loss_of(METHODS["grad_diff"], models, batch, 0.0) == -models(batch.retain).logprob_N.mean()


def test_refusals_are_drawn_by_seed_step_and_row(training_rows):
    refusals = [[replace(row, answer_ids=[number]) for number in range(9)] for row in training_rows.forget]
    several = replace(training_rows, refusals=refusals)
    drawn = {
        (seed, step): [row.answer_ids for row in several.batch(np.arange(8), seed, step).refused]
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({str(rows) for rows in drawn.values()}) == 4
    assert [row.answer_ids for row in several.batch(np.arange(2, 4), 1, 1).refused] == drawn[1, 1][2:]


def test_broad_rows_of_a_step_are_left_out(training_rows):
    """They have no answers: rows 0 to 3 are to be forgotten, 4 to 7 to be kept, 8 and on are broad."""
    batch = training_rows.batch(np.array([1, 4, 7, 8, 11]), 0, 0)
    assert batch.forget == [training_rows.forget[1]]
    assert batch.retain == [training_rows.retain[0], training_rows.retain[3]]
    assert not training_rows.batch(np.array([9, 10]), 0, 0).retain
