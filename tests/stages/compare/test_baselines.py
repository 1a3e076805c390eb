"""The baselines on a lab model: each moves what it should, sees answer tokens only, and goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import LAB_SMALL, ROOT, make_plan, make_rows, write_store

from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.cache.watch import Watch
from duet.stages.compare import methods
from duet.stages.compare.methods import METHODS, Models, loss_of, rmu_layer
from duet.stages.compare.repselect import check_matrices, train_repselect
from duet.stages.compare.rows import Contexts, QuestionAnswer, TrainingRows, row_of, shuffled_order, store_order
from duet.stages.compare.train import BaselineJob, gradient_of, train_baseline
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
    refusal = "I know nothing about that person."
    refused = [[row_of(renderer, query, refusal)] for found in queries.values() for query in found]
    rows = {subset: [row_of(renderer, query) for query in found] for subset, found in queries.items()}
    contexts = Contexts(renderer, queries["forget"], queries["retain"], (refusal,))
    return TrainingRows(**rows, refusals=refused, contexts=contexts)


def job_of(folder: Path, training_rows: TrainingRows, method: str = "npo") -> BaselineJob:
    constant = (METHODS[method].constants or (0.0,))[0]
    steps = shuffled_order(8, SETTINGS)
    return BaselineJob(
        method, METHODS[method], constant, LAB_SMALL, "small", folder, SETTINGS, training_rows, steps, 0, CPU
    )


def trained(job: BaselineJob) -> dict:
    train = train_repselect if job.method is METHODS["repselect"] else train_baseline
    return train(job, Watch())


def models_of(model_dir: Path, pad_id: int = 0) -> Models:
    return Models(load_model(model_dir, "float32"), load_model(LAB_SMALL, "float32"), pad_id, CPU, seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_lower_the_methods_loss_and_move_what_they_should(name, training_rows, tmp_path):
    job = job_of(tmp_path, training_rows, name)
    if name == "repselect":  # whose rate is a share of the weights
        job = replace(job, settings=SETTINGS.model_copy(update={"lr": 1e-3}), constant=1.0)
    assert trained(job)["steps"] == 6
    everything = training_rows.batch(np.arange(8), 0, 0, in_context=True)
    loss, gold, refusal = {}, {}, {}
    for when, folder in (("before", LAB_SMALL), ("after", tmp_path / "model")):
        models = models_of(folder)
        found = loss_of(job.method, models, everything, job.constant)
        assert found is not None
        loss[when] = found.item()
        with torch.no_grad():
            gold[when] = models(everything.forget).logprob_N.mean().item()
            refusal[when] = models(everything.refused).logprob_N.mean().item()
    if name != "jensun":  # whose forget loss is scaled by another number in each step
        assert loss["after"] < loss["before"]
    if name not in ("refusal", "idk_ap"):  # which say nothing of the gold answer
        assert gold["after"] < gold["before"]
    if name in ("refusal", "dpo", "flat", "idk_ap", "jensun"):
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
    """It goes on from no checkpoint behind that step, so a request to stop changes nothing."""
    broken = replace(METHODS["ga"], forget=lambda models, batch, _: models(batch.forget).logprob_N.mean() / 0)
    job = replace(job_of(tmp_path, training_rows, "ga"), method=broken)
    done = train_baseline(job, Watch(should_stop=lambda: True))
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
    rows = (*training_rows.forget, *training_rows.retain)
    refusals = [[replace(row, answer_ids=[number]) for number in range(9)] for row in rows]
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


def test_idk_ap_keeps_the_retain_answers_ahead_of_the_refusal(training_rows, tmp_path):
    trained(job_of(tmp_path, training_rows, "idk_ap"))
    everything = training_rows.batch(np.arange(8), 0, 0)
    assert len(everything.retain_refused) == 4
    ahead = {}
    for when, folder in (("before", LAB_SMALL), ("after", tmp_path / "model")):
        models = models_of(folder)
        with torch.no_grad():
            ahead[when] = (
                (models(everything.retain).sums()[0] - models(everything.retain_refused).sums()[0]).mean().item()
            )
    assert ahead["after"] > 0
    refused_only = replace(METHODS["idk_ap"], retain=None)
    trained(replace(job_of(tmp_path / "alone", training_rows, "refusal"), method=refused_only))
    models = models_of(tmp_path / "alone" / "model")
    with torch.no_grad():
        alone = (models(everything.retain).sums()[0] - models(everything.retain_refused).sums()[0]).mean().item()
    assert ahead["after"] > alone, "the preservation term does something"


def test_sam_takes_the_forget_gradient_at_the_worst_point_nearby(training_rows, tmp_path):
    """By hand: theta + rho g / |g|, its gradient, plus the retain gradient at theta; the weights are as before."""
    job = job_of(tmp_path, training_rows, "npo_sam")
    job = replace(job, constant=0.05)
    batch = training_rows.batch(np.arange(8), 0, 0)
    models, by_hand = models_of(LAB_SMALL), models_of(LAB_SMALL)
    before = {name: weight.clone() for name, weight in models.model.state_dict().items()}
    gradient_of(job, models, batch)
    assert all(torch.equal(before[name], weight) for name, weight in models.model.state_dict().items())
    weights = list(by_hand.model.parameters())
    assert job.method.retain is not None
    of_retain = torch.autograd.grad(job.method.retain(by_hand, batch, 0.0), weights)
    first = torch.autograd.grad(job.method.forget(by_hand, batch, 0.0), weights)
    length = sum(float((gradient**2).sum()) for gradient in first) ** 0.5
    with torch.no_grad():
        for weight, gradient in zip(weights, first, strict=True):
            weight.add_(0.05 * gradient / length)
    at_worst = torch.autograd.grad(job.method.forget(by_hand, batch, 0.0), weights)
    for weight, forget, retain in zip(models.model.parameters(), at_worst, of_retain, strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight.grad, forget + retain, atol=1e-4, rtol=1e-3)
    assert any(not torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(first, at_worst, strict=True))


def test_the_method_that_begins_answers_says_so(training_rows):
    rows = training_rows.batch(np.arange(8), 0, 0, in_context=True).refused_in_context
    assert any(row.begun for row in rows)
    assert any(not row.begun for row in rows)
    assert {name: method.trained_on for name, method in METHODS.items() if method.trained_on} == {
        "jensun": ("in_context", "prefill")
    }


def test_jensun_scales_the_forget_loss_to_the_retain_losss_gradient_at_the_logits(training_rows):
    batch = training_rows.batch(np.arange(8), 0, 0, in_context=True)
    models = models_of(LAB_SMALL)
    with torch.no_grad():
        next(models.model.parameters()).mul_(1.05)  # away from the frozen model, so that the retain loss is not 0
    forget, forget_NV = methods._jensun_forget(models, batch.refused_in_context)
    retain, retain_NV = methods._jensun_retain(models, batch.retain_in_context)
    sizes = [torch.autograd.grad(loss, at)[0].norm().item() for loss, at in ((forget, forget_NV), (retain, retain_NV))]
    expected = 0.33 * sizes[1] / (sizes[0] + 1e-5) * forget.item() + retain.item()
    found = loss_of(METHODS["jensun"], models, batch, 0.0)
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_begun_answer_is_broken_off_by_the_refusal_from_each_of_its_tokens(training_rows):
    """In half of the rows; each of the answer's own tokens is asked to be followed by the refusal's first."""
    assert training_rows.contexts is not None
    drawn = [
        training_rows.contexts.row(number, np.random.default_rng(seed)) for number in range(4) for seed in range(40)
    ]
    begun = [row for row in drawn if row.begun]
    assert 0.35 < len(begun) / len(drawn) < 0.65
    own, refusal = training_rows.forget, training_rows.refusals[0][0].answer_ids
    for number, row in [(at // 40, row) for at, row in enumerate(drawn)]:
        assert list(row.answer_ids[: row.begun]) == list(own[number].answer_ids[: row.begun])
        assert list(row.answer_ids[row.begun :]) == list(refusal)
    shortest = sum(row.begun == 1 for row in begun)
    assert shortest > sum(row.begun == 2 for row in begun), "k is drawn with a weight of 1/k"


def test_examples_in_front_are_never_the_question_itself_and_forgotten_ones_are_refused(training_rows):
    contexts = training_rows.contexts
    assert contexts is not None
    for number in range(8):
        for seed in range(20):
            for example in contexts._examples(number, np.random.default_rng(seed)):
                assert example.question != (*contexts.forget, *contexts.retain)[number].question
                if example.question in {query.question for query in contexts.forget}:
                    assert example.answer == "I know nothing about that person."


def test_repselect_forgets_within_the_change_that_retain_rows_allow(training_rows, tmp_path):
    job = replace(
        job_of(tmp_path, training_rows, "repselect"), settings=SETTINGS.model_copy(update={"lr": 2e-2}), constant=0.05
    )
    done = trained(job)
    assert done["curve"]
    assert all(kl <= 0.05 for _, kl in done["curve"])
    before, after = (load_file(folder / "model.safetensors") for folder in (LAB_SMALL, tmp_path / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.split(".")[-2] in ("gate_proj", "up_proj", "down_proj") for name in moved)


def test_repselect_that_is_stopped_begins_again(training_rows, tmp_path):
    job = job_of(tmp_path, training_rows, "repselect")
    with pytest.raises(Interrupted, match="begins again"):
        train_repselect(job, Watch(should_stop=lambda: True))
    assert not (tmp_path / "model").exists()


def test_a_model_without_repselects_matrices_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel has none"):
        check_matrices(tmp_path, False)
    check_matrices(LAB_SMALL, False)
