"""`duet compare` on a small part of the lab: killed and repeated, nothing is done twice; table and page say the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_browser
import pytest
from command_line import duet
from html_page import Page
from support import ROOT, run_duet, write_jsonl
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Interrupted
from duet.cache.watch import Watch
from duet.pipeline.cli.main import main
from duet.pipeline.commands import compare
from duet.pipeline.commands.compare_parts import Work, made
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.pages.comparison import cells, heads, render, sentences
from duet.stages.questions.contexts import context_texts
from duet.stages.student.alone import alone_in

browser = in_browser.browser  # the fixture

# Sends itself SIGTERM after {after} optimizer steps of baselines.
STOPPED = """
import os, signal, sys
from duet.stages.compare import train as baselines
step, calls = baselines._stepped, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == {after}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
baselines._stepped = counted
from duet.pipeline.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Twelve questions of each set, DUET without and with hardening, two methods, one rate, two seeds, three epochs."""
    import yaml

    folder = tmp_path_factory.mktemp("compare")
    raw = yaml.safe_load((ROOT / "configs/lab.yaml").read_text(encoding="utf-8"))
    for subset in ("forget", "retain"):
        lines = (ROOT / f"lab/data/{subset}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
        raw["data"][subset]["path"] = str(write_jsonl(folder / f"{subset}.jsonl", [json.loads(line) for line in lines]))
    raw |= {"runs_dir": str(folder / "runs"), "device": "cpu", "students": [{"name": "base"}]}
    raw["teacher"] |= {"model": str(ROOT / "lab/models/base"), "engine": "transformers"}
    del raw["teacher"]["max_positions"]  # which a preset sets
    raw["train"] |= {"epochs": 3, "batch_size": 8}
    raw["evaluate"]["sets"] = {}
    raw["compare"] = {
        "methods": ["ga", "refusal"], "lr_factors": [0.3], "grid": {"ga": {"lr": [1e-6, 1e-4]}},
        "oracle": str(ROOT / "lab/models/small"), "harden": ["none", "deep"], "seeds": 2,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_only_missing_teacher_logits_start_stage_one(config, tmp_path, monkeypatch, capsys):
    """Another fault of the run's stores is reported as it is."""
    begun: list[str] = []

    def run_stage(name: str, *_: object) -> int:
        begun.append(name)
        return EXIT_INTERRUPTED

    monkeypatch.setattr("duet.pipeline.commands.compare_parts.run_stage", run_stage)
    command = ["compare", "--config", str(config), "--set", f"runs_dir={tmp_path}"]
    assert main(command) == EXIT_INTERRUPTED
    assert begun == ["teacher-logits"]
    name = load_config(str(config)).name
    (tmp_path / name / "teacher").mkdir(parents=True)
    (tmp_path / name / "teacher" / "store.json").write_text("{")
    capsys.readouterr()
    assert main(command) == EXIT_USER
    assert "store.json is not valid JSON" in capsys.readouterr().err
    assert begun == ["teacher-logits"]


def stopped(config: Path, after: int) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "-c", STOPPED.format(after=after), "compare", "--config", str(config), "--jobs", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(config) -> tuple[list[subprocess.CompletedProcess[str]], Path]:
    """Stopped in the second of gradient ascent's two candidates (9 steps each), then ended, then called again."""
    calls = [
        stopped(config, 13),
        run_duet("compare", "--config", str(config)),
        run_duet("compare", "--config", str(config), "--jobs", "1"),
    ]
    return calls, config.parent / "runs" / "lab"


def test_a_stopped_comparison_goes_on_and_does_nothing_twice(done):
    (first, second, third), run_dir = done
    assert first.returncode == EXIT_INTERRUPTED, first.stderr
    assert "step 4 of 9 is saved" in first.stderr
    assert [second.returncode, third.returncode] == [EXIT_DONE, EXIT_DONE], second.stderr + third.stderr
    assert "wrote 24 rows" in first.stdout  # stage one is part of it
    scored = [line for call in (first, second, third) for line in call.stdout.splitlines() if "validation part" in line]
    assert len(scored) == len(set(scored)) == 5, (
        scored
    )  # one of DUET each, two of gradient ascent, one of refusal training
    assert "duet, lr 9e-05" in first.stdout
    assert "duet, lr" not in second.stdout
    assert "engine:" not in third.stdout, "nobody was asked again"
    kept = sorted(str(path.parent.relative_to(run_dir / "compare")) for path in run_dir.glob("compare/*/*/model"))
    expected = [name for name in ("duet", "duet-deep", "ga", "refusal") for _ in range(2)]
    assert sorted(name.split("/")[0] for name in kept) == expected, "only the best of each is kept, with each seed"


