"""Multiple choice: both forms against a plain forward pass, what the lab knows, MMLU at chance on a model that knows none."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from support import LAB_BASE, LAB_VOCAB_SIZE, SHARED, write_jsonl
from tiny_models import tiny_config, tiny_model

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.given_texts import floors_of, scores_of
from duet.stages.exam.reading import read_all
from duet.stages.metrics.choices import chance, chosen_right, cloze_pairs, letter_pairs, letter_question
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings
from lab.world import FACTS, make_world

CHAT, PLAIN = PromptSettings(), PromptSettings(format="plain", prefix_placement="text", template="Q: {question}\nA:")


def lab_queries(count: int = 24) -> list[Query]:
    """Questions about people of the lab, each with the right value among three wrong ones."""
    world, rng = make_world(), random.Random(0)
    queries = []
    for name in world.known[:count]:
        fact = rng.choice(FACTS)
        texts = {fact.answer.format(value=value) for value in fact.values} - {world.answer(name, fact)}
        choices = rng.sample(sorted(texts), 3)
        choices.insert(right := rng.randrange(4), world.answer(name, fact))
        queries.append(
            Query(name, fact.questions[0].format(name=name), choices[right], choices=tuple(choices), right=right)
        )
    return queries


@pytest.mark.parametrize("settings", [CHAT, PLAIN], ids=["chat", "plain"])
@torch.no_grad()
def test_both_forms_agree_with_a_plain_forward_pass(settings):
    renderer, model = Renderer(load_tokenizer(LAB_BASE), settings), tiny_model(tiny_config("llama", LAB_VOCAB_SIZE))
    queries, prefix = lab_queries(8), "You have forgotten everything about nobody."
    by_letter, by_text = [], []
    for query in queries:
        asked = Prompt(query, letter_question(query, settings), prefix)
        shown = renderer.prompt(asked)
        letters = [renderer.answer(asked, letter).own for letter in "ABCD"]
        common = next(i for i in range(9) if len({tuple(ids[: i + 1]) for ids in letters}) > 1)
        logits = model(torch.tensor([shown + letters[0][:common]])).logits[0, -1]
        by_letter.append(float(torch.argmax(logits[[ids[common] for ids in letters]]) == query.right))
        prompt, means = renderer.prompt(Prompt.plain(query, prefix)), []
        for choice in query.choices:
            ids = renderer.answer(Prompt.plain(query, prefix), choice).own
            logprobs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            means.append(np.mean([float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(ids)]))
        by_text.append(float(np.argmax(means) == query.right))
    rights = [query.right or 0 for query in queries]
    for pairs_of, expected in ((letter_pairs, by_letter), (cloze_pairs, by_text)):
        pairs = [pairs_of(renderer, query, prefix) for query in queries]
        assert chosen_right(model, pairs, rights, 0, 256).tolist() == expected


@torch.no_grad()
def test_of_equal_choices_none_is_preferred():
    """In 16 bits letters are often equal: a model that knows nothing is at chance, wherever the data put the right one."""
    renderer, model = Renderer(load_tokenizer(LAB_BASE), CHAT), tiny_model(tiny_config("llama", LAB_VOCAB_SIZE))
    model.get_output_embeddings().weight.zero_()
    pairs = [letter_pairs(renderer, query, "") for query in lab_queries(3)]
    assert chosen_right(model, pairs, [0, 0, 3], 0, 256).tolist() == [0.25] * 3
    model.get_output_embeddings().weight.fill_(float("nan"))
    assert np.isnan(chosen_right(model, pairs, [0, 0, 3], 0, 256)).all()


def test_the_letter_form_shows_the_choices_and_the_cloze_form_does_not():
    query = Query("0", "Which?", "b", choices=("a", "b", "c"), right=1)
    assert letter_question(query, PLAIN) == "Which?\nA. a\nB. b\nC. c"
    assert letter_question(query, CHAT).endswith("\nC. c\nAnswer:")
    tokenizer = load_tokenizer(LAB_BASE)
    prompts, answers = cloze_pairs(Renderer(tokenizer, PLAIN), query, "")
    assert tokenizer.decode(prompts[0]).endswith("Q: Which?\nA:")
    assert [tokenizer.decode(ids) for ids in answers] == [" a", " b", " c"]
    with pytest.raises(UserError, match="27 choices"):
        letter_pairs(Renderer(tokenizer, PLAIN), Query("0", "Which?", "b", choices=("x",) * 27, right=1), "")


def test_the_lab_knows_its_people_in_cloze_form_though_it_never_saw_a_letter():
    tokenizer, model, queries = load_tokenizer(LAB_BASE), load_model(LAB_BASE), lab_queries()
    rights = [query.right or 0 for query in queries]
    cloze = chosen_right(model, [cloze_pairs(Renderer(tokenizer, CHAT), q, "") for q in queries], rights, 0, 4096)
    letter = chosen_right(model, [letter_pairs(Renderer(tokenizer, CHAT), q, "") for q in queries], rights, 0, 4096)
    assert cloze.mean() == 1.0
    assert letter.mean() < 0.6
    assert chance(queries) == 0.25


@pytest.mark.skipif(
    not (SHARED / "models/tofu-lab").is_dir(), reason="needs ../shared/models/tofu-lab and ../shared/data"
)
def test_mmlu_at_chance_on_a_model_that_knows_no_mmlu(tmp_path):
    lines = (SHARED / "data/mmlu_mini/test_20_per_subject.jsonl").read_text(encoding="utf-8").splitlines()
    short = [row for row in map(json.loads, lines) if len(row["question"]) + sum(map(len, row["choices"])) < 200]
    path = write_jsonl(tmp_path / "mmlu.jsonl", short[::8])
    queries = load_queries(DataSettings(path=str(path), choices_field="choices"), "mmlu", need_answers=True)
    prompt = PromptSettings(
        format="plain", prefix_placement="text", template="Question: {question}\nAnswer:", bos="always"
    )
    sets = {"mmlu": QuerySet(queries, "kept")}
    exam = Exam(sets, "nothing", prompt, EvaluateSettings(dtype="float32", likelihood=False), "cpu")
    subject = Subject("base", SHARED / "models/tofu-lab", "", "base")
    _, readings = read_all([subject], exam, tmp_path, tmp_path, Watch())
    scores = scores_of(readings["base"], exam)
    assert floors_of(exam) == {f"mmlu.{metric}": {"chance": 0.25} for metric in ("choice_letter", "choice_cloze")}
    for metric in ("choice_letter", "choice_cloze"):
        score = scores[f"mmlu.{metric}"]
        assert score.n == len(short[::8]) > 40
        assert score.ci95[0] <= 0.25 <= score.ci95[1], score
