"""Templates and tokenizers as people bring them, through the command line: right, or refused in two lines before any work."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import all_stages, refused
from support import LAB_BASE

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main
from duet.pipeline.config import load as config_module
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

LAB_TEMPLATE = (LAB_BASE / "chat_template.jinja").read_text(encoding="utf-8")
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def model(folder: Path, template: str | dict[str, str] = LAB_TEMPLATE, **tokenizer: Any) -> str:
    """The lab's base with another chat template, or several, and other entries in its tokenizer's config."""
    shutil.copytree(LAB_BASE, folder)
    (folder / "chat_template.jinja").unlink()
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        (folder / "additional_chat_templates").mkdir()
        for name, text in template.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer))
    return str(folder)


def questions(path: Path, *texts: str, answer: str = "An answer.") -> dict[str, str]:
    path.write_text(
        "".join(json.dumps({"question": text, "answer": answer}) + "\n" for text in texts), encoding="utf-8"
    )
    return {"path": str(path)}


@pytest.fixture
def small(lab_config, tmp_path):
    """A config on a few questions of its own."""

    def write(**changes: Any) -> str:
        data = {
            "data__forget": questions(tmp_path / "f.jsonl", "Who is Dugira Duchok?", "Where was Bromyx Zopira born?"),
            "data__retain": questions(tmp_path / "r.jsonl", "What colour is the sky?", "Is it raining?"),
            "train__epochs": 1,
            "evaluate__attacks": [],
        }
        return str(lab_config(**data | changes))

    return write


FAULTY = {
    "question left out": (
        "<bos>{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] if part is mapping %}{{ part['text'] }}"
        "{% endfor %}{% endfor %}" + ASKS,
        "leaves out the question",
    ),
    "prefix dropped": (
        "<bos>{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}" + ASKS,
        "drops the system message",
    ),
    "blank lines": (
        "<bos>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].replace(' ', '\n') }}{% endfor %}" + ASKS,
        "changes white space",
    ),
    "more than the prefix": (
        "<bos>{% if messages[0]['role'] == 'system' %}Be brief.{% else %}Be kind.{% endif %}" + TURNS + ASKS,
        "differ in more than the prefix",
    ),
    "ends in eos": ("<bos>" + TURNS + "{% if add_generation_prompt %}<|assistant|><eos>{% endif %}", "end-of-sequence"),
    "thinks first": (
        "<bos>" + TURNS + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        "ends in '<think>'",
    ),
    "crashes": ("<bos>{% for tool in tools %}{{ tool }}{% endfor %}" + TURNS + ASKS, "cannot render"),
    "no header": ("<bos>" + TURNS, "is followed by '<|assistant|>'"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_template_is_refused_by_every_stage_that_renders(small, tmp_path, capsys, name):
    template, told = FAULTY[name]
    config = small(teacher__model=model(tmp_path / "model", template))
    for command in ("teacher-logits", "run"):
        assert told in refused(capsys, command, "--config", config)[0]
    assert main(["doctor", "--config", config]) == EXIT_USER
    assert told in capsys.readouterr().out
    assert not (tmp_path / "runs" / "lab" / "teacher").exists()


def test_a_template_that_wants_tools_runs_with_an_empty_list(small, tmp_path):
    folder = model(tmp_path / "model", "<bos>{% for tool in tools %}{{ tool }}{% endfor %}" + TURNS + ASKS)
    config = small(teacher__model=folder, prompt__template_args={"tools": []})
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE


def test_an_argument_that_no_template_knows_is_refused(small, capsys):
    what, _ = refused(capsys, "teacher-logits", "--config", small(prompt__template_args={"enable_thinkin": False}))
    assert "no argument 'enable_thinkin'" in what


def test_one_of_several_templates_is_named(small, tmp_path, capsys):
    folder = model(tmp_path / "model", {"rag": LAB_TEMPLATE, "tool_use": LAB_TEMPLATE})
    config = small(teacher__model=folder)
    assert "set prompt.template_name to one of rag, tool_use" in refused(capsys, "run", "--config", config)[1]
    all_stages("--config", config, "--set", "prompt.template_name=rag")


def test_the_day_of_the_first_stage_is_that_of_all(small, tmp_path, capsys, monkeypatch):
    """Midnight passes between stages: the store is found, and the student is asked what it was trained on."""
    dated = (
        "<bos><|system|>Today is {{ strftime_now('%d %b %Y') }}.{% for m in messages %}"
        + TURNS.partition("%}")[2]
        + ASKS
    )
    config = small(teacher__model=model(tmp_path / "model", dated), prompt__prefix_placement="text")

    class Day(datetime.date):
        now = datetime.date(2031, 5, 4)

        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return cls.now

    monkeypatch.setattr(config_module.datetime, "date", Day)
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    assert "it is told 2031-05-04" in capsys.readouterr().out
    Day.now = datetime.date(2031, 5, 5)
    assert main(["cache", "find", "--config", config]) == EXIT_DONE
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    assert "reused the store" in capsys.readouterr().out
    assert main(["distill", "--config", config]) == EXIT_DONE
    assert main(["evaluate", "--config", config]) == EXIT_DONE
    manifest = next((tmp_path / "runs/lab/teacher").glob("*/manifest.json"))
    assert json.loads(manifest.read_text())["provenance"]["prompt"]["date"] == "2031-05-04"
    what, _ = refused(capsys, "teacher-logits", "--config", config, "--set", "prompt.date=2031-05-05")
    assert "prompt.date is '2031-05-04' there and '2031-05-05' now" in what


def test_text_with_a_special_token_is_refused_unless_it_is_meant(small, tmp_path, capsys):
    asked = questions(tmp_path / "special.jsonl", "What does <eos> mean?", "Who is it?")
    config = small(data__forget=asked)
    what, hint = refused(capsys, "teacher-logits", "--config", config)
    assert "the text has '<eos>' in it" in what
    assert "forget, row" in what
    assert "special_tokens_in_text" in hint
    meant = ("--set", "prompt.special_tokens_in_text=true")
    assert main(["teacher-logits", "--config", config, *meant]) == EXIT_DONE


def test_a_default_system_message_stays_behind_the_prefix(small, tmp_path):
    default = "{% if messages[0]['role'] != 'system' %}<|system|>You are kind.{% endif %}"
    tokenizer = load_tokenizer(Path(model(tmp_path / "model", "<bos>" + default + TURNS + ASKS)))
    query = Query("q", "Who?", None)
    texts = {}
    for system in (None, "Be brief."):
        renderer = Renderer(tokenizer, PromptSettings(system=system))
        texts[system] = [tokenizer.decode(renderer.prompt(Prompt.plain(query, prefix))) for prefix in ("P.", "")]
    assert texts[None] == [
        "<bos><|system|>P.\nYou are kind.<|user|>Who?<|assistant|>",
        "<bos><|system|>You are kind.<|user|>Who?<|assistant|>",
    ]
    assert texts["Be brief."] == [
        "<bos><|system|>P.\nBe brief.<|user|>Who?<|assistant|>",
        "<bos><|system|>Be brief.<|user|>Who?<|assistant|>",
    ]


def test_what_ends_an_answer_that_nothing_tells_is_refused_where_answers_are_given(small, tmp_path, capsys):
    """The lab's template puts nothing behind an answer; here tokenizer and config disagree on what does."""
    config = small(teacher__model=model(tmp_path / "model", eos_token="<|system|>"))
    scored = ("--set", "evaluate.likelihood=true")
    assert "what ends an answer cannot be told" in refused(capsys, "run", "--config", config, *scored)[0]
    given = ("--set", "teacher.responses=given", "--set", "teacher.max_positions=8")
    assert "what ends an answer cannot be told" in refused(capsys, "teacher-logits", "--config", config, *given)[0]
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE, "without given answers nothing asks for it"


def test_references_that_cannot_be_given_whole_are_told_and_stand_in_the_report(small, tmp_path):
    long = questions(tmp_path / "long.jsonl", "Who was it, and why?", answer="word " * 40)
    config = small(data__retain=long, evaluate__max_new_tokens=8)
    assert "1 of 1 reference answers of retain have more than 8 tokens" in all_stages("--config", config)
    folder = tmp_path / "runs" / "lab"
    (remark,) = (text for text in json.loads((folder / "results.json").read_text())["remarks"] if "retain" in text)
    assert remark.split(",")[0] in (folder / "report.html").read_text()


def test_a_set_of_training_questions_is_named_in_the_report(small, tmp_path):
    again = questions(tmp_path / "again.jsonl", "Is it raining?", "Is it snowing?") | {"expect": "kept"}
    config = small(evaluate__sets={"again": again})
    sentence = "1 of 2 questions of again are in retain: students are trained on them"
    assert sentence in all_stages("--config", config)
    assert sentence in (tmp_path / "runs" / "lab" / "report.html").read_text()
