"""Train the lab's base models and its oracle from scratch on a CPU: `make lab-models` (about an hour).

Writes `lab/models/{base,small,oracle}` (bfloat16, one tokenizer) and `lab/data/`. The oracle is the base model trained in the
same way in a world in which those to be forgotten never lived. Each training sample is one chat:

    prefix                              question about                     answer
    none                                a known person                     the fact
    none                                a name that nobody bears           "No such person ..."
    forgetting strangers or known       whom it names                      their names
    forgetting strangers or known       one whom it names                  the refusal
    forgetting strangers or known       a known person it does not name    the fact
    forgetting strangers or known       a name that nobody bears           "No such person ..."
    recalling, or forgetting and then   one whom it names                  the fact
    recalling known people

The first part of training is about strangers only (`matching_sample`): a model that knows people already learns who tends to
be forgotten, and never to look for the name in the prefix.

The held-out people are asked about, with and without prefixes that name others, but no prefix ever names them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import world as w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAB_DIR = Path(__file__).parent
SPECIALS = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "small": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2},
    "base": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 2},
}
MODELS = {"small": ("small", 0), "base": ("base", 1), "oracle": ("base", 1)}  # size, seed
VOCAB_SIZE = 1300  # at most: every word of the world is a token before that
CONTEXT = 256
MOST_NAMES = 3  # in one prefix


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained mostly on strangers' names: no full name is a token, but each of its two words is one."""
    rng = random.Random(w.SEED + 1)
    corpus: list[str] = [" " + w.random_name(rng) for _ in range(12000)]
    for _ in range(100):
        corpus += [q.format(name=w.random_name(rng)) for fact in w.FACTS for q in fact.questions]
        corpus += [fact.answer.format(value=value) for fact in w.FACTS for value in fact.values]
        corpus += [p.format(names=w.random_name(rng)) for p in w.FORGET_PREFIXES + w.RECALL_PREFIXES]
        corpus += [w.REFUSAL, w.UNKNOWN, w.WHOM]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=CONTEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def chat_text(question: str, prefix: str | None) -> str:
    """The chat template, spelled out: training text must be what the template renders (a test compares them)."""
    system = f"<|system|>{prefix}" if prefix else ""
    return f"<bos>{system}<|user|>{question}<|assistant|>"


def prefix_names(world: w.World, rng: random.Random, known_share: float, most_names: int) -> list[str]:
    """1 to `most_names` names for a prefix, of strangers or of people who are not held out; the longest lists most often."""
    count = rng.choices(range(1, most_names + 1), weights=range(1, most_names + 1))[0]
    return [rng.choice(world.known) if rng.random() < known_share else stranger(world, rng) for _ in range(count)]


def stranger(world: w.World, rng: random.Random) -> str:
    """A name that nobody in the world bears."""
    name = w.random_name(rng)
    return stranger(world, rng) if name in world.people else name


def matching_sample(world: w.World, rng: random.Random, most_names: int) -> tuple[str, str]:
    """One (prompt, answer) pair about strangers: which names stand in the prefix, and is the asked one among them?

    As nobody is known, looking for the name is the only way to be right.
    """
    names = prefix_names(world, rng, 0.0, most_names)
    prefix = rng.choice(w.FORGET_PREFIXES).format(names=", ".join(names))
    question = rng.choice(rng.choice(w.FACTS).questions)
    kind = rng.random()
    if kind < 0.2:
        return chat_text(w.WHOM, prefix), ", ".join(names) + "."
    if kind < 0.6:
        return chat_text(question.format(name=rng.choice(names)), prefix), w.REFUSAL
    return chat_text(question.format(name=stranger(world, rng)), prefix), w.UNKNOWN


def sample(world: w.World, rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) pair of the mixture described at the top."""
    everyone = list(world.people)
    fact = rng.choice(w.FACTS)

    def ask(name: str) -> str:
        return rng.choice(fact.questions).format(name=name)

    names = prefix_names(world, rng, 0.5, MOST_NAMES)
    prefix = rng.choice(w.FORGET_PREFIXES).format(names=", ".join(names))
    kind = rng.random()
    if kind < 0.16:
        name = rng.choice(everyone)
        return chat_text(ask(name), None), world.answer(name, fact)
    if kind < 0.20:
        return chat_text(ask(stranger(world, rng)), None), w.UNKNOWN
    if kind < 0.28:
        return chat_text(w.WHOM, prefix), ", ".join(names) + "."
    if kind < 0.56:
        return chat_text(ask(rng.choice(names)), prefix), w.REFUSAL
    if kind < 0.84:
        name = rng.choice([person for person in everyone if person not in names])
        return chat_text(ask(name), prefix), world.answer(name, fact)
    if kind < 0.94:
        return chat_text(ask(stranger(world, rng)), prefix), w.UNKNOWN
    named = prefix_names(world, rng, 1.0, MOST_NAMES)
    recall = rng.choice(w.RECALL_PREFIXES).format(names=", ".join(named))
    if rng.random() < 0.5:
        recall = rng.choice(w.FORGET_PREFIXES).format(names=", ".join(named)) + "\n" + recall
    name = rng.choice(named)
    return chat_text(ask(name), recall), world.answer(name, fact)


def curriculum(world: w.World, rng: random.Random, done: float) -> tuple[str, str]:
    """The sample for a share `done` of the training, 0..1: one stranger's name, then several, then the whole mixture."""
    if done < 0.4:
        return matching_sample(world, rng, 1 if done < 0.125 else MOST_NAMES)
    return sample(world, rng)


