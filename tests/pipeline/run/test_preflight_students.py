"""What stage two would refuse of a student is said before the teacher is asked: two lines, and nothing is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import LAB_BASE, two_sets

from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.config.load import load_config
from duet.pipeline.run.preflight import check_students


@pytest.fixture
def start(tmp_path) -> Path:
    return Path(shutil.copytree(LAB_BASE, tmp_path / "start"))


@pytest.fixture
def config(lab_config, tmp_path, start) -> str:
    rows = [{"question": f"Which trade did person {i} learn?", "answer": "Weaving."} for i in range(4)]
    return str(
        lab_config(data=two_sets(tmp_path, rows), students=[{"name": "one", "model": str(start)}], train__epochs=1)
    )


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def with_token(folder: Path, token: str) -> None:
    """The tokenizer learns a token that the model has no row for."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = 1 + max(*raw["model"]["vocab"].values(), *(one["id"] for one in raw["added_tokens"]))
    raw["added_tokens"].append({"id": new, "content": token, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "<bos><|user|>Today is Monday. {{ messages[-1]['content'] }}<|assistant|>"
    )


FAULTS = {
    "quantised": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}), (),
        "quantised with bitsandbytes", "16-bit weights",
    ),
    "generation flags": (
        lambda folder: edit(folder / "generation_config.json", num_return_sequences=4), (),
        "generation_config.json cannot be saved again", "correct the flag",
    ),
    "another template": (other_template, (), "go on with 'Today is Monday.", "prompt.format: plain"),
    "short context": (
        lambda folder: edit(folder / "config.json", max_position_embeddings=9), (), "the model's context is 9", "shorten",
    ),
    "no such module": (lambda folder: None, ("train.lora={rank: 2, targets: [c_fc]}",), "no module 'c_fc'", "q_proj"),
    "too many layers": (lambda folder: None, ("train.last_layers=99",), "last_layers is 99", "at most"),
    "more ids than stored": (lambda folder: None, ("train.top_k=21",), "the store has 20", "at most 20"),
    "no log-sum-exp": (
        lambda folder: None, ("train.loss=reverse_kl_tail", "teacher.logsumexp=false"), "log-sum-exp", "logsumexp: true",
    ),
    "one position": (lambda folder: None, ("train.position_decay=0.5",), "position_decay does nothing", "max_positions"),
    "noise that stays": (
        lambda folder: None, ("students.0.start_noise=0.5", "train.freeze_embeddings=true"),
        "students.0.start_noise with train.freeze_embeddings", "leave out start_noise",
    ),
    "an option without effect": (
        lambda folder: None, ("students.0.start_noise=0.5", "train.huber_delta=2"),
        "huber_delta does nothing with forward_kl_tail", "huber_centred",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(), (), "students.one.model", "complete the directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_student_that_cannot_be_trained_is_refused_before_the_teacher_is_asked(
    config, start, tmp_path, capsys, fault
):
    spoil, overrides, what, hint = FAULTS[fault]
    spoil(start)
    options = [part for text in overrides for part in ("--set", text)]
    command = "run" if fault == "no weights" else "teacher-logits"  # stage one alone may be run where no student is
    assert main([command, "--config", config, *options]) == EXIT_USER
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert what in said[0]
    assert hint in said[1]
    assert not (tmp_path / "runs").exists()


def test_the_same_of_students_that_a_sweep_makes(config, tmp_path, capfd):
    assert main(["run", "--config", config, "--sweep", "train.top_k=5,50"]) == EXIT_USER
    assert "train.top_k is 50, the store has 20" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_student_whose_model_is_elsewhere_is_said_to_be_unchecked(config, start):
    shutil.rmtree(start)
    said = check_students(load_config(config), must_be_here=False)
    assert len(said) == 1
    assert "student one: not checked before stage one" in said[0]


def test_a_template_that_plain_prompts_do_not_use_may_differ(config, start):
    other_template(start)
    plain = ("prompt.format=plain", "prompt.prefix_placement=text")
    assert check_students(load_config(config, plain)) == []


def test_a_token_without_a_row_that_no_prompt_uses_is_harmless_in_all_stages(config, start, tmp_path, capsys):
    """In the teacher's tokenizer and the student's; padding is what such a token is added for."""
    with_token(start, "[PAD]")
    edit(start / "tokenizer_config.json", pad_token="[PAD]")
    teacher = ("--set", f"teacher.model={start}", "--set", "evaluate.attacks=[]")
    assert main(["teacher-logits", "--config", config, *teacher]) == EXIT_DONE
    assert main(["distill", "--config", config, *teacher]) == EXIT_DONE
    assert (tmp_path / "runs").is_dir()


@dataclass
class Row:
    """As much of stage one's rows as is looked at."""

    row_id: str
    subset: str
    student_ids: list[int]
    given_ids: list[int] | None = None


def test_a_token_without_a_row_that_a_prompt_uses_is_refused_with_the_rows_id(config, start):
    with_token(start, "<|turn|>")
    loaded = load_config(config, (f"teacher.model={start}",))
    width = json.loads((start / "config.json").read_text())["vocab_size"]
    check_students(loaded, [Row("forget/0", "forget", [1, width - 1])])
    with pytest.raises(
        UserError, match=rf"row 'forget/1' has the id {width}, and student 'one' has a head of {width} rows"
    ):
        check_students(loaded, [Row("forget/0", "forget", [1]), Row("forget/1", "forget", [1, width])])


def test_a_token_of_one_tokenizer_only_is_refused_where_it_is_used(config, start):
    with_token(start, "<|turn|>")  # the student's alone
    loaded = load_config(config)
    check_students(loaded, [Row("forget/0", "forget", [1, 7])])
    edit(start / "config.json", vocab_size=json.loads((start / "config.json").read_text())["vocab_size"] + 8)
    with pytest.raises(UserError, match="row 'forget/0' has the id 1268, a token of one tokenizer only"):
        check_students(loaded, [Row("forget/0", "forget", [1, 1268])])
