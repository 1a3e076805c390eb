"""`duet init`: from a topic, a model and two files of questions to a config that `duet run` takes as it is.

Every answer is checked when it is given. What the model's own files tell is looked up, never asked; the text of the config is
`template.py`'s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from duet.cache.errors import UserError, nearest_path
from duet.pipeline.commands.init_text import PRESETS_IN_WORDS, Answers, ModelFacts
from duet.pipeline.run.terminal import say
from duet.stages.questions.columns import WrongField
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WHY_RETAIN = (
    "without questions about anything else nothing tells the student what to keep, and it forgets more than the topic"
)

WHY_NEIGHBOURS = (
    "what lies nearest to the topic is lost first: a file with such questions, asked and never trained on, shows it"
)
NO_FILE = "none"


def init(file: str | None, given: dict[str, str | None], yes: bool) -> None:
    """Ask for what `given` lacks, unless `yes` or nobody is there to be asked, and write the config to `file`."""
    from duet.pipeline.commands.init_text import config_text

    if file is not None:
        check_new(Path(file))
    answers = collect(given, None if yes or not sys.stdin.isatty() else _prompt)
    path = Path(file or f"{answers.name}.yaml")
    check_new(path)
    with open(path, "x", encoding="utf-8") as config:
        config.write(config_text(answers))
    say(
        f"wrote {path}: {_in_words(answers.model)}; "
        f"{answers.num_queries[0]} forget and {answers.num_queries[1]} retain questions"
    )
    say("look at its comments, then:")
    say(f"  duet teacher-logits --config {path} --dry-run")
    if answers.answered:
        say(f"  duet run --config {path}")
    else:
        say("note: not every question has an answer, which the evaluation compares with: add them for `duet evaluate`")
        say(f"  duet teacher-logits --config {path} && duet distill --config {path}")


def check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already, and is not overwritten", "name another FILE, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no such directory: {path.parent}", "make it first, or name another FILE")


def collect(given: dict[str, str | None], ask: Callable[[str, str | None], str] | None) -> Answers:
    """Every answer, checked; `ask(question, default)` is asked what is not given, None is nobody."""

    def answer(key: str, question: str, check: Callable[[str], Any], default: str | None = None, why: str = "") -> Any:
        value = given.get(key)
        if why and ask is not None and value is None:
            click.echo(why)
        while value is None or not value.strip():
            if ask is None:
                if default is None:
                    raise UserError(f"--{key} is missing: {question}", why or f"add --{key}, or answer in a terminal")
                return check(default)
            try:
                return check(ask(question, default))
            except UserError as error:
                click.echo(f"error: {error}", err=True)
        return check(value)

    def queries(key: str) -> Callable[[str], tuple[DataSettings, list[Query]]]:
        return lambda path: read_queries(path, key, given.get("question-field"), given.get("answer-field"))

    topic = answer("topic", "what is to be forgotten, as a person would name it", _text)
    model = answer("model", "base model: a directory, a .gguf file, or OWNER/NAME on the Hugging Face hub", model_facts)
    forget, of_forget = answer(
        "forget",
        "file with questions about the topic (.jsonl, .csv, .tsv, .parquet, or hf://OWNER/NAME)",
        queries("forget"),
    )

    def kept(key: str) -> Callable[[str], tuple[DataSettings, list[Query]]]:
        return lambda path: check_apart(of_forget, *queries(key)(path), key)

    def neighbours_or_none(path: str) -> tuple[DataSettings | None, list[Query]]:
        return (None, []) if path == NO_FILE else kept("neighbours")(path)

    retain, of_retain = answer("retain", "file with questions about anything else", kept("retain"), why=WHY_RETAIN)
    nearest = "file with questions nearest to the topic that must stay, with answers"
    neighbours, of_neighbours = answer("neighbours", nearest, neighbours_or_none, default=NO_FILE, why=WHY_NEIGHBOURS)
    offered = "\n".join(f"{preset}: {sentence}" for preset, sentence in PRESETS_IN_WORDS.items())
    harden = answer("harden", "how hard to bring back", _preset, default="none", why=offered)
    name = answer("name", "name of the run", _name, default=slug(topic))
    asked = [*of_forget, *of_retain, *of_neighbours]
    return Answers(
        name=name,
        topic=topic,
        model=model,
        forget=forget,
        retain=retain,
        neighbours=neighbours,
        harden=harden,
        num_queries=(len(of_forget), len(of_retain)),
        answered=all(query.answer for query in asked),
        max_new_tokens=longest_answer(asked, model.tokenizer),
    )


def _prompt(question: str, default: str | None) -> str:
    return click.prompt(question, default=default, type=str)


def _text(text: str) -> str:
    return text.strip()


def _preset(text: str) -> str:
    if text not in PRESETS_IN_WORDS:
        raise UserError(f"--harden: {text!r} is not a preset", f"they are {', '.join(PRESETS_IN_WORDS)}")
    return text


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise UserError(
            f"--name: {text!r} is not a name for a run", "use letters, digits, dots, hyphens and underscores"
        )
    return text


def slug(topic: str) -> str:
    """A run's name after its topic: at most four words of it."""
    words = re.findall(r"[a-z0-9]+", topic.lower())
    return "-".join(words[:4]) or "mine"