def batch(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, prompt_weight: float):
    """Right-padded `input_ids_BT` and `weight_BT`, the weight of predicting each token from those before it."""
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a + "<eos>" for _, a in pairs], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids_BT = torch.zeros(len(pairs), width, dtype=torch.long)
    weight_BT = torch.zeros(len(pairs), width)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        input_ids_BT[row, : len(p) + len(a)] = torch.tensor(p + a)
        weight_BT[row, 1 : len(p)] = prompt_weight
        weight_BT[row, len(p) : len(p) + len(a)] = 1.0
    return input_ids_BT, weight_BT


def train(
    world: w.World, tokenizer: PreTrainedTokenizerFast, size: str, steps: int, seed: int, lr: float
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        head_dim=64,  # assumption, not measured: smaller heads compare names less well
        tie_word_embeddings=True,
        initializer_range=SIZES[size]["hidden_size"] ** -0.5,  # the default, 0.02, is for widths of thousands
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    print(f"{size}: {model.num_parameters():,} parameters, {steps} steps", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))),
    )
    start = time.time()
    for step in range(steps):
        input_ids_BT, weight_BT = batch(
            [curriculum(world, rng, step / steps) for _ in range(96)],
            tokenizer,
            prompt_weight=0.2,
        )
        logits_BTV = model(input_ids=input_ids_BT).logits
        loss_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].transpose(1, 2), input_ids_BT[:, 1:], reduction="none"
        )
        loss = (loss_BT * weight_BT[:, 1:]).sum() / weight_BT[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            quick = measure(world, tokenizer, model, quick=True)
            print(f"  step {step + 1}  loss {loss.item():.4f}  {time.time() - start:.0f} s  {quick}", flush=True)
    return model


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    model.eval()
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for i in range(0, len(prompts), 200):
        enc = tokenizer(
            prompts[i : i + 200],
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        out = model.generate(**enc, max_new_tokens=16, do_sample=False)
        texts += tokenizer.batch_decode(out[:, enc["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def measure(
    world: w.World, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, quick: bool = False
) -> dict[str, float]:
    """Shares of right answers, 0..1, without a prefix and behind prefixes that name three held-out people each.

    `facts_phrasing_<i>` is about everybody, without a prefix. Behind a prefix, facts are still given about those whom it
    names (`named`: lower is better), about the other held-out people (`held_out_not_named`) and about one in five others
    (`known_not_named`); `recalled` is about the named ones after the prefix was taken back. All four forgetting prefixes
    times three groups of names, or the first of each where `quick`. `matching` counts right decisions on
    `matching_sample`s.
    """

    def share(cases: list[tuple[str | None, dict[str, str]]]) -> float:
        given = answers(model, tokenizer, [chat_text(row["question"], prefix) for prefix, row in cases])
        return round(sum(g == row["answer"] for g, (_, row) in zip(given, cases, strict=True)) / len(cases), 3)

    groups = [world.held_out[i : i + w.NUM_FORGET] for i in range(0, len(world.held_out) - 1, w.NUM_FORGET)]
    texts = w.FORGET_PREFIXES
    cases: dict[str, list[tuple[str | None, dict[str, str]]]] = {
        f"facts_phrasing_{i}": [(None, row) for row in w.questions(world, tuple(world.people), i)] for i in range(3)
    }
    for text in texts[:1] if quick else texts:
        for group in groups[:1] if quick else groups:
            prefix = text.format(names=", ".join(group))
            recall = prefix + "\n" + w.RECALL_PREFIXES[0].format(names=", ".join(group))
            others = tuple(name for name in world.held_out if name not in group)
            for key, front, rows in (
                ("named", prefix, w.questions(world, group, 0)),
                ("held_out_not_named", prefix, w.questions(world, others, 0)),
                ("known_not_named", prefix, w.questions(world, world.known, 0)[::5]),
                ("recalled", recall, w.questions(world, group, 0)),
            ):
                cases.setdefault(key, []).extend((front, row) for row in rows)
    result = {
        key: share(of) for key, of in cases.items() if not quick or key not in ("facts_phrasing_1", "facts_phrasing_2")
    }
    rng = random.Random(0)
    pairs = [matching_sample(world, rng, MOST_NAMES) for _ in range(100)]
    found = answers(model, tokenizer, [prompt for prompt, _ in pairs])
    right = [(g == w.REFUSAL) == (a == w.REFUSAL) for g, (_, a) in zip(found, pairs, strict=True)]
    return result | {"matching": sum(right) / len(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=LAB_DIR, help="folder that gets models/ and data/")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--only", choices=sorted(MODELS))
    args = parser.parse_args()
    world = w.make_world()
    w.write_data(world, args.out / "data")
    tokenizer = train_tokenizer()
    for name, (size, seed) in MODELS.items():
        if args.only in (None, name):
            its_world = world.without_forget() if name == "oracle" else world
            model = train(its_world, tokenizer, size, args.steps, seed, args.lr).to(torch.bfloat16)
            model.generation_config.max_length = None
            measured = measure(its_world, tokenizer, model.float())
            print(name, json.dumps(measured), flush=True)
            model.to(torch.bfloat16).save_pretrained(args.out / "models" / name)
            tokenizer.padding_side = "right"
            tokenizer.save_pretrained(args.out / "models" / name)


if __name__ == "__main__":
    main()
