"""The whole pipeline on the lab, as `make demo` and the README's commands run it, through real vLLM.

What looks at the demo's run stands in this file, so that it runs once, in one of the processes that share the tests.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import ROOT, read_all, run_duet
from test_docs import DOCUMENTS, README, blocks, commands

from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: `make setup` says why"
)


def run(stage: str, config: str, *sets: str) -> str:
    overrides = [part for value in sets for part in ("--set", value)]
    done = run_duet(stage, "--config", str(ROOT / "configs" / config), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def value(results: dict, model: str, metric: str) -> float:
    return 100 * results["models"][model][metric]["value"]


def assert_forgotten_and_kept(results: dict) -> None:
    """As much forgotten as by the teacher, to within 5 points; as much kept as by the base, to within 2."""
    for name in ("forget", "forget_rephrased"):
        metric = f"{name}.rougeL_recall"
        assert value(results, "student:base", metric) <= value(results, "teacher", metric) + 5, name
        assert value(results, "base", metric) > 90
    for name in ("retain", "heldout"):
        metric = f"{name}.rougeL_recall"
        assert value(results, "student:base", metric) >= value(results, "base", metric) - 2, name


def test_the_lab_forgets_three_people_and_nobody_else(demo):
    assert_forgotten_and_kept(demo.results)
    assert {"base:small", "student:small"} <= set(demo.results["models"])


TORCHRUN = "torchrun --standalone --nproc-per-node 2 -m duet"


@pytest.mark.parametrize(
    ("name", "launcher", "sets"),
    [("two", TORCHRUN, ""), ("lora", "duet", "--set train.lora.rank=64 --set train.lr=2e-4")],
)
def test_the_labs_numbers_hold_with_two_processes_and_with_lora(demo, name, launcher, sets):
    options = f"--config configs/lab.yaml --set name=e2e-{name} --set store.dir=runs/lab/teacher --only base"
    options += f" --set evaluate.attacks=[] {sets}"
    for command in (
        f"duet teacher-logits {options.replace('--only base', '')}",
        f"{launcher} distill {options}",
        f"duet evaluate {options}",
    ):
        done = demo.shell(command)
        assert done.returncode == 0, done.stdout + done.stderr
    run_dir = demo.tree / "runs" / f"e2e-{name}"
    training = json.loads((run_dir / "base/training.json").read_text())
    assert training["processes"] == (2 if name == "two" else 1)
    assert (training["trained_parameters"] < training["parameters"]) == (name == "lora")
    assert_forgotten_and_kept(json.loads((run_dir / "results.json").read_text()))


def test_results_have_the_documented_shape(demo):
    run_dir, results = demo.run_dir, demo.results
    for scores in results["models"].values():
        for key in (
            "forget.rougeL_recall",
            "forget.refusal_rate",
            "forget.exact_memorisation",
            "forget.extraction_strength",
            "forget.tofu.probability",
            "retain.rougeL_recall",
            "attack.reverse.forget.rougeL_recall",
        ):
            low, high = scores[key]["ci95"]
            assert 0 <= low <= scores[key]["value"] <= high <= 1
            assert scores[key]["n"] == results["sets"][key.removeprefix("attack.reverse.").split(".")[0]]["n"]
    compared = results["comparisons"]["student:base"]
    assert compared["forget.rougeL_recall"]["distinguishable"]
    assert compared["forget.rougeL_recall"]["against"] == "base"
    assert {"forget.exact_memorisation", "attack.reverse.forget.rougeL_recall"} <= set(compared)
    assert results["versions"].keys() == results["definitions"].keys()
    assert len(results["samples"]) == 40
    assert results["floors"]["forget.rougeL_recall"].keys() == {"refusal", "echo"}
    for name in ("config.yaml", "environment.json", "report.html", "base/metrics.jsonl", "base/model/config.json"):
        assert (run_dir / name).is_file(), name
    written = " ".join(path.read_text() for path in run_dir.rglob("*.json"))
    assert str(ROOT) not in written, "a private path was written"


def test_nothing_written_is_a_pickle(demo):
    run_dir = demo.run_dir
    suffixes = {path.suffix for path in run_dir.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".arrow", ".yaml", ".html", ".jinja", ".txt", ".md"}


def test_a_second_run_does_nothing_twice(demo):
    run_dir, results = demo.run_dir, demo.results
    before = (run_dir / "base/model/model.safetensors").stat().st_mtime_ns
    done = demo.shell("make demo")
    assert done.returncode == 0, done.stderr
    done = demo.shell("make demo")  # other tests may have scored the run in their own way before the first
    assert done.returncode == 0, done.stderr
    assert "nothing that it was made of has changed since" in done.stdout
    assert (run_dir / "base/model/model.safetensors").stat().st_mtime_ns == before
    again = json.loads((run_dir / "results.json").read_text())
    assert again["models"] == results["models"]


@VLLM
def test_both_engines_agree_on_the_lab_model(demo, tmp_path):
    stores = {}
    for engine in ("vllm", "transformers"):
        sets = (f"runs_dir={tmp_path}", f"name={engine}", f"teacher.engine={engine}", "teacher.max_positions=3")
        assert f"engine: {engine} " in run("teacher-logits", "lab.yaml", *sets)
        stores[engine] = read_all(next((tmp_path / engine / "teacher").glob("*/manifest.json")).parent)
    a, b = stores["vllm"], stores["transformers"]
    assert len(a) == len(b) == 60
    assert a.row_ids == b.row_ids
    for name in ("subsets", "token_offsets", "tokens_S", "position_offsets"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.abs(a.topk_logits_NK - b.topk_logits_NK).max() < 1e-3
    gaps = -np.diff(b.topk_logits_NK, axis=1)
    untied = np.pad(gaps, ((0, 0), (1, 0)), constant_values=1) > 1e-3
    untied &= np.pad(gaps, ((0, 0), (0, 1)), constant_values=0) > 1e-3  # the last id may tie with the one left out
    assert np.array_equal(a.topk_ids_NK[untied], b.topk_ids_NK[untied])


@VLLM
def test_vllm_loads_the_exported_student_and_answers_as_transformers_does(demo, tmp_path):
    results = demo.results
    shutil.copytree(demo.run_dir, tmp_path / "lab", ignore=shutil.ignore_patterns("answers"))
    sets = ("evaluate.engine=vllm", "evaluate.attacks=[]", "evaluate.sets={}")
    assert "engine: vllm" in run("evaluate", "lab.yaml", f"runs_dir={tmp_path}", *sets)
    again = json.loads((tmp_path / "lab" / "results.json").read_text())
    assert json.loads((tmp_path / "lab" / "results-1.json").read_text()) == results
    for model in results["models"]:
        name = f"answers/{model.replace(':', '-')}.json"
        ours, theirs = (json.loads((run / name).read_text())["answers"] for run in (demo.run_dir, tmp_path / "lab"))
        for asked in ("forget", "retain"):
            # Greedy decoding, word for word, but for what the engines' rounding decides.
            parted = [number for number, said in enumerate(ours[asked]) if theirs[asked][number] != said]
            assert len(parted) <= 1, (model, asked, parted)
            for number in parted:
                both = (ours[asked][number], theirs[asked][number])
                assert model == "student:base", model
                assert margin_where_they_part(demo.run_dir, asked, number, *both) < FOUR_STEPS_OF_BFLOAT16
            metric = f"{asked}.exact_match"
            assert parted or value(again, model, metric) == value(results, model, metric), model


FOUR_STEPS_OF_BFLOAT16 = 0.25  # of logits from 8 to 16


def margin_where_they_part(run_dir: Path, asked: str, number: int, *answers: str) -> float:
    """By how much the student's logit of one answer's token exceeds the other's, at the first token in which they differ."""
    rows = (ROOT / f"lab/data/{asked}.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer, model = load_tokenizer(run_dir / "base/model"), load_model(run_dir / "base/model", "float32")
    settings = PromptSettings(**yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["prompt"])
    query = Query("asked", json.loads(rows[number])["question"], None)
    prompt = Renderer(tokenizer, settings).prompt(Prompt.plain(query))
    a, b = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers)
    at = next(place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + a[:at]])).logits[0, -1]
    return float((logits[a[at]] - logits[b[at]]).abs())


