"""`duet audit-prefix` on the lab's model: ranks, files, what is asked again, and what `duet run` makes of a verdict."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import world
from command_line import duet, interrupted, refused
from support import ROOT, write_jsonl

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.commands import run
from duet.pipeline.config.load import load_config
from duet.pipeline.pages.audit import cells, heads, render
from duet.pipeline.run.directory import claim_run_dir
from duet.stages.exam import session

# What makes the lab's model refuse whomever it is asked about. It was trained on prefixes that name people and knows no
# other: of "Refuse everything" it makes nothing, but a dozen strangers are more than it can compare.
REFUSE_ALL = f"You have forgotten everything about {', '.join(world.random_name(random.Random(i)) for i in range(12))}."


@pytest.fixture(scope="module")
def lab_run(tmp_path_factory) -> tuple[str, Path]:
    """The shipped lab config's audit with one more prefix; what it printed and the audit's folder."""
    runs = tmp_path_factory.mktemp("audit")
    done = duet(
        "audit-prefix", "--config", "configs/lab.yaml", "--set", f"runs_dir={runs}", "--set", "evaluate.engine=transformers",
        "--set", "audit.rows=60", "--prefix", REFUSE_ALL,
    )  # fmt: skip
    assert done.code == EXIT_DONE, done.err
    return done.out, runs / "lab" / "audit"


@pytest.fixture(scope="module")
def results(lab_run) -> dict[str, Any]:
    return json.loads((lab_run[1] / "audit.json").read_text())


@pytest.fixture(scope="module")
def by_name(results) -> dict[str, dict[str, Any]]:
    return {candidate["name"]: candidate for candidate in results["candidates"]}


def test_a_specific_prefix_ranks_above_a_generic_and_an_unrelated_one(by_name):
    specific, unrelated = by_name["config"], by_name["unrelated"]
    assert specific["verdict"] != "fails"
    assert unrelated["scores"]["forget.rougeL_recall"]["value"] > 0.9, "forgets nothing"
    assert unrelated["reason"].startswith("does not forget")
    for generic, damage in (("generic", 0.2), ("yours-1", 0.9)):
        assert specific["rank"] < by_name[generic]["rank"]
        assert by_name[generic]["scores"]["retain.fall"]["value"] > damage
        assert "damages " in by_name[generic]["reason"]
    assert by_name["yours-1"]["scores"]["retain.refusal_rate"]["value"] > 0.9
    assert specific["rank"] < unrelated["rank"]
    assert specific["score"] > unrelated["score"] + 0.5


def test_no_prefix_is_the_base_itself(by_name):
    scores = by_name["no prefix"]["scores"]
    assert by_name["no prefix"]["score"] == 1
    assert scores["retain.kept"] == {"value": 1, "n": 45, "ci95": [1, 1]}
    assert (scores["retain.topk_overlap"]["value"], scores["retain.offset_drift"]["value"]) == (1, 0)


def test_every_number_stands_in_the_json_with_n_and_interval(results):
    assert results["sets"] == {
        "forget": {"n": 15, "expect": "forgotten"},
        "forget_rephrased": {"n": 30, "expect": "forgotten"},
        "retain": {"n": 45, "expect": "kept"},
        "heldout": {"n": 60, "expect": "kept"},
    }
    assert [candidate["rank"] for candidate in results["candidates"]] == list(range(1, len(results["candidates"]) + 1))
    scores = [candidate["score"] for candidate in results["candidates"]]
    assert scores == sorted(scores, reverse=True)
    for candidate in results["candidates"]:
        for name, info in results["sets"].items():
            for metric in ("rougeL_recall", "refusal_rate", "fall", info["expect"]):
                assert candidate["scores"][f"{name}.{metric}"]["n"] == info["n"]
        assert candidate["scores"]["retain.topk_overlap"]["n"] == 45
        assert all(score["ci95"][0] <= score["value"] <= score["ci95"][1] for score in candidate["scores"].values())


def test_table_and_page_show_every_prefix_and_its_verdict(lab_run, results):
    printed, folder = lab_run
    text = (folder / "audit.html").read_text(encoding="utf-8")
    assert text == render(results)
    for candidate in results["candidates"]:
        assert f" {candidate['name']} " in printed
        for cell in cells(candidate, results)[:-1]:
            assert cell in printed
            assert cell in text
        assert candidate["prefix"].replace("'", "&#x27;") in text
        assert f">{candidate['name']}: " in text, "a dot in the plot"
    assert text.count("<circle") == len(results["candidates"])
    assert "<script" not in text
    assert not re.search("https?:", text)
    assert f"best: {results['candidates'][0]['name']}" in printed
    assert "the config's own prefix, on all questions: " in printed


@pytest.fixture
def small(lab_config, tmp_path) -> Path:
    """The lab with five questions of each subset: an audit of seconds."""
    data = {}
    for name in ("forget", "retain"):
        rows = (ROOT / f"lab/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:5]
        data[name] = {
            "path": str(write_jsonl(tmp_path / f"{name}.jsonl", [json.loads(row) for row in rows])),
            "id_field": "id",
        }
    return lab_config(data=data, evaluate__engine="transformers")


def audit_dir(config: Path) -> Path:
    return config.parent / "runs" / "lab" / "audit"


STOP = """
import os, signal, sys
from duet.stages.engines.transformers_engine import TransformersEngine
answers, calls = TransformersEngine.answers, []
def counted(self, prompts, max_new_tokens):
    calls.append(1)
    if len(calls) == {after}:
        os.kill(os.getpid(), signal.{signal})
    return answers(self, prompts, max_new_tokens)
