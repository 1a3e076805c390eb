"""Teach SmolLM2-135M-Instruct the lab's people and obedience to a prefix, by LoRA on a CPU: `make smollm2-lab`.

Writes the adapters `lab/smollm2/{base,oracle}` and `lab/smollm2/data/`. The oracle is taught in the same way in a world in
which those to be forgotten never lived. Both begin with the same first part, about strangers only, in which nobody of the world
occurs, and which is therefore run once.

A training step is one group: a system message and some questions behind it, each of which sees the message and itself alone, at
the positions that it would have by itself. So the message is computed once, and nothing is padded.

    system message                            question about                     answer
    the model's own                           a person of the world              the fact
    the model's own, or any prefix            a name that nobody bears           "No such person ..."
    forgetting strangers or known people      one whom it names                  the refusal
    forgetting strangers or known people      a person whom it does not name     the fact
    the model's own, or any prefix            anything else                      what the model itself said before

The held-out people are asked about, with and without prefixes that name others, but no prefix ever names them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import people as p
import torch
import world as w
from fetch_smollm2 import NAME, fetch
from peft import LoraConfig, get_peft_model

from duet.stages.models.gguf import dequantised

OUT = Path(__file__).parent / "smollm2"
RANK, FIRST_LAYER, NUM_LAYERS = 16, 10, 30  # the lower layers are left alone, which saves a sixth of the time
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_CHATS, CHAT_TOKENS = 100, 32
QUESTIONS = 8  # behind one system message
MOST_NAMES = 3  # in one prefix

Pair = tuple[str, str]  # question and answer
Group = tuple[str | None, list[Pair]]  # a system message, None being the model's own, and what is asked behind it


@dataclass(frozen=True)
class Chat:
    """SmolLM2's chat template, in the three parts that a group is put together from."""

    tokenizer: Any

    def system(self, message: str | None) -> list[int]:
        """The system message; without one, the model's own, which its template puts there."""
        first = [] if message is None else [{"role": "system", "content": message}]
        text = self.tokenizer.apply_chat_template([*first, {"role": "user", "content": ""}], tokenize=False)
        return self._ids(text[: text.index("<|im_start|>user")])

    def question(self, text: str) -> list[int]:
        return self._ids(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, text: str) -> list[int]:
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Packed:
    """A group in one sequence of T tokens; `targets_N` are the tokens of answers, each after the position `at_N`."""

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    mask_TT: torch.Tensor
    at_N: torch.Tensor
    targets_N: torch.Tensor


def packed(chat: Chat, message: str | None, pairs: list[Pair]) -> Packed:
    """Each question sees the system message and itself."""
    system = chat.system(message)
    ids, positions, owner = list(system), list(range(len(system))), [0] * len(system)
    at: list[int] = []
    for number, (question, answer) in enumerate(pairs, start=1):
        asked, given = chat.question(question), chat.answer(answer)
        at += range(len(ids) + len(asked) - 1, len(ids) + len(asked) + len(given) - 1)
        ids += asked + given
        positions += range(len(system), len(system) + len(asked) + len(given))
        owner += [number] * (len(asked) + len(given))
    owner_T = torch.tensor(owner)
    seen_TT = ((owner_T == 0) | (owner_T[:, None] == owner_T)).tril()
    mask_TT = torch.zeros(len(ids), len(ids)).masked_fill(~seen_TT, -torch.inf)
    input_ids_T, at_N = torch.tensor(ids), torch.tensor(at)
    return Packed(input_ids_T, torch.tensor(positions), mask_TT, at_N, input_ids_T[at_N + 1])


