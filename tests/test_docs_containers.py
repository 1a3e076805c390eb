"""The images: what they copy is there, they install what `make setup` installs, and they build where a builder is at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from support import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "duet.def").read_text(encoding="utf-8")
SETUP = (ROOT / "scripts/setup.sh").read_text(encoding="utf-8")
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


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


def builder() -> list[str] | None:
    """A tool here that can build the Dockerfile, and reach its base image."""
    for tool in ("docker", "podman"):
        if shutil.which(tool) and not subprocess.run([tool, "info"], capture_output=True, check=False).returncode:
            base = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[0]
            if not subprocess.run([tool, "pull", "--quiet", base], capture_output=True, check=False).returncode:
                return [tool]
    return None


ASKED_FOR = pytest.mark.skipif(
    not os.environ.get("DUET_TEST_IMAGES"),
    reason="an image takes gigabytes and minutes: `make test-images` builds them",
)


@ASKED_FOR
def test_the_docker_image_builds_and_runs():
    tool = builder()
    if tool is None:
        pytest.skip("neither Docker nor Podman works here, or they cannot fetch the base image")
    built = subprocess.run(
        [*tool, "build", "--quiet", "-t", "duet:test", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    run = subprocess.run([*tool, "run", "--rm", "duet:test", "--version"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@ASKED_FOR
def test_the_apptainer_image_builds_and_runs(tmp_path):
    if not shutil.which("apptainer"):
        pytest.skip("apptainer is not installed")
    image = tmp_path / "duet.sif"
    built = subprocess.run(
        ["apptainer", "build", str(image), "duet.def"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    run = subprocess.run(["apptainer", "run", str(image), "--version"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
