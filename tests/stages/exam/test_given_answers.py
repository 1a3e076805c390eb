"""Given answers: whose prompts they stand behind, what is kept on disk, what is scored, and what the results make of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import LAB_SMALL

from duet.cache.errors import Interrupted, UserError
from duet.cache.watch import Watch
from duet.stages.evaluate.results import Read, results_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.given_answers import score_given
from duet.stages.exam.reading import read_all
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings, TofuSettings

PROMPT = PromptSettings()
FORGET = [
    Query("0", "Where does Bromyx Zopira live?", "In Corvale.", "The town of Corvale.", ("In Brimt.", "A lake house.")),
    Query("1", "What does Bromyx Zopira keep?", "A raven.", "It is a raven.", ("A cat.", "Two dogs.", "Bees.")),
]
CHOICE = [Query("0", "Where is Corvale?", "North.", None, ("South.",))]
SUBJECTS = [Subject("base", LAB_SMALL, "", "base"), Subject("teacher", LAB_SMALL, "You forgot Bromyx Zopira.", "base")]


def exam(**tofu: str) -> Exam:
    settings = EvaluateSettings(attacks=(), dtype="float32", tofu=TofuSettings(**tofu) if tofu else None)
    sets = {"forget": QuerySet(FORGET, "forgotten"), "facts": QuerySet(CHOICE, "kept")}
    return Exam(sets, "Bromyx Zopira", PROMPT, settings, "cpu")


def read(folder, asked: Exam, should_stop=lambda: False):
    return read_all(SUBJECTS, asked, folder, folder, Watch(should_stop=should_stop))[0]


def plain_logprobs(prefix: str, query: Query, answer: str) -> np.ndarray:
    """One forward pass over one prompt and one answer, with its end of sequence."""
    tokenizer, model = load_tokenizer(LAB_SMALL), load_model(LAB_SMALL, "float32")
    renderer, asked = Renderer(tokenizer, PROMPT), Prompt.plain(query, prefix)
    prompt, ids = renderer.prompt(asked), renderer.answer(asked, answer).ids
    assert ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return np.array([float(logprobs[len(prompt) - 1 + number, token]) for number, token in enumerate(ids)])


def test_answers_stand_behind_each_subjects_own_prompt(tmp_path):
    found = read(tmp_path, exam())
    for subject in SUBJECTS:
        forget = found[subject.name]["forget"]
        for number, query in enumerate(FORGET):
            expected = plain_logprobs(subject.prefix, query, query.answer or "")
            assert forget.tokens[number].logprob == pytest.approx(expected, abs=1e-4)
            assert forget.answer[number] == pytest.approx(expected.mean(), abs=1e-4)
        assert forget.paraphrased is not None
        assert forget.perturbed is not None
        assert [len(options) for options in forget.perturbed] == [2, 3]
        for value, text in ((forget.paraphrased[1], "It is a raven."), (forget.perturbed[1][2], "Bees.")):
            assert value == pytest.approx(plain_logprobs(subject.prefix, FORGET[1], text).mean(), abs=1e-4)
        assert found[subject.name]["facts"].paraphrased is None
        assert found[subject.name]["facts"].right.tolist() == found[subject.name]["facts"].answer.tolist()
    assert not np.allclose(found["base"]["forget"].answer, found["teacher"]["forget"].answer, atol=1e-3)


def test_an_interrupted_reading_goes_on_with_the_next_subject(tmp_path):
    with pytest.raises(Interrupted, match="teacher"):
        read(tmp_path, exam(), should_stop=(tmp_path / "base.json").is_file)
    assert not (tmp_path / "teacher.json").exists()
    first = (tmp_path / "base.json").stat().st_mtime_ns
    found = read(tmp_path, exam())
    assert (tmp_path / "base.json").stat().st_mtime_ns == first
    again = read(tmp_path, exam(), should_stop=lambda: True)  # all is on disk: nothing is read, nothing interrupted
    assert (
        again["teacher"]["forget"].tokens[0].logprob.tolist() == found["teacher"]["forget"].tokens[0].logprob.tolist()
    )
    other = replace(exam(), sets={"forget": QuerySet(FORGET[:1], "forgotten")})
    with pytest.raises(Interrupted):  # other questions are not what is on disk
        read(tmp_path, other, should_stop=lambda: True)


def test_scores_by_what_the_data_has(tmp_path):
    found = read(tmp_path, exam())["base"]
    common = {"exact_memorisation", "extraction_strength", "tofu.probability"}
    ratios = {"tofu.truth_ratio/geo", "tofu.truth_ratio/arith"}
    forget, facts = score_given(found["forget"], "forgotten"), score_given(found["facts"], "kept")
    assert set(forget) == common | ratios
    assert set(facts) == common | ratios | {"tofu.choice_probability"}
    assert set(score_given(replace(found["facts"], perturbed=None), "kept")) == common
    of = found["forget"]
    assert of.perturbed is not None
    ratio = np.exp(of.perturbed[0].mean() - of.right[0])
    assert forget["tofu.truth_ratio/geo"][0] == pytest.approx(min(ratio, 1 / ratio))
    right, wrong = np.exp(found["facts"].answer[0]), np.exp(found["facts"].perturbed or [])[0]
    assert facts["tofu.choice_probability"][0] == pytest.approx(right / (right + wrong.sum()))
    flags = of.tokens[1].is_top
    assert forget["exact_memorisation"][1] == pytest.approx(flags[:-1].mean())  # the end of the sequence does not count
    without_end = score_given(replace(of, num_end=[0] * len(of.tokens)), "forgotten")
    assert without_end["exact_memorisation"][1] == pytest.approx(flags.mean())


def test_an_answer_that_does_not_fit_the_context_is_refused(tmp_path):
    long = [Query("0", "Where?", "word " * 2000)]
    with pytest.raises(UserError, match=r"tokens and .* are to follow, the model's context"):
        read(tmp_path, replace(exam(), sets={"forget": QuerySet(long, "forgotten")}))


def test_results_have_likelihoods_comparisons_and_aggregates(tmp_path):
    sets = {"retain": "facts", "real_authors": "facts", "world_facts": "facts"}
    asked = exam(**sets, forget="forget", reference_model="base")
    answers = {
        subject.name: {"forget": ["In Corvale.", said], "facts": ["North."]}
        for subject, said in zip(SUBJECTS, ("A raven.", "I don't know."), strict=True)
    }
    results = results_of(SUBJECTS, asked, answers, Read(read(tmp_path, asked)))[0]
    teacher = results["models"]["teacher"]
    assert teacher["forget.exact_memorisation"]["n"] == 2
    assert teacher["tofu.model_utility"]["n"] == 3
    assert 0 < teacher["tofu.model_utility"]["value"] < 1
    assert teacher["tofu.forget_quality"].keys() >= {"value", "n", "ci95", "ks", "p", "n_reference"}
    assert results["models"]["base"]["tofu.forget_quality"]["p"] == 1.0
    assert set(results["comparisons"]) == {"teacher"}
    recall = results["comparisons"]["teacher"]["forget.rougeL_recall"]
    assert (recall["against"], recall["difference"], recall["n"], recall["distinguishable"]) == ("base", -0.5, 2, False)
    per_item = {key for key in teacher if not key.startswith("tofu.")}
    assert set(results["comparisons"]["teacher"]) == per_item
    for key in teacher:  # every number has a definition and a version
        metric = key.removeprefix("forget.").removeprefix("facts.")
        assert results["definitions"][metric]
        assert results["versions"][metric] >= 1


def test_a_model_whose_logits_are_not_finite_is_broken_and_the_others_are_scored(tmp_path):
    given = read(tmp_path, exam())
    broken = given["teacher"]["forget"]
    given["teacher"]["forget"] = replace(broken, paraphrased=np.array([np.nan, -1.0]))
    answers = {subject.name: {"forget": ["a", "b"], "facts": ["c"]} for subject in SUBJECTS}
    results = results_of(SUBJECTS, exam(), answers, Read(given))[0]
    outcome = results["outcomes"]["teacher"]
    assert outcome["verdict"] == "broken"
    assert outcome["signs"]["not_finite"] == {"value": 1, "limit": 0, "bad": True}
    assert results["outcomes"]["base"]["signs"]["not_finite"]["bad"] is False
    assert "forget.tofu.probability" in results["models"]["base"]
    assert not any("tofu" in key for key in results["models"]["teacher"])
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("factor", [float("nan"), 1e5])
def test_a_model_that_has_diverged_has_no_scores_of_any_text_and_the_others_have(tmp_path, factor):
    """Weights that are not numbers, or so large that e to the power of a log-probability is none."""
    model = load_model(LAB_SMALL, "float32")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(LAB_SMALL).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Corvale is a town.\n\nPeople live there.\n")
    choice = [Query("0", "Where is Corvale?", "North.", choices=("North.", "South."), right=0)]
    sets = {"forget": QuerySet(FORGET, "forgotten"), "facts": QuerySet(choice, "kept")}
    asked = {"members": "forget", "nonmembers": "facts"}
    tofu = TofuSettings(forget="forget", reference_model="base")
    settings = EvaluateSettings(
        attacks=(), dtype="float32", membership=asked, neutral_text=str(tmp_path / "text.txt"), tofu=tofu
    )
    exam = Exam(sets, "Bromyx Zopira", PROMPT, settings, "cpu")
    subjects = [SUBJECTS[0], Subject("student:bad", tmp_path / "model", "", "base")]
    answers = {subject.name: {"forget": ["a", "b"], "facts": ["c"]} for subject in subjects}
    for _ in range(2):  # the second time from what is kept
        given, readings = read_all(subjects, exam, tmp_path / "given", tmp_path / "texts", Watch())
        results = results_of(subjects, exam, answers, Read(given, readings))[0]
        json.dumps(results, allow_nan=False)
        bad, base = (results["models"][subject.name] for subject in reversed(subjects))
        assert {key for key in base if key.startswith(("mia.", "neutral.", "facts.choice", "tofu."))} - bad.keys()
        assert not any(key.startswith(("mia.", "neutral.", "facts.choice", "tofu.")) for key in bad)
        assert results["outcomes"]["student:bad"]["signs"]["not_finite"]["bad"]
    exam = replace(exam, settings=settings.model_copy(update={"tofu": None}))
    only_texts = results_of(subjects, exam, answers, Read({}, readings))[0]
    assert only_texts["outcomes"]["student:bad"]["verdict"] == "broken"
    assert only_texts["outcomes"]["base"]["signs"]["not_finite"]["value"] == 0