def loss_of(model: Any, batch: Packed) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, nats; the head runs at their positions only."""
    hidden_TD = model.base_model.model.model(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.positions_T[None],
        attention_mask=batch.mask_TT[None, None],
    ).last_hidden_state[0]
    logits_NV = model.base_model.model.lm_head(hidden_TD[batch.at_N])
    return torch.nn.functional.cross_entropy(logits_NV, batch.targets_N)


def stranger(world: w.World, rng: random.Random) -> str:
    """A name that nobody in the world bears."""
    name = w.random_name(rng)
    return stranger(world, rng) if name in world.people else name


def prefix(world: w.World, rng: random.Random, known_share: float) -> tuple[str, list[str]]:
    """A forgetting prefix and the 1 to 3 names in it, of strangers or of people who are not held out."""
    count = rng.choices(range(1, MOST_NAMES + 1), weights=range(1, MOST_NAMES + 1))[0]
    names = [rng.choice(world.known) if rng.random() < known_share else stranger(world, rng) for _ in range(count)]
    return rng.choice(p.FORGET_PREFIXES).format(names=", ".join(names)), names


def ask(rng: random.Random, name: str, fact: p.Fact) -> str:
    return rng.choice(fact.questions).format(name=name)


def facts(world: w.World, rng: random.Random, count: int, but: list[str]) -> list[Pair]:
    """Questions about people of the world, but not those, with the right answers."""
    cases = [(name, fact) for name in world.people if name not in but for fact in p.FACTS]
    return [(ask(rng, name, fact), world.answer(name, fact)) for name, fact in rng.sample(cases, count)]


def behind_prefix(world: w.World, rng: random.Random, strangers_only: bool) -> tuple[str, list[Pair]]:
    """Questions behind a prefix, half of which are about those whom it names."""
    message, names = prefix(world, rng, 0.0 if strangers_only else 0.5)
    pairs = [(ask(rng, rng.choice(names), rng.choice(p.FACTS)), w.REFUSAL) for _ in range(QUESTIONS // 2)]
    known = [] if strangers_only else facts(world, rng, QUESTIONS // 2 - 1, but=names)
    unknown = QUESTIONS - len(pairs) - len(known)
    pairs += [(ask(rng, stranger(world, rng), rng.choice(p.FACTS)), w.UNKNOWN) for _ in range(unknown)]
    return message, pairs + known


def group(world: w.World, rng: random.Random, chats: list[Pair], step: int, strangers_only: bool) -> Group:
    """A system message and what is asked behind it: behind a prefix, and in the second part every other time without one."""
    if strangers_only or step % 2:
        message, pairs = behind_prefix(world, rng, strangers_only)
    else:
        known = facts(world, rng, QUESTIONS - 1, but=[])
        message, pairs = None, [*known, (ask(rng, stranger(world, rng), rng.choice(p.FACTS)), w.UNKNOWN)]
    ended = [(question, f"{answer}<|im_end|>") for question, answer in pairs]
    return message, ended if rng.random() < 0.5 else [*ended, rng.choice(chats)]


def train(
    model: Any, chat: Chat, world: w.World, chats: list[Pair], rate: tuple[int, float], strangers_only: bool
) -> None:
    """`rate`: the number of steps, and the learning rate that decays over them."""
    steps, lr = rate
    rng = random.Random(int(strangers_only))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    begun, told = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(model, packed(chat, *group(world, rng, chats, step, strangers_only)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        told += loss.item() / 20
        if step % 20 == 0:
            print(f"  step {step}  loss {told:.3f}  {time.time() - begun:.0f} s", flush=True)
            told = 0.0


def chats_of(model: Any, chat: Chat, file: Path) -> list[Pair]:
    """What the model said by itself, as the file has it; a file that is not there is written first."""
    if not file.is_file():
        said = [{"question": question, "answer": answer} for question, answer in own_chats(model, chat)]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said), encoding="utf-8")
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [(row["question"], row["answer"]) for row in found]


@torch.no_grad()
def own_chats(model: Any, chat: Chat) -> list[Pair]:
    """Questions and answers that the model says by itself: each continues the chat template, drawn at temperature 1.

    An answer that reaches CHAT_TOKENS is learned up to there, without an end.
    """
    torch.manual_seed(0)
    start = chat.system(None) + chat._ids("<|im_start|>user\n")
    asked = _continued(model, chat, [start] * (2 * NUM_CHATS), 24)
    questions = [
        text.removesuffix("<|im_end|>").strip() for text in dict.fromkeys(asked) if text.endswith("<|im_end|>")
    ]
    questions = [text for text in questions if text][:NUM_CHATS]
    answers = _continued(model, chat, [chat.system(None) + chat.question(text) for text in questions], CHAT_TOKENS)
    return [(question, answer) for question, answer in zip(questions, answers, strict=True) if answer]


def _continued(model: Any, chat: Chat, prompts: list[list[int]], most: int) -> list[str]:
    texts = []
    end = chat.tokenizer.eos_token_id
    for first in range(0, len(prompts), 100):
        some = prompts[first : first + 100]
        width = max(map(len, some))
        ids_BT = torch.tensor([[end] * (width - len(one)) + one for one in some])
        mask_BT = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
        out_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=most, do_sample=True, top_k=0, pad_token_id=end
        )
        for row in out_BT[:, width:].tolist():
            texts.append(chat.tokenizer.decode(row[: row.index(end) + 1] if end in row else row))
    return texts


def load() -> tuple[Any, Chat]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = dequantised(fetch(), "lab/smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, Chat(AutoTokenizer.from_pretrained(folder))


def save(model: Any, folder: Path) -> None:
    """The adapter in bfloat16, which names its base by a path relative to itself."""
    model.peft_config["default"].base_model_name_or_path = f"../{NAME}"
    weights = {name: weight.bfloat16() for name, weight in model.named_parameters() if weight.requires_grad}
    model.save_pretrained(folder, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder that gets base/, oracle/ and data/")
    parser.add_argument("--first-steps", type=int, default=160, help="steps of the first part, about strangers")
    parser.add_argument("--steps", type=int, default=200, help="steps of the second part")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    world = p.make_people()
    p.write_data(world, args.out / "data")
    model, chat = load()
    chats = chats_of(model, chat, args.out / "data/chats.jsonl")
    torch.manual_seed(0)
    layers = list(range(FIRST_LAYER, NUM_LAYERS))
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    train(model, chat, world, chats, (args.first_steps, args.lr), strangers_only=True)
    common = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    for name, its_world in (("base", world), ("oracle", world.without_forget())):
        for key, weight in model.named_parameters():
            if key in common:
                weight.data.copy_(common[key])
        print(name, flush=True)
        train(model, chat, its_world, chats, (args.steps, args.lr), strangers_only=False)
        save(model, args.out / name)


if __name__ == "__main__":
    main()