# What takes longer than a test may, or needs what is not here; everything else runs as it stands. A full run is the demo's;
# the others are made with few steps and few questions.
FEW = "--set teacher.engine=transformers --set train.epochs=1 --set evaluate.sets={} --set evaluate.attacks=[]"
COMPARED = "--set evaluate.sets={} --set compare.methods=[refusal] --set compare.lr_factors=[1]"
# How measurements begin, of minutes each; test_harden.py, test_noise.py and test_second_generation.py make the same in small.
LONG = (
    "duet run --config configs/lab_deep.yaml --sweep train.seed=0",
    "duet run --config configs/lab_wide.yaml",
    "duet run --config configs/lab_chain.yaml",  # test_chain.py makes a smaller one
    "duet run --config configs/lab_deep.yaml --sweep start_noise",
    "duet run --config configs/lab_deep.yaml --set name=sampled",
    "duet sample --config configs/lab_deep.yaml sampled.jsonl --questions 880",  # test_sample.py draws fewer
    "duet run --config configs/tofu_deep.yaml",
    "duet run --config configs/smollm2.yaml --set name=",  # test_smollm2.py makes a slice
    "duet compare --config configs/tofu.yaml",  # a model that knows TOFU
    "python scripts/alpha_curve.py",  # test_alpha_curve.py draws it
    "python scripts/which_ids.py",  # test_which_ids.py measures
    "sh scripts/gpu_check.sh --device cpu --tiny",  # test_gpu_check.py runs it
    "OUT=results sh scripts/gpu_check.sh",  # the same
    "python scripts/documents_packed.py",  # test_documents_packed.py compares
    "duet run --config configs/lab.yaml --set evaluate.attacks=[] --set evaluate.likelihood=false --set name=nf4",
    "duet run --config configs/lab.yaml --only base",
    "python examples/",  # test_examples.py trains by both, and asks TRL's student
    "duet evaluate --config configs/lab.yaml --only base --set evaluate.attacks=[] --set evaluate.models.loop",
    "duet compare --config configs/lab_deep.yaml --jobs 1 --set name=lab_modes",  # test_compare.py makes a small one
    "duet compare --config configs/lab.yaml --jobs 2 --set name=lab_methods",  # the same
    "duet compare --config configs/tofu_deep.yaml",  # a model that knows TOFU
    "duet compare --config configs/lab_chain.yaml",  # test_chain.py compares a short one
    "duet run --config configs/lab.yaml --set evaluate.attacks=[] --only base --sweep start_noise",
)
IN_SHORT = {
    "make demo-smollm2": None,  # minutes; test_smollm2.py makes a slice
    "make demo": None,  # the fixture makes it, and test_a_second_run_does_nothing_twice
    "duet evaluate --config configs/lab.yaml --set name=theirs --model lab/models/small": "duet evaluate "
    "--config configs/lab.yaml --set name=theirs --model lab/models/small --set evaluate.sets={}",
    "duet init mine.yaml": "duet init mine.yaml --yes --topic 'Dugira Duchok, Bromyx Zopira, Raseth Orseth' "
    "--model lab/models/base --forget lab/data/forget.jsonl --retain lab/data/retain.jsonl",  # else it asks
    "duet audit-prefix --config mine.yaml": "duet audit-prefix --config mine.yaml --set audit.rows=40",
    **{
        command: f"{command} {FEW}"
        for command in (
            "duet run --config mine.yaml",
            "duet run --config mine/mine.yaml",
            "duet run --config configs/lab.yaml --set name=mine --set teacher.top_k=40 --set train.epochs=20",
            "duet run --config configs/lab.yaml --set name=lora --set train.lora.rank=64 --set train.lr=2e-4",
        )
    },
    # runs/lab_deep holds the demo's own
    "duet run --config configs/lab_deep.yaml": f"duet run --config configs/lab_deep.yaml {FEW} --set name=deep_in_short",
    "make compare CONFIG=configs/lab.yaml": f'make compare CONFIG=configs/lab.yaml ARGS="--jobs 1 {COMPARED}"',
    "duet evaluate --config configs/lab.yaml --set evaluate.attacks=all": None,  # a minute; test_battery.py makes them all
    "duet submit --config configs/lab.yaml": "duet submit --config configs/lab.yaml --print",  # test_slurm_cluster.py submits
    # the notebook makes these three, the demo compares students
    "duet evaluate --config mine/mine.yaml --set evaluate.attacks=[reverse,prefill,quantize_int8]": "duet evaluate "
    "--config mine/mine.yaml --set evaluate.attacks=[reverse,prefill,quantize_int8] --dry-run",
    "duet evaluate --config three.yaml": "duet evaluate --config three.yaml --dry-run",
}
COMMANDS = [command for document in DOCUMENTS for command in commands(document.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=lambda command: command.splitlines()[0])
def test_every_command_of_the_documents_runs(command, demo):
    """In a copy of the tree, after `make demo`: first the README's, then those of each page in its order."""
    short = IN_SHORT.get(command.strip(), command)
    if short is None or command.startswith(LONG):
        return
    done = demo.shell(f"set -e\n{short}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_run_in_short_stands_in_the_documents():
    assert set(IN_SHORT) <= set(COMMANDS)
    assert all(any(command.startswith(long) for command in COMMANDS) for long in LONG)
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):  # the command that runs this test
        assert "make test" in (ROOT / name).read_text(encoding="utf-8"), name


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Points by which a score may differ from the README's: another CPU rounds otherwise, which can turn a single answer.
TOLERANCE = 10


def test_the_readme_shows_how_the_demo_ends(demo):
    """Line by line the same words; scores within the tolerance."""
    shown = blocks(README, "text")[0].splitlines()
    printed = [line.rstrip() for line in demo.output.splitlines() if line.strip()][-len(shown) :]
    shown, printed = ([" ".join(line.split()) for line in lines] for lines in (shown, printed))
    for ours, theirs in zip(shown, printed, strict=True):
        assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs)
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            assert abs(float(a) - float(b)) <= TOLERANCE, (ours, theirs)