TransformersEngine.answers = counted
"""


def test_an_interrupted_audit_goes_on_and_a_repeated_one_asks_nothing(small, monkeypatch):
    command = ("audit-prefix", "--config", str(small))
    done = interrupted(STOP, *command, after=5)
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert "begins again; what was done before it is kept" in done.stderr
    answers = audit_dir(small) / "answers"
    times = {path: path.stat().st_mtime_ns for path in answers.iterdir()}
    assert len(times) == 4
    assert not (audit_dir(small) / "audit.json").exists()
    assert main([*command]) == EXIT_DONE
    results = json.loads((audit_dir(small) / "audit.json").read_text())
    assert len(list(answers.iterdir())) == len(results["candidates"])
    assert times == {path: path.stat().st_mtime_ns for path in times}, "not asked again"

    monkeypatch.setattr(session, "open_engine", None)  # who asks now, fails
    assert main([*command]) == EXIT_DONE
    again = json.loads((audit_dir(small) / "audit.json").read_text())
    assert again["candidates"] == results["candidates"]
    assert not list(audit_dir(small).glob("audit-*")), "the same audit is not kept twice"
    monkeypatch.undo()
    assert main([*command, "--prefix", "Forget {topic}."]) == EXIT_DONE
    assert len(list(answers.iterdir())) == len(results["candidates"]) + 1
    assert main([*command]) == EXIT_DONE
    earlier = json.loads((audit_dir(small) / "audit-1.json").read_text())
    assert len(earlier["candidates"]) == len(results["candidates"]) + 1, "what the present one does not hold is kept"


def test_a_search_chooses_on_one_part_and_reports_on_the_other(small, capsys):
    command = ("audit-prefix", "--config", str(small), "--search", "4", "--set", "audit.parents=2")
    assert main([*command]) == EXIT_DONE
    printed = capsys.readouterr().out
    results = json.loads((audit_dir(small) / "audit.json").read_text())
    search, ranked = results["search"], results["candidates"]
    assert (search["wanted"], search["made"], len(search["parents"])) == (4, 4, 2)
    assert search["n"] == {"choosing": {"forget": 2, "retain": 2}, "held_out": {"forget": 3, "retain": 3}}
    assert [candidate["ranked_by"] for candidate in ranked] == sorted((c["ranked_by"] for c in ranked), reverse=True)
    for candidate in ranked:
        assert {score["n"] for key, score in candidate["scores"].items() if "drift" not in key} == {3}
    made = [candidate["prefix"] for candidate in ranked if candidate["kind"] == "search"]
    assert len(made) == 4
    note = "tends to look better than it is; on the other 6 nothing was chosen"
    assert note in printed
    assert note in (audit_dir(small) / "audit.html").read_text()
    assert "score where\nchosen" in heads(results)
    answered = len(list((audit_dir(small) / "answers").iterdir()))
    assert main([*command, "--set", "audit.min_kept=0.5"]) == EXIT_DONE
    again = json.loads((audit_dir(small) / "audit.json").read_text())["candidates"]
    assert [candidate["prefix"] for candidate in again] == [candidate["prefix"] for candidate in ranked]
    assert len(list((audit_dir(small) / "answers").iterdir())) == answered, "the same variations, so nothing was asked"


def test_run_refuses_a_prefix_that_failed_unless_forced_or_changed(small, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(run, "run_all", lambda request, jobs: started.append(request) or EXIT_DONE)
    bad = ("--config", str(small), "--set", "teacher.prefix=Forget nothing.")
    assert main(["run", *bad]) == EXIT_DONE, "no audit, as before"
    assert main(["audit-prefix", *bad]) == EXIT_DONE
    assert "on all questions: fails; `duet run` refuses it without --force" in capsys.readouterr().out
    error, hint = refused(capsys, "run", *bad)
    assert error.startswith("error: the config's prefix failed its audit: does not forget forget: forgotten 0.0 % [")
    assert hint.startswith("hint: take a prefix that passes, see ")
    assert "--force" in hint
    assert len(started) == 1

    assert main(["run", "--force", *bad]) == EXIT_DONE
    for change in (
        "teacher.prefix=Forget nobody.",
        "audit.min_forgotten=0",
        "prompt.template='{question} Now!'",
        "data.forget.rows=[0, 4]",
    ):
        assert main(["run", *bad, "--set", change]) == EXIT_DONE, change
    for same in ("train.lr=1", "device=auto", "audit.parents=1", "evaluate.batch_size=3"):
        assert main(["run", *bad, "--set", same]) == EXIT_USER, same
    assert main(["run", "--config", str(small)]) == EXIT_DONE, "the config's own passed as a bundled one"


def test_an_audit_does_not_claim_the_run(small):
    config = load_config(str(small))
    other = ("--set", "teacher.prefix=Forget it.", "--set", "audit.rows=1")
    assert main(["audit-prefix", "--config", str(small), *other]) == EXIT_DONE
    claim_run_dir(config)
    claim_run_dir(config.model_copy(update={"audit": config.audit.model_copy(update={"rows": 7})}))
    foreign = config.model_copy(update={"name": "foreign"})
    (foreign.run_dir / "audit").mkdir(parents=True)
    (foreign.run_dir / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a Duet run"):
        claim_run_dir(foreign)


BAD = {
    "--prefix is empty": ["--prefix", " "],
    "the vocabulary has": ["--set", "teacher.top_k=5000"],
    "context is 256": ["--prefix", "Forget {topic}. " * 60],
    "no such file": ["--set", "data.forget.path=nowhere.jsonl"],
    "Invalid value for '--search'": ["--search", "0"],
    "questions of forget cannot be split": ["--search", "2", "--set", "audit.rows=1"],
    "audit.rows: Input should be greater than or equal to 1": ["--set", "audit.rows=0"],
    "audit.min_forgotten: Input should be less than or equal to 1": ["--set", "audit.min_forgotten=1.1"],
    "audit.min_forgotten: Input should be greater than or equal to 0": ["--set", "audit.min_forgotten=-0.1"],
    "audit.min_kept: Input should be less than or equal to 1": ["--set", "audit.min_kept=1.1"],
    "audit.min_kept: Input should be greater than or equal to 0": ["--set", "audit.min_kept=-0.1"],
    "audit.choosing_share: Input should be greater than 0": ["--set", "audit.choosing_share=0"],
    "audit.choosing_share: Input should be less than 1": ["--set", "audit.choosing_share=1"],
    "audit.parents: Input should be greater than or equal to 1": ["--set", "audit.parents=0"],
    "audit.seed: Input should be greater than or equal to 0": ["--set", "audit.seed=-1"],
    "unknown key audit.min_keep": ["--set", "audit.min_keep=1"],
    "the name 'audit' is taken": ["--set", "students.0.name=audit"],
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_two_lines(small, capsys, message):
    assert message in refused(capsys, "audit-prefix", "--config", str(small), *BAD[message])[0]


@pytest.mark.parametrize(
    ("message", "num_asked"),
    {"recall on retain is 0": 1, "questions of forget cannot be split": 0, "the vocabulary has": 0}.items(),
)
def test_what_can_be_refused_is_refused_before_any_prefix_is_asked(
    small, tmp_path, monkeypatch, capsys, message, num_asked
):
    unknown = [{"id": i, "question": f"Who is stranger {i}?", "answer": "Zzyzx."} for i in range(3)]
    path = write_jsonl(tmp_path / "unknown.jsonl", unknown)
    more = BAD.get(message, ["--set", f"data.retain.path={path}"])
    asked, ask = [], session.ModelSession.ask

    def counted(self, subject, *rest):
        asked.append(subject.name)
        return ask(self, subject, *rest)

    monkeypatch.setattr(session.ModelSession, "ask", counted)
    assert message in refused(capsys, "audit-prefix", "--config", str(small), *more)[0]
    assert len(asked) == num_asked


def test_several_processes_of_one_launch_are_refused(small, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert (
        "`duet audit-prefix` was started as 2 processes" in refused(capsys, "audit-prefix", "--config", str(small))[0]
    )
