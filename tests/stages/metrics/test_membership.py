"""Membership inference: values by hand, the AUC by counting pairs, and a real model that knows some people and not others."""

from __future__ import annotations

import json
import random
import zlib

import numpy as np
import pytest
import torch
from support import LAB_BASE, LAB_ORACLE, LAB_SMALL, ROOT, write_jsonl

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.given_texts import retrained_auc, scores_of
from duet.stages.exam.reading import answered, gradient_norm, read_all
from duet.stages.metrics import membership
from duet.stages.metrics.membership import auc, auc_score, min_k, min_k_plus, privleak
from duet.stages.metrics.uncertainty import Score
from duet.stages.models.loading import load_model
from duet.stages.models.token_scores import TokenScores
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings
from lab.world import FACTS, World, make_world, questions, random_name

LOGPROBS = np.array([-1.0, -4.0, -0.5, -2.5, -2.0])


def test_the_attacks_by_hand():
    assert membership.loss(LOGPROBS) == -2.0
    assert membership.zlib_ratio(LOGPROBS, "aaaa") == -2.0 / len(zlib.compress(b"aaaa"))
    assert membership.reference(LOGPROBS, -3.0) == 1.0
    assert membership.gradient(2.5) == -2.5
    assert [min_k(LOGPROBS, share) for share in (0.2, 0.4, 0.41, 1)] == pytest.approx([-4, -3.25, -8.5 / 3, -2])
    assert min_k(LOGPROBS[:1], 0.2) == -1.0
    mean, std = np.array([-1.0, -2.0, -1.0, -2.0, -2.0]), np.array([1.0, 1.0, 0.5, 0.25, 0.0])
    # standardised: 0, -2, 1, -2, 0
    assert min_k_plus(TokenScores(LOGPROBS, LOGPROBS > 0, mean, std), 0.4) == pytest.approx(-2.0)


def test_auc_counts_pairs_and_half_of_equal_ones():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.integers(6, size=17) + 1.0, rng.integers(6, size=11).astype(float)
    pairs = [(m > n) + 0.5 * (m == n) for m in members for n in nonmembers]
    assert auc(members, nonmembers) == pytest.approx(np.mean(pairs))
    assert auc(np.ones(3), np.zeros(4)) == 1.0
    assert auc(np.zeros(3), np.ones(4)) == 0.0
    assert auc(np.ones(3), np.ones(4)) == 0.5


def test_the_interval_covers_the_truth_and_widens_with_clusters():
    rng, hits = np.random.default_rng(1), []
    truth = 0.7602499389  # Phi(1 / sqrt 2): normal scores one standard deviation apart
    for seed in range(120):
        score = auc_score(rng.normal(1, 1, 40), rng.normal(0, 1, 40), seed=seed, resamples=300)
        hits.append(score.ci95[0] <= truth <= score.ci95[1])
    assert 0.88 <= np.mean(hits) <= 0.99
    members, nonmembers = np.repeat(rng.normal(1, 1, 10), 5), rng.normal(0, 1, 50)
    clusters = (np.repeat(np.arange(10), 5).tolist(), list(range(50)))
    narrow, wide = auc_score(members, nonmembers), auc_score(members, nonmembers, clusters)
    assert (narrow.value, narrow.n) == (wide.value, 100)
    assert wide.ci95[1] - wide.ci95[0] > 1.3 * (narrow.ci95[1] - narrow.ci95[0])


def test_few_answers_leave_at_least_what_single_questions_leave():
    rng = np.random.default_rng(2)
    members, nonmembers = np.tile(rng.normal(0, 1, 10), 2), rng.normal(0, 1, 20)
    answers = (["yes"] * 10 + ["no"] * 10, ["yes"] * 10 + ["no"] * 10)
    few, single = auc_score(members, nonmembers, answers).ci95, auc_score(members, nonmembers).ci95
    assert few[0] <= single[0] < single[1] <= few[1]


def test_privleak_is_muses():
    """From the paper: a model that still has everything is at -100 % against a retrained one at 0.5."""
    assert privleak(Score(1.0, 10, (0.9, 1.0)), 0.5) == Score(-1.0, 10, (-1.0, -0.8))
    assert privleak(Score(0.5, 10, (0.4, 0.6)), 0.5).value == 0.0
    muse = (0.9 - 0.48) / 0.48  # over-unlearned, in AUCs that are one less ours
    assert privleak(Score(0.1, 10, (0.0, 0.2)), 0.52).value == pytest.approx(muse)


def exam_of(tmp_path, **more) -> Exam:
    """Members: the lab's forget questions. Non-members: the same questions about people whom nobody ever saw."""
    rng = random.Random(1)
    names = {name: None for name in (random_name(rng) for _ in range(40)) if name not in make_world().people}
    facts = {name: {fact.key: rng.choice(fact.values) for fact in FACTS} for name in names}
    rows = questions(World(facts, ()), tuple(names)[:6], 0)
    paths = {"forget": str(ROOT / "lab/data/forget.jsonl"), "strangers": str(write_jsonl(tmp_path / "s.jsonl", rows))}
    sets = {
        name: QuerySet(load_queries(DataSettings(path=path, id_field="id"), name, need_answers=True), "forgotten")
        for name, path in paths.items()
    }
    asked = {"members": "forget", "nonmembers": "strangers"} | more
    return Exam(sets, "three people", PromptSettings(), EvaluateSettings(membership=asked, likelihood=False), "cpu")


