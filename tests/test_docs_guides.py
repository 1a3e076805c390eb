"""The code in the guides is what works today: extensions are applied to a copy and tested, manifests and commands are parsed.

Their shell commands run in `test_end_to_end.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest
import yaml
from support import ROOT
from test_docs import blocks

from duet.pipeline.cli.main import duet
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import Config

EXTEND = (ROOT / "docs/guides/extend.md").read_text(encoding="utf-8")
CLUSTER = (ROOT / "docs/guides/kubernetes-and-ray.md").read_text(encoding="utf-8")


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a command line `duet …`; whatever the command would refuse is an error here."""
    assert words[0] == "duet", words
    command, context = duet.commands[words[1]], click.Context(duet, info_name="duet")
    return command.make_context(words[1], words[2:], parent=context).params


def test_the_extensions_of_the_guide_apply_and_pass_the_tests_that_it_names(tmp_path):
    for package in ("api", "cache", "stages", "pipeline", "tests", "lab"):
        (tmp_path / package).mkdir()
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "golden" not in path.parts:
                target = tmp_path / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "configs/lab.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for diff in blocks(EXTEND, "diff"):
        done = subprocess.run(
            ["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"docs/guides/extend.md no longer fits the code: {done.stderr}\n{diff}"
    files = re.findall(r"^[^\n]*`([\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)^```", EXTEND, re.MULTILINE | re.DOTALL)
    engine, its_test = "stages/engines/plain_engine.py", "tests/stages/engines/test_plain_engine.py"
    assert [name for name, _ in files] == [engine, its_test]
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = tmp_path / "names/duet"  # the copy under its import name, as pyproject.toml's package-dir has it
    names.mkdir(parents=True)
    (names / "__init__.py").symlink_to(tmp_path / "api/__init__.py")
    for package in ("cache", "pipeline", "stages"):
        (names / package).symlink_to(tmp_path / package)
    house = "tests/test_house.py"  # the engine is of a room that the student may not import
    tests = [its_test, "tests/stages/student/test_losses.py", "tests/stages/attacks/test_prompt_attacks.py", house]
    tests += ["-k", "log_cosh or textbook or plain or attack or models_own_prefix or house"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(names.parent)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    [text] = blocks(CLUSTER, "yaml")
    return {document["metadata"]["name"]: document for document in yaml.safe_load_all(text)}


def test_the_manifests_config_is_one(manifests, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(manifests["duet-config"]["data"]["experiment.yaml"], encoding="utf-8")
    config = load_config(str(path))
    assert isinstance(config, Config)
    for place in (config.runs_dir, config.store.dir, config.teacher.model, config.data.forget.path):
        assert str(place).startswith("/data/"), "everything that is kept lies in the volume"


@pytest.mark.parametrize(
    ("name", "command"),
    [("duet-teacher", "teacher-logits"), ("duet-distill", "distill"), ("duet-evaluate", "evaluate")],
)
def test_the_jobs_call_our_commands_and_heed_their_exit_codes(manifests, name, command):
    job = manifests[name]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    words = [*container["command"], *container["args"]]
    assert words[1] == command
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert parsed(words)["config_path"] == f"{mounts['config']}/experiment.yaml"
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never", "a Job with a podFailurePolicy demands it"
    rules = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"]}
    assert {action: rule["values"] for action, rule in rules.items()} == {"FailJob": [2], "Ignore": [75]}
    assert all(rule["containerName"] == container["name"] for rule in rules.values())
    if command == "teacher-logits":
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] >= spec["parallelism"] > 1
    else:
        assert "completions" not in spec, "one pod trains, one scores"


def test_rays_lines_call_our_commands():
    lines = [line for block in blocks(CLUSTER, "text") for line in block.splitlines() if line.startswith("ray ")]
    submitted = [shlex.split(line.partition(" -- ")[2]) for line in lines]
    assert [words[1] for words in submitted] == ["teacher-logits", "teacher-logits", "distill", "evaluate"]
    for words in submitted:
        assert parsed(words)["overrides"] == ("store.dir=/shared/stores",)
