"""A wheel holds all that runs, under one name: tried in an environment of its own, far from the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from support import LAB_BASE, ROOT, two_sets


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone, as a clone has them."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("lab/", "tests/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [found] = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    found = folder / "bin" / "python"
    subprocess.run([found, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    [packages] = folder.glob("lib/*/site-packages")
    # A path in a .pth file joins sys.path, and .pth files there are not read: this repository stays out of reach.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return found


def test_the_wheel_holds_the_package_duet_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"duet"}
    tracked = [path for package in ("cache", "stages", "pipeline") for path in (ROOT / package).rglob("*.*")]
    wanted = {f"duet/{p.relative_to(ROOT)}" for p in tracked if p.suffix in (".py", ".yaml", ".css")}
    assert wanted <= set(names)


def test_only_duet_can_be_imported(python, tmp_path):
    code = "import duet, duet.cache.reader, sys; assert 'torch' not in sys.modules; print(duet.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(python.parent.parent)
    for name in ("cache", "stages", "pipeline", "api"):
        done = subprocess.run(
            [python, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert "ModuleNotFoundError" in done.stderr, name


def test_the_installed_command_runs_an_experiment(python, tmp_path):
    """A copied lab config of a few questions, through all three stages."""
    config = yaml.safe_load((ROOT / "configs/lab.yaml").read_text(encoding="utf-8"))
    rows = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(4)]
    config |= {"data": two_sets(tmp_path, rows), "students": [{"name": "s"}]}
    config["teacher"] |= {"model": str(LAB_BASE), "engine": "transformers"}
    config["train"] = {"epochs": 1, "batch_size": 4}
    config["evaluate"] = {"max_new_tokens": 4, "attacks": []}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    duet = python.with_name("duet")
    assert "teacher-logits" in subprocess.run([duet, "--help"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run(
        [duet, "run", "--config", "own.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/lab/results.json").is_file()
