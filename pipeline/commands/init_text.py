"""The text of the config that `duet init` writes: settings with the reason for each, and what one may want to change.

Values are those of our own configs for a model of like size: configs/lab.yaml, smollm2.yaml, muse_books_llama3.2_3b.yaml and
wmdp_zephyr_7b.yaml. Those of the first two were run and measured; the DUET paper publishes no such values for larger models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from duet.stages.audit.prefixes import bundled_prefixes
from duet.stages.settings.data import DataSettings

PRESETS_IN_WORDS = {
    "none": "the paper's student, silent when it is asked plainly; attacks bring the topic back",
    "wide": "trained under attack texts too, in about twice the time; further training still brings a part back",
    "deep": "repaired from damaged weights, so that even training brings little back; what is not asked about fades",
}
PREFIX = "forgotten"  # which of the bundled ones: the lab's
LARGE_VOCABULARY = 32_000  # ids, from which our configs keep 64 logits and not 20
TINY, SMALL = 100e6, 500e6  # parameters, below which a model is treated as the lab's are, and as SmolLM2-135M is
BYTES_PER_PARAMETER = 16  # weights, gradients and AdamW's two states, float32 each; see docs/training.md


@dataclass(frozen=True)
class Training:
    """Values of one of our configs."""

    like: str
    epochs: int
    lr: str
    batch_size: int = 16
    lora_lr: str | None = None
    max_positions: int = 1  # the paper's
    more: str = ""  # further lines, which the rate was measured with
    measured: bool = False


def _is_small(model: ModelFacts) -> bool:
    return model.parameters is not None and model.parameters < SMALL


SMOLLM2 = Training(
    "configs/smollm2.yaml",
    epochs=1,
    lr="5.0e-5",
    batch_size=8,
    lora_lr="7.0e-4 of rank 8",
    max_positions=12,
    more="""
  loss: forward_kl_tail # of a whole answer one token decides: docs/smollm2.md
  warmup: 0.1
  export_dtype: float32 # in bfloat16 rounding undoes steps as small as these""",
    measured=True,
)


def training_of(parameters: int | None) -> Training:
    """By size; an unknown one counts as some billion."""
    if parameters is not None and parameters < TINY:
        return Training("configs/lab.yaml", 30, "3.0e-4", measured=True)
    if parameters is not None and parameters < SMALL:
        return SMOLLM2
    if parameters is None or parameters < 5e9:
        return Training("configs/muse_books_llama3.2_3b.yaml", 10, "1.0e-5")
    return Training("configs/wmdp_zephyr_7b.yaml", 3, "5.0e-6")


def config_text(answers: Answers) -> str:
    """A whole config as YAML with comments."""
    model, training = answers.model, training_of(answers.model.parameters)
    top_k = 20 if model.vocab_size is not None and model.vocab_size < LARGE_VOCABULARY else 64
    return f"""\
# Made by `duet init`. Paths are relative to where `duet` is started. `--set KEY=VALUE` overrides any key for one call.
# What else can be set stands, with a line on each, in docs/reference/config.md.
name: {_quoted(answers.name)} # results go to runs/{answers.name}
topic: {_quoted(answers.topic)}
{_harden_text(answers)}
teacher: # the base model behind a prefix; it is asked every question once
  model: {_quoted(model.name)}
  # {{topic}} is filled in. The teacher bounds the student: `duet audit-prefix --config FILE` compares this prefix with others.
  prefix: {_quoted(bundled_prefixes()[PREFIX])}
  dtype: {_dtype_text(model)}
  engine: auto # vLLM where it is installed and works, else transformers
  top_k: {top_k} # logits kept per position; the paper does not publish its k
{_positions_text(answers, training)}
prompt:
{_prompt_text(model)}

data: # questions; only the evaluation needs their answers
  forget: {_data_text(answers.forget)} # {answers.num_queries[0]} about the topic
  retain: {_data_text(answers.retain)} # {answers.num_queries[1]} about anything else: they keep the rest
  # id_field: id in either names a field with unique ids; without it rows are numbered

train: # as in {training.like}, which has a model of like size; {_source(training)}
  epochs: {training.epochs}
  batch_size: {training.batch_size}
  lr: {training.lr}{training.more}
{_share_text(answers)}{_memory_text(model, training)}

students:
  - name: student # starts from the teacher's own weights; `model:` names another of the same tokenizer

evaluate:
  max_new_tokens: {answers.max_new_tokens} # {_length_text(answers)}
  # Questions that are never trained on tell most. Name files of your own:
{_sets_text(answers.neighbours)}"""