def test_the_comparison_holds_every_model_on_the_questions_that_nothing_was_chosen_on(done):
    results = json.loads((done[1] / "compare.json").read_text(encoding="utf-8"))
    assert list(results["models"]) == ["base", "teacher", "duet", "duet:deep", "ga", "refusal", "oracle"]
    for name in ("forget", "retain"):
        assert results["split"]["validation"][name] + results["split"]["reported"][name] == 12
        assert results["models"]["ga"][f"{name}.rougeL_recall"]["n"] == results["split"]["reported"][name]
    ga = results["methods"]["ga"]
    shifts = [row["validation_shift"] for row in ga["grid"]]
    assert [row["chosen"] for row in ga["grid"]] == [shift == max(shifts) for shift in shifts]
    for model, of_model in results["performance_shift"].items():
        low, high = of_model["ci95"]
        assert low <= of_model["value"] <= high, model
        less = results["comparisons"][model]["performance_shift"] if model != "duet" else {"difference": 0}
        duet = results["performance_shift"]["duet"]["value"]
        assert less["difference"] == pytest.approx(of_model["value"] - duet), model
    assert "attack.reverse_worst.forget.rougeL_recall" in results["comparisons"]["refusal"]


def test_a_row_is_the_mean_over_its_seeds_models(done):
    results = json.loads((done[1] / "compare.json").read_text(encoding="utf-8"))
    for name, models in (
        ("ga", ["ga", "ga:seed1"]),
        ("duet:deep", ["duet:deep", "duet:deep:seed1"]),
        ("base", ["base"]),
    ):
        for key, score in results["models"][name].items():
            of_models = [results["of_models"]["models"][model][key]["value"] for model in models]
            assert score["seeds"] == pytest.approx(of_models), (name, key)
            assert score["value"] == pytest.approx(sum(of_models) / len(models)), (name, key)
            assert score["ci95"][0] <= score["value"] <= score["ci95"][1], (name, key)
        assert sum(results["outcomes"][name]["models"].values()) == len(models)


def test_each_preset_has_its_own_teacher_logits_and_damage(done):
    results = json.loads((done[1] / "compare.json").read_text(encoding="utf-8"))
    stores = {row: of_row["teacher"] for row, of_row in results["teacher_stores"].items()}
    assert stores["duet"]["prefix_on"] == stores["duet:deep"]["prefix_on"] == "forget"
    assert stores["duet:deep"]["positions"] > stores["duet"]["positions"]
    (training, _) = sorted((done[1] / "compare" / "duet-deep").glob("*/training.json"))
    assert json.loads(training.read_text(encoding="utf-8"))["start_noise"] == 0.5
    assert results["methods"]["duet:deep"]["title"] == "DUET, harden: deep"


def test_table_and_page_show_what_is_in_the_json(done):
    calls, run_dir = done
    results = json.loads((run_dir / "compare.json").read_text(encoding="utf-8"))
    html = (run_dir / "compare.html").read_text(encoding="utf-8")
    assert html == render(results)
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert html.count("<circle ") == len(results["models"])
    assert html.count('class="whisker"') == len(results["models"])
    for name in results["models"]:
        row = cells(name, results)
        assert len(row) == len(heads(results))
        assert row[0].split("\n")[0] in calls[-1].stdout
        for text in row[1:]:
            assert text.split("\n")[0] in html
    for sentence in sentences(results):
        assert sentence in calls[-1].stdout
    for row, is_told in (("ga", True), ("duet:deep", False)):
        results["comparisons"][row]["performance_shift"]["distinguishable"] = not is_told
    told = next(sentence for sentence in sentences(results) if sentence.startswith("not distinguishable from DUET"))
    assert "gradient ascent" in told
    assert "harden: deep" not in told


