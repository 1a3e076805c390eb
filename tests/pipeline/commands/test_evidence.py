"""`duet evidence`: packed and verified whole; whatever is changed, missing, additional or private is named in two lines."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_results import full_results
from support import make_plan, make_rows, run_duet, write_store

from duet.cache.errors import UserError
from duet.cache.files import json_bytes, sha256_json
from duet.pipeline.commands import evidence
from duet.pipeline.commands import report as printing
from duet.pipeline.config.load import load_config
from duet.pipeline.pages.report import render
from duet.pipeline.run.provenance import without_places


@pytest.fixture
def run_dir(lab_config, tmp_path) -> Path:
    """A run as `duet evaluate` leaves it, with a real store and made-up results."""
    config = load_config(str(lab_config(students=[{"name": "a"}, {"name": "b"}])))
    run_dir, results = config.run_dir, full_results()
    manifest = write_store(run_dir / "teacher" / "s", make_plan(), make_rows(range(10)))
    settings = config.model_dump(mode="json")
    results["provenance"] |= {
        "config": without_places(settings),
        "config_sha256": sha256_json(without_places(settings)),
    }
    results["teacher_stores"] = {"teacher": {"fingerprint": manifest.fingerprint}}
    files: dict[str, Any] = {
        "results.json": results,
        "environment.json": {"torch": "2"},
        "teacher/store.json": {"teachers": {"teacher": {"name": "s"}}},
        **{
            f"{name}/training.json": {k: v for k, v in results["students"][name].items() if k != "model"}
            for name in "ab"
        },
        **{f"answers/{name.replace(':', '-')}.json": {"answers": {}} for name in results["models"]},
        "answers/reverse/base.json": {"answers": {}},
        "answers/role_play/base.json": {"answers": {}},  # of an evaluation before
    }
    for name, value in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(json_bytes(value))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    return run_dir


@pytest.fixture
def packed(run_dir, tmp_path) -> Path:
    evidence.pack(str(tmp_path / "e.zip"), str(run_dir))
    return tmp_path / "e.zip"


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        evidence.verify(str(path))
    assert len(str(caught.value).splitlines()) == 2
    return caught.value.what


def test_what_is_packed_is_verified_and_the_same_each_time(run_dir, packed, tmp_path, capsys):
    evidence.verify(str(packed))
    assert "nothing missing, additional or changed" in capsys.readouterr().out
    evidence.pack(str(tmp_path / "again.zip"), str(run_dir))
    assert packed.read_bytes() == (tmp_path / "again.zip").read_bytes()
    files = contents(packed)
    assert sorted(files) == list(files)
    assert files["report.html"].decode() == render(json.loads(files["results.json"]))
    assert {"stores/teacher/manifest.json", "students/a/training.json", "answers/student-a.json", "config.yaml"} <= set(
        files
    )
    assert "answers/reverse/base.json" in files
    assert "answers/role_play/base.json" not in files, "the results do not rest on it"
    assert not [name for name in files if name.endswith((".safetensors", ".arrow", ".pkl", ".bin"))]


def test_a_run_that_was_moved_is_packed_all_the_same(run_dir, packed, tmp_path):
    moved = run_dir.rename(tmp_path / "elsewhere")
    evidence.pack(str(tmp_path / "moved.zip"), str(moved))
    assert contents(tmp_path / "moved.zip") == contents(packed)


def test_nothing_private_is_packed(run_dir, packed):
    together = b"".join(contents(packed).values())
    assert str(run_dir.parent).encode() in (run_dir / "config.yaml").read_bytes()
    for private in (str(run_dir), str(run_dir.parent), f"{Path.home()}/"):
        assert private.encode() not in together
    assert b"lab/models/base" not in together, "an absolute path there"


@pytest.mark.parametrize("what", ["secret", "path", "home"])
def test_what_is_private_all_the_same_is_refused(run_dir, tmp_path, monkeypatch, what):
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    private = {"secret": "correct horse battery", "path": f"{run_dir}/x", "home": f"{Path.home()}/x"}[what]
    (run_dir / "environment.json").write_text(json.dumps({"note": private}))
    with pytest.raises(
        UserError, match=r"environment\.json holds the (value of the environment variable|private path)"
    ) as e:
        evidence.pack(str(tmp_path / "e.zip"), str(run_dir))
    assert "correct horse" not in str(e.value)
    assert not (tmp_path / "e.zip").exists()


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any], new_sums: bool = False) -> Path:
    """The same zip with other contents; with `new_sums`, by someone who makes the list of hashes anew."""
    files = contents(path)
    change(files)
    if new_sums:
        del files["SHA256SUMS"]
        files["SHA256SUMS"] = evidence.sums_of(files)
    target = path.with_name("changed.zip")
    evidence.write_zip(target, files)
    return target


def test_every_file_is_covered_by_the_list(packed):
    for name in contents(packed):
        if name != "SHA256SUMS":
            assert f"the sha256 of {name} is" in refused(
                rewritten(packed, lambda f, n=name: f.update({n: f[n] + b" "}))
            )
            assert f"{name} is listed in SHA256SUMS and missing" in refused(
                rewritten(packed, lambda f, n=name: f.pop(n))
            )
    assert "more.txt is not listed" in refused(rewritten(packed, lambda f: f.update({"more.txt": b""})))
    assert "SHA256SUMS is missing" in refused(rewritten(packed, lambda f: f.pop("SHA256SUMS")))
    assert "not a hash and a name" in refused(rewritten(packed, lambda f: f.update({"SHA256SUMS": b"nonsense\n"})))


def edited(name: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old.encode() in files[name]
        files[name] = files[name].replace(old.encode(), new.encode())

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (edited("report.html", "not unlearned", "suppressed"), "report.html is not what results.json renders to"),
        (edited("results.json", "0.00413", "0.00001"), "report.html is not what results.json renders to"),
        (edited("config.yaml", "epochs: 30", "epochs: 31"), "config.yaml is not the settings"),
        (edited("students/a/training.json", '"steps": 3', '"steps": 4'), "students/a/training.json says otherwise"),
        (edited("stores/teacher/manifest.json", '"fingerprint": "', '"fingerprint": "0'), "is of another store"),
        (lambda files: files.pop("students/b/training.json"), "students/b/training.json is missing"),
        (lambda files: files.pop("answers/base.json"), "answers/base.json is missing"),
        (lambda files: files.update({"run.sh": b""}), "run.sh does not belong to the evidence"),
        (lambda files: files.update({"answers/../x.json": b""}), "answers/../x.json does not belong to the evidence"),
        (lambda files: files.update({"answers/lens/x.json": b""}), "answers/lens/x.json does not belong"),
    ],
)
def test_a_new_list_of_hashes_does_not_hide_what_does_not_fit(packed, change, what):
    assert what in refused(rewritten(packed, change, new_sums=True))


def test_what_is_no_evidence_is_refused(packed, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(packed.read_bytes()[:-100])
    assert "not a zip file that can be read" in refused(broken)
    raw = bytearray(packed.read_bytes())
    raw[200] ^= 255
    broken.write_bytes(raw)
    assert refused(broken)
    assert "no such file" in refused(tmp_path / "nothing.zip")
    with zipfile.ZipFile(packed, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("report.html", "another")
    assert "report.html occurs twice" in refused(packed)


def test_an_incomplete_run_is_not_packed(run_dir, tmp_path):
    (run_dir / "answers/base.json").unlink()
    with pytest.raises(UserError, match=r"has no answers/base\.json"):
        evidence.pack(str(tmp_path / "e.zip"), str(run_dir))
    with pytest.raises(UserError, match=r"does not end in \.zip"):
        evidence.pack(str(tmp_path / "e.tar"), str(run_dir))
    with pytest.raises(UserError, match=r"has no results\.json"):
        evidence.pack(str(tmp_path / "e.zip"), str(tmp_path))


def test_the_commands_find_the_only_run(run_dir, tmp_path):
    """As the README says them; with two runs, they ask which."""
    for command in ("report", "evidence e.zip", "evidence verify e.zip"):
        done = run_duet(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    again = run_duet("evidence", "pack", "e.zip", "--run", "runs/lab", cwd=tmp_path)
    assert (again.returncode, again.stderr.splitlines()[0]) == (2, "error: e.zip is there already")
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/results.json").write_text("{}")
    done = run_duet("report", cwd=tmp_path)
    assert done.returncode == 2
    assert "runs/lab, runs/other" in done.stderr
    done = run_duet("report", "runs/other", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)


def test_without_a_browser_printing_says_what_to_do(run_dir, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"none of chromium, .* is on PATH\nhint: install one"):
        printing.report(str(run_dir), pdf=True)
    assert not list(run_dir.glob("*.pdf"))


def test_places_lose_their_folders_and_texts_do_not():
    settings = {
        "runs_dir": "/data/me/runs",
        "data": {"path": "lab/forget.jsonl", "more": [{"path": "/home/me/x.jsonl"}]},
        "teacher": {"model": "C:\\me\\model", "prefix": "/no_think forget it"},
        "store": {"dir": None, "cache_dir": "~/.cache/duet"},
    }
    assert without_places(settings) == {
        "runs_dir": "runs",
        "data": {"path": "lab/forget.jsonl", "more": [{"path": "x.jsonl"}]},
        "teacher": {"model": "model", "prefix": "/no_think forget it"},
        "store": {"dir": None, "cache_dir": "duet"},
    }
