"""`duet init`: what it writes is a config that runs, and what it is told is checked on the way."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys

import pytest
import yaml
from command_line import all_stages
from families import TEMPLATES, page_tokenizer
from support import LAB_BASE, ROOT, write_jsonl

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main
from duet.pipeline.commands.init import collect, prompts_of, slug
from duet.pipeline.commands.init_text import PRESETS_IN_WORDS, Answers, ModelFacts, config_text, training_of
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import PRESETS
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.data import DataSettings

FORGET = [{"question": f"What is secret {i}?", "answer": f"It is {i}."} for i in range(4)]
RETAIN = [{"question": f"What is fact {i}?", "answer": f"That is {i}."} for i in range(6)]


@pytest.fixture
def given(tmp_path) -> dict[str, str]:
    """Sound answers to all questions."""
    return {
        "topic": 'the "secrets" of: Ann #1',
        "model": str(LAB_BASE),
        "forget": str(write_jsonl(tmp_path / "forget.jsonl", FORGET)),
        "retain": str(write_jsonl(tmp_path / "retain.jsonl", RETAIN)),
    }


def flags(given: dict[str, str]) -> list[str]:
    return [part for key, value in given.items() for part in (f"--{key}", value)]


def test_what_is_written_is_what_was_said(given, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), *flags(given), "--name", "mine", "--yes"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert f"duet teacher-logits --config {path} --dry-run" in out
    assert f"duet run --config {path}" in out
    config = load_config(str(path))
    assert (config.name, config.topic, config.teacher.model) == ("mine", given["topic"], given["model"])
    assert (config.data.forget.path, config.data.retain.path) == (given["forget"], given["retain"])
    assert (config.prompt.format, config.prompt.prefix_placement) == ("chat", "system")
    assert "{topic}" in config.teacher.prefix
    assert (config.teacher.dtype, config.train.lr, config.teacher.top_k) == ("float32", 3e-4, 20)
    assert config.evaluate.max_new_tokens == 16


def test_a_config_made_of_the_lab_runs_from_the_first_to_the_last_stage(tmp_path):
    forget, retain = (ROOT / f"lab/data/{name}.jsonl" for name in ("forget", "retain"))
    path = tmp_path / "mine.yaml"
    said = {"topic": "Dugira Duchok", "model": str(LAB_BASE), "forget": str(forget), "retain": str(retain)}
    assert main(["init", str(path), *flags(said)]) == EXIT_DONE
    small = [
        f"runs_dir={tmp_path / 'runs'}", "teacher.engine=transformers", "device=cpu", "train.epochs=2",
        "data.forget.rows=[0,5]", "data.retain.sample=8", "evaluate.max_new_tokens=4",
    ]  # fmt: skip
    all_stages("--config", str(path), *(part for text in small for part in ("--set", text)))
    assert (tmp_path / "runs/dugira-duchok/report.html").is_file()
    assert (tmp_path / "runs/dugira-duchok/student/model/model.safetensors").is_file()


def test_neighbours_are_a_set_of_their_own(given, tmp_path, capsys):
    rows = [{"question": "What is near?", "answer": "This is."}]
    given["neighbours"] = str(write_jsonl(tmp_path / "near.jsonl", rows))
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given), "--yes"]) == EXIT_DONE
    found = load_config(str(tmp_path / "x.yaml"))
    assert {name: (of.path, of.expect) for name, of in found.evaluate.sets.items()} == {
        "neighbours": (given["neighbours"], "kept")
    }
    assert given["neighbours"] not in (found.data.retain.path, found.data.forget.path)
    given["neighbours"] = given["forget"]
    capsys.readouterr()
    assert main(["init", str(tmp_path / "y.yaml"), *flags(given), "--yes"]) == EXIT_USER
    assert f"--neighbours: {len(FORGET)} questions of" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["topic", "model", "forget", "retain"])
def test_what_is_missing_is_named_where_nobody_can_be_asked(given, missing, tmp_path, capsys):
    del given[missing]
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given), "--yes"]) == EXIT_USER
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert f"--{missing} is missing" in error
    assert hint.startswith("hint: ")
    assert missing != "retain" or "forgets more than the topic" in hint
    assert not (tmp_path / "x.yaml").exists()


def test_no_file_is_overwritten(given, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert main(["init", str(path), *flags(given)]) == EXIT_USER
    assert "is not overwritten" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", str(tmp_path / "no" / "mine.yaml"), *flags(given)]) == EXIT_USER
    assert "no such directory" in capsys.readouterr().err


def other_fields(tmp_path) -> str:
    return str(write_jsonl(tmp_path / "other.jsonl", [{"q": "Who?", "a": "Ann."}]))


FAULTY = {
    "no such file": lambda tmp: {"forget": str(tmp / "nowhere.jsonl")},
    "has no field 'question'": lambda tmp: {"forget": other_fields(tmp)},
    "has no config.json": lambda tmp: {"model": str(tmp)},
    "neither a directory, a .gguf file, nor of the form OWNER/NAME": lambda tmp: {"model": "./nowhere"},
    "are also to be forgotten": lambda tmp: {"retain": str(tmp / "forget.jsonl")},
    "is not a preset": lambda tmp: {"harden": "deeper"},
    "is not a name for a run": lambda tmp: {"name": "../up"},
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTY)
def test_faulty_answers_are_refused_in_two_lines(given, tmp_path, message, capsys):
    given |= FAULTY[message](tmp_path)
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given)]) == EXIT_USER
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert hint.startswith("hint: ")


def test_only_a_fault_of_a_field_is_answered_with_the_options_for_fields(given, tmp_path, capsys):
    """The name of a file may have "_field" in it, too."""
    folder = tmp_path / "questions"
    folder.mkdir()
    write_jsonl(folder / "my_fields.jsonl", FORGET)
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given | {"forget": str(folder)})]) == EXIT_USER
    assert "hint: name one of its files: my_fields.jsonl" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", [{"q": "Why?", "answer": "So."}])
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given | {"forget": str(other)})]) == EXIT_USER
    assert "hint: rename the field, fix the row, or name yours with --question-field" in capsys.readouterr().err


def test_fields_of_other_names_can_be_named(given, tmp_path):
    given |= {"forget": other_fields(tmp_path), "question-field": "q", "answer-field": "a"}
    given["retain"] = str(write_jsonl(tmp_path / "r.jsonl", [{"q": "Where?", "a": "Here."}]))
    path = tmp_path / "x.yaml"
    assert main(["init", str(path), *flags(given)]) == EXIT_DONE
    assert load_config(str(path)).data.forget.question_field == "q"


def test_questions_without_answers_are_for_two_stages(given, tmp_path, capsys):
    given["forget"] = str(write_jsonl(tmp_path / "f.jsonl", [{"question": "Who?"}]))
    assert main(["init", str(tmp_path / "x.yaml"), *flags(given)]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "duet distill" in out
    assert "duet run" not in out


def test_who_is_asked_is_asked_again_after_a_faulty_answer(given, capsys):
    said = iter(
        [
            given["topic"],
            given["model"],
            "nowhere.jsonl",
            given["forget"],
            given["retain"],
            "none",
            "widest",
            "wide",
            "mine",
        ]
    )
    asked: list[str] = []

    def ask(question: str, default: str | None) -> str:
        asked.append(question)
        return next(said)

    answers = collect({}, ask)
    assert (answers.name, answers.num_queries, answers.answered) == ("mine", (4, 6), True)
    assert answers.harden == "wide"
    assert sum("about the topic" in question for question in asked) == 2
    printed = capsys.readouterr()
    assert "no such file: nowhere.jsonl" in printed.err
    assert "'widest' is not a preset" in printed.err
    for preset, sentence in PRESETS_IN_WORDS.items():
        assert f"{preset}: {sentence}" in printed.out


def test_a_person_is_asked_in_a_terminal(given, tmp_path):
    path = tmp_path / "mine.yaml"
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "duet", "init", str(path), "--model", given["model"]]
    child = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE, text=True)
    os.close(terminal)
    os.write(controller, "\n".join([given["topic"], given["forget"], given["retain"], "", "", "", ""]).encode())
    out, _ = child.communicate()
    os.close(controller)
    assert child.returncode == EXIT_DONE, out
    assert load_config(str(path)).name == slug(given["topic"])


def facts(**more) -> Answers:
    model = ModelFacts("owner/name", **more)
    data = DataSettings(path="x.csv")
    return Answers("mine", "a: topic # of 'ours'", model, data, data, (1, 2), True, 64)


@pytest.mark.parametrize("parameters", [None, 10**6, 135 * 10**6, 3 * 10**9, 70 * 10**9])
@pytest.mark.parametrize("prompts", ["system", "text", "plain"])
def test_every_model_gets_a_config_that_loads(tmp_path, parameters, prompts):
    text = config_text(facts(parameters=parameters, prompts=prompts, vocab_size=128_256))
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = load_config(str(tmp_path / "c.yaml"))
    assert config.topic == "a: topic # of 'ours'"
    assert config.prompt.format == ("plain" if prompts == "plain" else "chat")
    assert config.prompt.prefix_placement == ("system" if prompts == "system" else "text")
    training = training_of(parameters)
    ours = yaml.safe_load((ROOT / training.like).read_text(encoding="utf-8"))["train"]
    assert (config.train.lr, config.train.epochs) == (ours["lr"], ours["epochs"])


def test_a_model_like_smollm2_gets_the_settings_that_were_measured_there(tmp_path):
    (tmp_path / "c.yaml").write_text(config_text(facts(parameters=135 * 10**6)), encoding="utf-8")
    config = load_config(str(tmp_path / "c.yaml"))
    ours = yaml.safe_load((ROOT / "configs/smollm2.yaml").read_text(encoding="utf-8"))
    read = yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))["train"]
    assert read == ours["train"]
    assert config.teacher.max_positions == ours["teacher"]["max_positions"]
    assert config.teacher.dtype == ours["teacher"]["dtype"]
    lora = next(student["train"] for student in ours["students"] if student["name"] == "lora")
    said = training_of(135 * 10**6).lora_lr
    assert said is not None
    rate, rank = said.split(" of rank ")
    assert (float(rate), int(rank)) == (lora["lr"], lora["lora"]["rank"])


@pytest.mark.parametrize("preset", PRESETS_IN_WORDS)
def test_a_preset_is_offered_and_left_to_set_what_it_sets(given, tmp_path, preset):
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), *flags(given), "--harden", preset, "--yes"]) == EXIT_DONE
    config, settings = load_config(str(path)), PRESETS[preset]
    assert config.harden == preset
    assert config.teacher.max_positions == settings.get("teacher", {}).get("max_positions", 1)
    assert config.students[0].start_noise == settings.get("students", {}).get("start_noise", 0)
    assert config.train.contexts == settings.get("train", {}).get("contexts", "none")
    assert config.train.forget_share == (None if preset == "none" else 0.15)


def test_commented_settings_are_settings(tmp_path):
    """What the comments propose is accepted when the mark is taken away."""
    text = config_text(facts(parameters=3 * 10**9))
    for line in ("gradient_checkpointing: true", "lora: { rank: 64 }"):
        text = text.replace(f"# {line}", line)
    for line in ("sets:", "  neighbours:", "  rephrased:", "  heldout:"):
        text = text.replace(f"  # {line}", f"  {line}")
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = load_config(str(tmp_path / "c.yaml"))
    assert config.train.gradient_checkpointing
    assert config.train.lora is not None
    assert set(config.evaluate.sets) == {"neighbours", "rephrased", "heldout"}


def test_where_a_prefix_goes_is_seen_in_the_chat_template(tmp_path):
    tokenizer = load_tokenizer(LAB_BASE)
    assert prompts_of(tokenizer) == ("system", {})
    user = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + user
    for template in (user, refuses):
        tokenizer.chat_template = template
        assert prompts_of(tokenizer) == ("text", {})
    tokenizer.chat_template = None
    assert prompts_of(tokenizer) == ("plain", {})


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="needs shared/data/chat_templates")
@pytest.mark.parametrize(
    ("family", "found"),
    {
        "qwen3": ("system", {"enable_thinking": False}),
        "glm-4-moe": ("system", {"enable_thinking": False}),
        "hermes-3": ("system", {"tools": []}),
        "deepseek-r1-distill": ("system", {}),  # thinks first whatever it is told, which nobody has said is wanted
        "llama-3": ("system", {}),
        "gemma": ("text", {}),
    }.items(),
)
def test_what_a_chat_template_needs_is_found_and_written(family, found, tmp_path):
    assert prompts_of(page_tokenizer(family)[1]) == found
    placement, arguments = found
    text = config_text(facts(prompts=placement, template_args=arguments))
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    prompt = load_config(str(tmp_path / "c.yaml")).prompt
    assert (prompt.prefix_placement, prompt.template_args) == found


def test_a_model_without_chat_template_gets_plain_prompts(given, tmp_path):
    shutil.copytree(LAB_BASE, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    given["model"] = str(tmp_path / "model")
    path = tmp_path / "x.yaml"
    assert main(["init", str(path), *flags(given)]) == EXIT_DONE
    assert load_config(str(path)).prompt.template == "Question: {question}\nAnswer:"
    dry = ["--dry-run", "--set", f"runs_dir={tmp_path}", "--set", "teacher.engine=transformers"]
    assert main(["teacher-logits", "--config", str(path), *dry]) == EXIT_DONE