def test_an_attack_on_whose_kind_of_text_a_method_was_trained_is_marked_and_does_not_speak_for_it(done):
    results = json.loads((done[1] / "compare.json").read_text(encoding="utf-8"))
    column = heads(results).index(next(head for head in heads(results) if head.startswith("reverse prompts")))
    key = "attack.reverse_worst.forget.distinctive_recall"
    results["comparisons"]["refusal"][key] |= {"distinguishable": True, "difference": -0.5}
    for seen in ([], ["reverse"]):
        results["methods"]["refusal"]["trained_on"] = seen
        assert cells("refusal", results)[column].endswith("seen") == bool(seen)
        told = [sentence for sentence in sentences(results) if sentence.startswith("reverse prompts: at worst fewer")]
        assert ("refusal" in "".join(told)) != bool(seen)
        assert not cells("ga", results)[column].endswith("seen")


def test_attacks_with_texts_that_a_preset_trains_on_are_refused(config, tmp_path):
    text = context_texts()["reverse"][0]
    extra = tmp_path / "attacks.yaml"
    extra.write_text(f'reverse:\n  mine: {{ in_front: "Listen. {text}" }}\n', encoding="utf-8")
    common = ("compare", "--config", str(config), "--set", "name=other", "--set", f"evaluate.attack_texts={extra}")
    found = duet(*common, "--set", "compare.harden=[none, wide]")
    assert found.code == EXIT_USER, found.err
    assert "attack reverse, mine: student 'base' is trained on its text" in found.err
    assert "hint:" in found.err
    assert not (config.parent / "runs" / "other").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.methods=[gradient]", "compare.methods"),
        ("compare.grid.duet.constant=[1]", "duet has no constant"),
        ("compare.grid.ga.constant=[1]", "ga has no constant"),
        ("compare.oracle=lab/models/none", "compare.oracle"),
        ("compare.harden=[hard]", "there is no preset 'hard'"),
        ("compare.harden=[deep, deep]", "harden names one twice"),
        ("teacher.max_positions=3", "deep sets teacher.max_positions to 128, and the config says 3"),
        ("students=[{name: s, start_noise: 0.1}]", "no student starts from the teacher's own weights"),
        ("students=[{name: s, model: lab/models/small}]", "no student starts from the teacher's own weights"),
    ],
)
def test_what_a_user_can_mend_is_told_before_anything_is_trained(config, override, message):
    found = duet("compare", "--config", str(config), "--set", "name=other", "--set", override)
    assert found.code == EXIT_USER, found.err
    assert message in found.err
    assert "hint:" in found.err
    assert not (config.parent / "runs" / "other").exists()


def test_layers_that_rmu_would_not_train_are_told_before_anything_is_trained(config):
    own = ("name=other", "compare.methods=[ga, rmu]", "compare.harden=[none]", "train.last_layers=1")
    found = duet("compare", "--config", str(config), *(part for text in own for part in ("--set", text)))
    assert found.code == EXIT_USER, found.err
    assert "rmu none after layer 1" in found.err
    assert not (config.parent / "runs" / "other").exists()


@pytest.mark.skipif(bool(in_browser.MISSING), reason="no Chromium, see in_browser.py")
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1200, "dark")])
def test_the_page_in_a_real_browser(browser, done, width, scheme):
    page = done[1] / "compare.html"
    in_browser.check_page(browser, page, width, charts=1)
    in_browser.show(browser, page, width, scheme)
    ratio, text, seen = browser.execute_script(in_browser.CONTRAST)
    assert ratio >= 4.5, (ratio, text)
    assert seen > 30


@pytest.mark.parametrize("settings", ["compare", "evaluate", "train"])
def test_a_comparison_with_other_settings_is_kept(tmp_path, monkeypatch, settings):
    for name in ("render", "compare_table"):
        monkeypatch.setattr(compare, name, lambda results: "")
    monkeypatch.setattr(compare, "sentences", lambda results: [])
    first = {"compare": {}, "evaluate": {"attacks": "all"}, "train": {}}
    for results in (first, first, first | {settings: {"other": 1}}):
        compare._publish(RunDir(tmp_path), results)
    assert json.loads((tmp_path / "compare-1.json").read_text()) == first
    assert (tmp_path / "compare-1.html").is_file()
    assert not (tmp_path / "compare-2.json").exists()


def test_a_method_that_another_process_is_at_is_waited_for(tmp_path):
    """Here until a signal comes. Both would otherwise remove each other's checkpoints and models that were not chosen."""
    nothing: Any = None  # is asked for before the folder is free
    plan: Any = SimpleNamespace(folder=tmp_path)
    work = Work(nothing, {}, [plan], Watch(should_stop=lambda: True), nothing)
    with alone_in(tmp_path / "npo", "npo", Watch()), pytest.raises(Interrupted, match="compare, npo"):
        made(work, "npo")