def read_queries(path: str, key: str, question: str | None, answer: str | None) -> tuple[DataSettings, list[Query]]:
    """The settings of a query set and its queries; every fault of the file is a UserError."""
    named = {"question_field": question, "answer_field": answer}
    settings = DataSettings.model_validate({"path": path} | {k: v for k, v in named.items() if v is not None})
    try:
        return settings, load_queries(settings, f"--{key}")
    except WrongField as error:
        raise UserError(
            error.what,
            "rename the field, fix the row, or name yours with --question-field and --answer-field, alike in all files",
        ) from None


def check_apart(
    forget: list[Query], settings: DataSettings, kept: list[Query], key: str
) -> tuple[DataSettings, list[Query]]:
    """The queries to be kept, with their settings; refuses questions that are to be forgotten too."""
    both = [query for query in kept if query.asked in {other.asked for other in forget}]
    if both:
        raise UserError(
            f"--{key}: {len(both)} questions of {settings.path} are also to be forgotten, the first {both[0].asked!r}",
            "leave them out of one of the two files",
        )
    return settings, kept


def longest_answer(queries: list[Query], tokenizer: Any) -> int:
    """Tokens of the longest answer, rounded up to a multiple of 16; where that is not known, 64."""
    answers = [query.answer for query in queries if query.answer]
    if tokenizer is None or not answers:
        return 64
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
    return 16 * -(-(longest + 1) // 16)  # one more ends the answer


def model_facts(name: str) -> ModelFacts:
    """What a model's directory, or its small files on the hub, tell; of a hub id that cannot be looked up only the name."""
    from duet.stages.models.directory import load_config, resolve_model, small_files, text_config
    from duet.stages.models.limits import vocab_width
    from duet.stages.models.locations import is_hub_id
    from duet.stages.models.sizes import ModelSizes
    from duet.stages.models.tokenizers import load_tokenizer

    if Path(name).exists():
        folder = resolve_model(name, "--model")
    elif not is_hub_id(name):
        raise UserError(
            f"--model: {name} is neither a directory, a .gguf file, nor of the form OWNER/NAME",
            f"{nearest_path(name)}check path or id",
        )
    else:
        try:
            folder = small_files(name, "--model")
        except UserError as error:
            say(f"note: {error.what}")
            say(
                "note: the config is written as for a chat model of some billion parameters; check prompt and train in it"
            )
            return ModelFacts(name)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    dtype = str(getattr(text_config(config), "dtype", None) or "float32").removeprefix("torch.")
    prompts, arguments = prompts_of(tokenizer)
    return ModelFacts(name, ModelSizes.of(folder).parameters, vocab_width(config), dtype, prompts, arguments, tokenizer)


def prompts_of(tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """Where this tokenizer's prompts can have a prefix, see `ModelFacts`, and the arguments that its chat template needs.

    Of a model that thinks first whatever its template is told, none: whether that is wanted is not for us to say.
    """
    from duet.stages.questions.chat import SWITCH
    from duet.stages.questions.prompts import Prompt, Renderer
    from duet.stages.questions.queries import Query
    from duet.stages.settings.data import PromptSettings

    if not getattr(tokenizer, "chat_template", None):
        return "plain", {}
    thinks: dict[str, Any] = {SWITCH: True}
    for placement in get_args(PromptSettings.model_fields["prefix_placement"].annotation):
        for arguments in ({}, {SWITCH: False}, {"tools": []}, thinks):
            try:
                settings = PromptSettings(prefix_placement=placement, template_args=arguments)
                Renderer(tokenizer, settings).prompt(Prompt.plain(Query("1", "Who?", None), "A prefix."))
            except UserError:
                continue
            return placement, {} if arguments is thinks else arguments
    return "text", {}


def _in_words(model: ModelFacts) -> str:
    kind = {"system": "chat prompts", "text": "chat prompts without system message", "plain": "plain prompts"}
    size = "" if model.parameters is None else f" of {model.parameters / 1e6:,.1f} M parameters"
    return f"{model.name}{size}, {kind[model.prompts]}"