def test_the_lab_recognises_what_it_was_trained_on(tmp_path):
    exam = exam_of(tmp_path, reference_model=str(LAB_SMALL), gradients=True)
    subject = Subject("base", LAB_BASE, "", "base")
    _, readings = read_all([subject], exam, tmp_path, tmp_path, Watch())
    kept = tmp_path / "base.read.json"
    before = kept.stat().st_mtime_ns
    assert read_all([subject], exam, tmp_path, tmp_path, Watch()) == ({}, readings)
    assert kept.stat().st_mtime_ns == before, "what is on disk is not read again"

    scores = scores_of(readings["base"], exam)
    assert set(scores) == {
        f"mia.{attack}.forget" for attack in ("loss", "zlib", "min_k", "min_k_plus", "gradient", "reference")
    }
    for attack in ("loss", "zlib", "min_k", "min_k_plus", "gradient"):
        assert scores[f"mia.{attack}.forget"].ci95[0] > 0.8, attack
    # The reference was trained on the members too, so it takes away what tells them apart.
    assert scores["mia.reference.forget"].value < scores["mia.loss.forget"].value

    retrained = tmp_path / "retrained.json"
    retrained.write_text(json.dumps({"models": {"base": {"mia.min_k.forget": {"value": 0.5}}}}))
    exam = exam_of(tmp_path, reference_model=str(LAB_SMALL), retrained=str(retrained))
    assert scores_of(readings["base"], exam)["mia.privleak.forget"].value == pytest.approx(
        1 - 2 * scores["mia.min_k.forget"].value
    )
    with pytest.raises(UserError, match=r"has no mia\.min_k\.forget of 'teacher'"):
        scores_of(readings["base"], exam_of(tmp_path, retrained=str(retrained), retrained_name="teacher"))
    with pytest.raises(UserError, match="no set 'nobody'"):
        read_all([subject], exam_of(tmp_path, members="nobody"), tmp_path, tmp_path, Watch())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"evaluate": {"membership": {"min_k": 0.4}}},
            r"its AUC is of evaluate\.membership\.min_k 0\.4, this run's of 0\.2",
        ),
        ({"provenance": {"data": {"forget": {"sha256": "0" * 64}}}}, "its AUC is of other members"),
        (
            {
                "evaluate": {"membership": {"min_k": 0.2, "nonmembers": "others"}},
                "provenance": {"data": {"others": {"sha256": "0" * 64}}},
            },
            "its AUC is of other nonmembers",
        ),
    ],
)
def test_privleak_is_refused_against_an_auc_of_something_else(tmp_path, content, message):
    retrained = tmp_path / "retrained.json"
    retrained.write_text(json.dumps({"models": {"base": {"mia.min_k.forget": {"value": 0.5}}}} | content))
    with pytest.raises(UserError, match=message):
        retrained_auc(exam_of(tmp_path, retrained=str(retrained)))


def test_privleak_against_a_model_that_was_really_trained_without_the_members(tmp_path):
    """The lab's oracle: to it members are strangers, and the base, which knows them, leaks next to all there is to leak."""
    exam = exam_of(tmp_path)
    subjects = [Subject("base", LAB_BASE, "", "base"), Subject("oracle", LAB_ORACLE, "", "base")]
    _, readings = read_all(subjects, exam, tmp_path, tmp_path, Watch())
    of_oracle = scores_of(readings["oracle"], exam)["mia.min_k.forget"]
    assert of_oracle.ci95[0] < 0.5 < of_oracle.ci95[1]
    retrained = tmp_path / "retrained.json"
    retrained.write_text(json.dumps({"models": {"oracle": {"mia.min_k.forget": {"value": of_oracle.value}}}}))
    exam = exam_of(tmp_path, retrained=str(retrained), retrained_name="oracle")
    assert scores_of(readings["base"], exam)["mia.privleak.forget"].value < -0.8
    assert scores_of(readings["oracle"], exam)["mia.privleak.forget"].value == 0


def test_the_gradient_norm_is_that_of_the_library_loss(tmp_path):
    model, exam = load_model(LAB_SMALL, "float32"), exam_of(tmp_path)
    prompt, answer = answered(Renderer(load_tokenizer(LAB_SMALL), exam.prompt), exam, "strangers", "")[0]
    model(
        input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
    ).loss.backward()
    expected = sum(float(weight.grad.square().sum()) for weight in model.parameters() if weight.grad is not None) ** 0.5
    assert gradient_norm(model, prompt, answer) == pytest.approx(expected, rel=1e-4)
