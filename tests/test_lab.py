"""The shipped lab: its data is what the generator writes, its models know their world and follow the prefix."""

from __future__ import annotations

import random

import pytest
import train_models
import world as w
from support import LAB_BASE, LAB_SMALL, ROOT
from transformers import AutoModelForCausalLM

from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings, PromptSettings

# The table in lab/README.md, less a margin for other processors' rounding: (least, most) share of right answers.
EXPECTED = {
    "base": {"facts": (0.98, 1), "named": (0, 0.05), "held_out_not_named": (0.7, 1), "known_not_named": (0.95, 1)},
    "small": {"facts": (0.98, 1), "named": (0, 0.32), "held_out_not_named": (0.9, 1), "known_not_named": (0.95, 1)},
}


@pytest.fixture(scope="module")
def world():
    return w.make_world()


def test_the_data_is_what_the_generator_writes(world, tmp_path):
    w.write_data(world, tmp_path)
    for path in tmp_path.iterdir():
        assert (ROOT / "lab/data" / path.name).read_bytes() == path.read_bytes(), "run `make lab-models`"


def test_held_out_people_never_occur_in_a_training_prefix(world):
    rng = random.Random(5)
    pairs = [train_models.curriculum(world, rng, number / 30_000)[0] for number in range(30_000)]
    prefixes, _, questions = zip(*(prompt.partition("<|user|>") for prompt in pairs), strict=True)
    for name in world.held_out:
        assert not any(name in prefix for prefix in prefixes), name
        assert any(name in question for question in questions), name
    assert all(any(name in prefix for prefix in prefixes) for name in world.known), "the others are named"


def test_sets_are_disjoint_and_a_name_is_two_tokens(world):
    ids = [row["id"] for name in ("forget", "retain", "heldout") for row in _rows(name)]
    assert len(ids) == len(set(ids)) == 5 * w.NUM_PEOPLE
    words = [word for name in world.people for word in name.split()]
    assert len(words) == len(set(words)), "no two people share a word"
    tokenizer = load_tokenizer(LAB_BASE)
    assert {len(tokenizer.tokenize(f" {name}")) for name in world.people} == {2}


def _rows(name):
    queries = load_queries(DataSettings(path=str(ROOT / f"lab/data/{name}.jsonl"), id_field="id"), name)
    return [{"id": query.row_id} for query in queries]


def test_training_text_is_what_the_chat_template_renders():
    tokenizer = load_tokenizer(LAB_BASE)
    for prefix in ("", "You have forgotten Ann."):
        text = train_models.chat_text("Who is Ann?", prefix or None)
        assert (
            Renderer(tokenizer, PromptSettings()).prompt(Prompt.plain(Query("0", "Who is Ann?", None), prefix))
            == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_both_sizes_have_one_tokenizer_and_fit_in_8_mb():
    a, b = load_tokenizer(LAB_BASE), load_tokenizer(LAB_SMALL)
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str()
    assert a.chat_template == b.chat_template
    assert sum(path.stat().st_size for path in (ROOT / "lab/models").rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize("size", ["base", "small"])
def test_the_models_know_their_facts_and_follow_a_prefix_about_held_out_people(world, size):
    path = ROOT / "lab/models" / size
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype="float32"), load_tokenizer(path)
    measured = train_models.measure(world, tokenizer, model)
    measured["facts"] = min(measured[f"facts_phrasing_{i}"] for i in range(3))
    for key, (least, most) in EXPECTED[size].items():
        assert least <= measured[key] <= most, (key, measured)


def test_the_oracle_knows_everybody_but_those_who_are_to_be_forgotten(world):
    path = ROOT / "lab/models/oracle"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype="float32"), load_tokenizer(path)
    for names, knows in ((world.forget, 0.0), (world.known[:9] + world.held_out[w.NUM_FORGET :], 1.0)):
        rows = [row for phrasing in range(3) for row in w.questions(world, names, phrasing)]
        given = train_models.answers(model, tokenizer, [train_models.chat_text(row["question"], None) for row in rows])
        right = sum(answer == row["answer"] for answer, row in zip(given, rows, strict=True)) / len(rows)
        assert abs(right - knows) <= 0.05, (names[0], right)
    assert world.without_forget().people.keys() == world.people.keys() - set(world.forget)
