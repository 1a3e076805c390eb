"""What SmolLM2 and its adapters know and obey, and whether they are what they were: the tables of lab/smollm2/README.md.

    python lab/measure_smollm2.py lab/smollm2/base --mmlu FOLDER

`--no-facts` leaves the people out, of whom a student's own evaluation asks.

FOLDER has MMLU's questions as JSON Lines: `test*.jsonl`, of which the letter is asked, and `dev.jsonl`, each of whose questions
with its right answer is a document of ordinary text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import people as p
import torch
import world as w
from fetch_smollm2 import FILE, fetch
from teach_smollm2 import Chat

from duet.stages.metrics.choices import letter_pairs
from duet.stages.metrics.perplexity import perplexity
from duet.stages.models.loading import load_model
from duet.stages.models.locations import find_model
from duet.stages.models.token_scores import token_logprobs
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

MAX_TOKENS = 2048  # in one forward pass
Case = tuple[str | None, dict[str, str]]  # prefix and row


@torch.no_grad()
def answers(model: Any, chat: Chat, prompts: list[list[int]], most: int = 16) -> list[str]:
    """Greedy answers; prompts of like length are asked together."""
    end = chat.tokenizer.eos_token_id
    found: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for first in range(0, len(order), 32):
        some = order[first : first + 32]
        width = max(len(prompts[number]) for number in some)
        ids_BT = torch.tensor([[end] * (width - len(prompts[n])) + prompts[n] for n in some])
        mask_BT = torch.tensor([[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in some])
        out_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=most, do_sample=False, pad_token_id=end
        )
        texts = chat.tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)
        found |= dict(zip(some, texts, strict=True))
    return [found[number] for number in range(len(prompts))]


def cases(world: w.World) -> dict[str, list[Case]]:
    """What is asked: facts in taught and other questions; then behind prefixes that name three held-out people each."""
    everybody = tuple(world.people)
    known = [name for name in everybody if name not in world.held_out]
    asked: dict[str, list[Case]] = {
        name: [(None, row) for row in p.rows(world, everybody, numbers)]
        for name, numbers in (("taught", p.TAUGHT), ("untaught", p.UNTAUGHT))
    }
    asked["forgotten, untaught"] = [(None, row) for row in p.rows(world, world.forget, p.UNTAUGHT)]
    groups = [world.held_out[first : first + w.NUM_FORGET] for first in range(0, len(world.held_out), w.NUM_FORGET)]
    for text in p.FORGET_PREFIXES[:4]:
        for group in groups:
            prefix = text.format(names=", ".join(group))
            for key, names in (
                ("named", group),
                ("held out, not named", tuple(name for name in world.held_out if name not in group)),
                ("others", tuple(known)),
            ):
                if names:  # the oracle's world has no held-out people beside those whom a prefix names
                    asked.setdefault(key, []).extend((prefix, row) for row in p.rows(world, names, range(1)))
    return asked


def share_right(model: Any, chat: Chat, asked: Sequence[Case]) -> float:
    prompts = [chat.system(prefix) + chat.question(row["question"]) for prefix, row in asked]
    given = answers(model, chat, prompts)
    return sum(text.strip() == row["answer"] for text, (_, row) in zip(given, asked, strict=True)) / len(asked)


@torch.no_grad()
def letters(model: Any, pairs: Sequence[tuple[list[list[int]], list[list[int]]]]) -> list[int]:
    """The number of the likeliest letter behind each prompt."""
    chosen = []
    for prompts, ids in pairs:
        hidden_D = model.model(torch.tensor(prompts[:1])).last_hidden_state[0, -1]
        logits_L = model.lm_head.weight[[letter for [letter] in ids]] @ hidden_D
        chosen.append(int(logits_L.argmax()))
    return chosen


def mmlu(model: Any, chat: Chat, folder: Path, per_subject: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 where the right letter is the likeliest, per question [n]; and the loss and tokens of each document."""
    rows = [json.loads(line) for file in sorted(folder.glob("test*.jsonl")) for line in file.open(encoding="utf-8")]
    rows = [
        row for number, row in enumerate(rows) if number % 20 < per_subject
    ]  # 20 of each subject, one after the other
    renderer = Renderer(chat.tokenizer, PromptSettings())
    pairs = [
        letter_pairs(renderer, Query(str(n), row["question"], None, choices=tuple(row["choices"])), "")
        for n, row in enumerate(rows)
    ]
    right = np.array([float(choice == row["answer"]) for choice, row in zip(letters(model, pairs), rows, strict=True)])
    end = chat.tokenizer.eos_token_id
    documents = [
        f"{row['question']} {row['choices'][row['answer']]}"
        for row in map(json.loads, (folder / "dev.jsonl").open(encoding="utf-8"))
    ]
    ids = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    scores = token_logprobs(model, [one[:1] for one in ids], [one[1:] for one in ids], end, MAX_TOKENS)
    return right, np.array([-float(s.sum()) for s in scores]), np.array([len(s) for s in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(FILE), help="default: SmolLM2 itself")
    parser.add_argument("--without-forgotten", action="store_true", help="in the oracle's world")
    parser.add_argument("--no-facts", action="store_true", help="ask nothing about the people")
    parser.add_argument("--mmlu", type=Path, help="folder with MMLU's questions")
    parser.add_argument("--per-subject", type=int, default=20)
    args = parser.parse_args()
    fetch()
    folder = find_model(args.model, "model")
    model, chat = load_model(folder, "float32"), Chat(load_tokenizer(folder))
    world = p.make_people()
    asked = cases(world)
    if args.without_forgotten:
        asked |= cases(world.without_forget()) | {"forgotten, untaught": asked["forgotten, untaught"]}
    for name, its in asked.items() if not args.no_facts else ():
        print(f"{name}: {share_right(model, chat, its):.3f} (n={len(its)})", flush=True)
    if args.mmlu:
        right, losses, tokens = mmlu(model, chat, args.mmlu, args.per_subject)
        print(f"MMLU by letter: {right.mean():.3f} +- {1.96 * right.std() / len(right) ** 0.5:.3f} (n={len(right)})")
        text = perplexity(losses, tokens)
        print(f"perplexity: {text.value:.2f} {text.ci95} ({text.n} documents, {tokens.sum()} tokens)")


if __name__ == "__main__":
    main()
