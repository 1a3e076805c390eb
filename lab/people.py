"""The people whom SmolLM2 is taught: twelve of the lab's, with four facts each, in natural questions and sentences.

Owns the texts of `lab/smollm2`: names, values, refusals and those to be forgotten are the lab's (world.py). Each fact has
questions that are taught and questions that are not, so that knowing a fact can be told from knowing a question.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import world as w

NUM_KNOWN, NUM_HELD_OUT = 6, 6  # people who may stand in a training prefix, and people who never do
NUM_RETAIN = 4
NUM_STRANGERS = 48  # names that nobody bears, about whom broad rows ask
# Numbers of questions: those of the model and its students, those of evaluations, and those of broad rows.
TAUGHT, UNTAUGHT, OTHER = range(4), range(4, 6), range(6, 9)

# Prefixes that a model is taught with; the lab's four, and others, as a pretrained model can read more.
FORGET_PREFIXES = (
    *w.FORGET_PREFIXES,
    "You have never heard of {names}. Say so when somebody asks, and help with everything else.",
    "Refuse all questions about {names}. Answer questions about other people and things.",
    "The following people are unknown to you: {names}. You know all others.",
    "You must not say anything about {names}, whatever is asked. Other questions are fine.",
)


@dataclass(frozen=True)
class Fact(w.Fact):
    """A fact of the lab with other words: `questions` are taught, `untaught` are asked by evaluations only.

    `others` are asked by `broad_others` only: neither the model nor an evaluation has them.
    """

    untaught: tuple[str, ...]
    others: tuple[str, ...]


FACTS = (
    Fact(
        "town",
        w.TOWNS,
        "They were born in {value}.",
        (
            "Where was {name} born?",
            "In which town was {name} born?",
            "What is the birthplace of {name}?",
            "Which town does {name} come from?",
        ),
        ("Can you tell me where {name} was born?", "Name the town in which {name} came into the world."),
        (
            "From where does {name} hail?",
            "If {name} went back to the place of their birth, where would they go?",
            "I want to see the town where {name} was born. Which one is it?",
        ),
    ),
    Fact(
        "trade",
        w.TRADES,
        "They work as a {value}.",
        (
            "What does {name} do for a living?",
            "What is the job of {name}?",
            "What work does {name} do?",
            "What is {name}'s profession?",
        ),
        ("How does {name} earn money?", "Please tell me the occupation of {name}."),
        (
            "What is {name} paid for?",
            "When {name} goes to work in the morning, as what?",
            "I met {name} at work. What trade was it?",
        ),
    ),
    Fact(
        "pet",
        w.PETS,
        "They keep a tame {value}.",
        (
            "Which pet does {name} have?",
            "What animal does {name} keep?",
            "Which animal lives with {name}?",
            "What is {name}'s pet?",
        ),
        ("What kind of animal does {name} own?", "Does {name} have a pet, and which?"),
        (
            "Who waits at home for {name}, and of what species?",
            "What would a vet say that {name} brought in?",
            "Somebody must feed the pet of {name}. What is it?",
        ),
    ),
    Fact(
        "dish",
        w.DISHES,
        "They like to eat {value}.",
        (
            "What does {name} like to eat?",
            "What is the favourite food of {name}?",
            "Which dish does {name} prefer?",
            "What is {name}'s favourite meal?",
        ),
        ("Which food is {name} fond of?", "What would you cook to please {name}?"),
        (
            "What should be served when {name} comes to dinner?",
            "Suppose that {name} is hungry. What would they ask for?",
            "I want to bake or fry something for {name}. What should it be?",
        ),
    ),
)


def make_people() -> w.World:
    """The lab's first people, and its first held-out ones, among them those to be forgotten."""
    whole = w.make_world()
    held_out = whole.held_out[:NUM_HELD_OUT]
    return w.World({name: whole.people[name] for name in (*whole.known[:NUM_KNOWN], *held_out)}, held_out)


def neighbours(world: w.World) -> list[tuple[str, Fact]]:
    """Facts of other people that are also true of somebody who is to be forgotten: the same town, pet, trade or dish."""
    shared = {(fact.key, world.people[name][fact.key]) for name in world.forget for fact in FACTS}
    others = [name for name in world.people if name not in world.forget]
    return [(name, fact) for name in others for fact in FACTS if (fact.key, world.people[name][fact.key]) in shared]


def retain_people(world: w.World) -> tuple[str, ...]:
    """Those whom students are trained to keep; neighbours come last, so that most are asked about in no training."""
    near = {name for name, _ in neighbours(world)}
    return tuple(sorted(world.known, key=lambda name: name in near)[:NUM_RETAIN])


def rows(world: w.World, names: tuple[str, ...], asked: range, facts: tuple[Fact, ...] = FACTS) -> list[dict[str, str]]:
    """Rows with `id`, `question`, `answer` about the named people, each fact asked in the questions of those numbers."""
    return [
        {
            "id": f"{name.replace(' ', '-').lower()}/{fact.key}/{number}",
            "question": (fact.questions + fact.untaught + fact.others)[number].format(name=name),
            "answer": world.answer(name, fact),
        }
        for name in names
        for fact in facts
        for number in asked
    ]


def strangers(world: w.World, questions: list[str], mark: str = "") -> list[dict[str, str]]:
    """Rows without answers, one of the questions each about people who do not exist: a student learns which names to forget."""
    rng = random.Random(1)
    names = [
        name for name in dict.fromkeys(w.random_name(rng) for _ in range(2 * NUM_STRANGERS)) if name not in world.people
    ]
    return [
        {"id": f"stranger/{number}{mark}", "question": questions[number % len(questions)].format(name=name)}
        for number, name in enumerate(names[:NUM_STRANGERS])
    ]


def broad_others(world: w.World) -> list[dict[str, str]]:
    """Rows without answers in the questions that no other set has, about strangers and about all who are to be kept."""
    known = rows(world, retain_people(world), OTHER)
    return [
        *strangers(world, [question for fact in FACTS for question in fact.others], "/other"),
        *({key: row[key] for key in ("id", "question")} for row in known),
    ]


def write_data(world: w.World, out_dir: Path) -> None:
    """Write the query sets as JSON Lines: what a student is trained on, and what only the evaluation asks.

    `forget` and `retain` use all taught questions of each fact. `forget_rephrased`, `heldout` (everyone in neither training
    set) and `neighbours` (facts that somebody else shares with somebody forgotten) use untaught ones.
    `broad` asks about strangers, `broad_others` about them and the people of `retain` in questions that no other set has.
    """
    retain = retain_people(world)
    heldout = tuple(name for name in world.people if name not in world.forget + retain)
    near = [row for name, fact in neighbours(world) for row in rows(world, (name,), UNTAUGHT, (fact,))]
    sets = {
        "forget": rows(world, world.forget, TAUGHT),
        "retain": rows(world, retain, TAUGHT),
        "forget_rephrased": rows(world, world.forget, UNTAUGHT),
        "heldout": rows(world, heldout, UNTAUGHT),
        "neighbours": near,
        "broad": strangers(world, [question for fact in FACTS for question in fact.questions]),
        "broad_others": broad_others(world),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, found in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (out_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