def _sets_text(neighbours: DataSettings | None) -> str:
    """The sets of the evaluation: the neighbours where there are some, the others as comments."""
    mark = "# " if neighbours is None else ""
    of = {"path": "neighbours.jsonl"} if neighbours is None else neighbours.model_dump(exclude_defaults=True)
    entries = ", ".join(f"{key}: {_quoted(value)}" for key, value in of.items())
    return f"""\
  {mark}sets:
  {mark}  neighbours: {{ {entries}, expect: kept }} # nearest to the topic, and lost first
  #   rephrased: {{ path: rephrased.jsonl, expect: forgotten }} # the topic in other words
  #   heldout: {{ path: heldout.jsonl, expect: kept }} # anything else
"""


def _harden_text(answers: Answers) -> str:
    """The preset, and the others as comments."""
    others = "".join(f"# {name}: {sentence}\n" for name, sentence in PRESETS_IN_WORDS.items())
    broad = "" if answers.harden == "none" else "# It wants questions about everything else under data.broad.\n"
    return f"harden: {answers.harden} # see docs/hardening.md\n{others}{broad}"


def _source(training: Training) -> str:
    how = "measured on that one" if training.measured else "not measured, and not searched"
    return f"{how}: try `--sweep train.lr=…`"


def _positions_text(answers: Answers, training: Training) -> str:
    if answers.harden != "none":
        return ""  # the preset's
    if training.max_positions > 1:
        return f"  max_positions: {training.max_positions} # as in {training.like}: a whole answer, if it is short\n"
    return "  max_positions: 1 # the paper's; more positions supervise more of the answer\n"


def _share_text(answers: Answers) -> str:
    if answers.harden == "none":
        return ""
    return "  forget_share: 0.15 # of every batch, however many rows there are to be kept: see docs/hardening.md\n"


def _dtype_text(model: ModelFacts) -> str:
    if _is_small(model):
        return "float32 # of a small model exact logits cost little"
    return f"auto # the model's own{f': {model.dtype}' if model.dtype else ''}"


def _length_text(answers: Answers) -> str:
    known = answers.model.tokenizer is not None and answers.answered
    return "as long as the longest answer of the data" if known else "longest answer, in tokens"


def _prompt_text(model: ModelFacts) -> str:
    """The settings under `prompt:`."""
    if model.prompts == "plain":
        return (
            "  format: plain # the tokenizer has no chat template\n"
            "  prefix_placement: text\n"
            '  template: "Question: {question}\\nAnswer:" # as the model was trained to be asked: change it to that'
        )
    unknown = " # not checked: take text where the model's chat template has none" if model.tokenizer is None else ""
    why = " # the chat template takes no system message" if model.prompts == "text" else unknown
    needed = f"\n  template_args: {json.dumps(model.template_args)} # without it the template is refused"
    return f"  format: chat\n  prefix_placement: {model.prompts}{why}{needed if model.template_args else ''}"


def _data_text(settings: DataSettings) -> str:
    """A query set in one line, with the settings that are not the default."""
    named = settings.model_dump(exclude_defaults=True)
    return "{ " + ", ".join(f"{key}: {_quoted(value)}" for key, value in named.items()) + " }"


def _memory_text(model: ModelFacts, training: Training) -> str:
    rate = f"a higher lr, {training.lora_lr} in {training.like}" if training.lora_lr else "a higher lr"
    need = "" if model.parameters is None else f" about {BYTES_PER_PARAMETER * model.parameters / 1e9:,.2g} GB;"
    return (
        f"  # Weights, gradients and AdamW's state take{need or ' 16 GB per billion parameters;'} "
        "`duet estimate --config FILE` tells the rest.\n"
        "  # gradient_checkpointing: true # less memory for activations, a third more time\n"
        f"  # lora: {{ rank: 64 }} # trains adapters alone; wants {rate}, and a look at a sweep"
    )


def _quoted(value: Any) -> str:
    """As YAML takes it in double quotes, whatever it contains."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class ModelFacts:
    """What a model's files tell; None where they could not be read."""

    name: str
    parameters: int | None = None
    vocab_size: int | None = None
    dtype: str | None = None
    prompts: str = (
        "system"  # where a prefix goes: "system" or "text" of a chat, or "plain" where there is no chat template
    )
    template_args: dict[str, Any] = field(default_factory=dict)  # that the chat template needs
    tokenizer: Any = None


@dataclass(frozen=True)
class Answers:
    """All that a config is made of."""

    name: str
    topic: str
    model: ModelFacts
    forget: DataSettings
    retain: DataSettings
    num_queries: tuple[int, int]  # of forget and retain
    answered: bool  # every query has an answer
    max_new_tokens: int  # as long as the longest answer, about
    harden: str = "none"  # a preset
    neighbours: DataSettings | None = None
