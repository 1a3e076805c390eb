"""`duet cache find`, stores that others own, and whether there is room: told before an engine starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import refused
from support import ROOT, flip_byte, nearly_same_rows, read_all, small_disk, two_sets
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.cache.location import Folder
from duet.cache.manifest import read_manifest
from duet.cache.writer import StoreWriter
from duet.pipeline.cli.main import main
from duet.pipeline.config.load import load_config
from duet.pipeline.run.stores import teacher_stores

QUESTIONS = [{"question": f"Where was person {n} born?", "answer": f"In town {n}."} for n in range(6)]


@pytest.fixture
def config(lab_config, tmp_path) -> str:
    """12 queries, four shards, stores in a folder of their own."""
    data = two_sets(tmp_path, QUESTIONS)
    return str(lab_config(data=data, store__dir=str(tmp_path / "stores"), store__shard_rows=3, train__epochs=1))


@pytest.fixture
def no_engine(monkeypatch) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("duet.stages.teacher.capture.open_engine", start)


def test_find_says_what_is_there_of_a_configs_store(config, tmp_path, capsys):
    find = ("cache", "find", "--config", config)
    what, hint = refused(capsys, *find)
    assert f"1 of this config's 1 stores is not complete: {tmp_path}/stores/" in what
    assert hint == f"hint: run: duet teacher-logits --config {config}"
    assert not (tmp_path / "stores").exists(), "it was only looked for"

    [expected] = teacher_stores(load_config(config))
    plan = expected.under("transformers").plan
    location = Folder(tmp_path / "stores" / plan.fingerprint[:16])
    with StoreWriter(location, plan) as writer:
        assert writer.claim()
        assert main([*find, "--json"]) == EXIT_USER
        found = json.loads(capsys.readouterr().out)["teacher"]
        assert (found["state"], found["rows_there"], found["rows"], found["living_writers"]) == ("incomplete", 0, 12, 1)
        assert found["path"] == str(location)
    shutil.rmtree(location.path)

    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    capsys.readouterr()
    assert main(list(find)) == EXIT_DONE
    told = capsys.readouterr().out
    assert f"{location}: complete, 12 of 12 rows are there; begun 20" in told
    assert "teacher_model: base" in told
    assert main([*find, "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)["teacher"]
    assert found["fingerprint"] == plan.fingerprint
    assert found["environment"] == read_manifest(location).environment


def test_find_knows_each_teachers_store_and_repeats_the_overrides(config, capsys):
    teachers = "teachers=[{name: plain}, {name: gone, prefix: 'Forget {topic}.'}]"
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE  # the first of the two has its store
    capsys.readouterr()
    code = main(["cache", "find", "--config", config, "--set", teachers])
    told = capsys.readouterr()
    assert code == EXIT_USER
    assert "teacher plain: " in told.out
    assert ": complete, 12 of 12" in told.out
    assert ": absent, 0 of 12" in told.out
    assert "1 of this config's 2 stores is not complete" in told.err
    assert "--set 'teachers=[" in told.err


def disk_of(monkeypatch, free: int) -> None:
    real = os.statvfs
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(f_bavail=free, f_bfree=free, f_blocks=2 * free, f_frsize=1, of=real(path)),
    )


@pytest.mark.usefixtures("no_engine")
def test_a_store_that_cannot_fit_is_refused_before_an_engine_starts(config, monkeypatch, capsys):
    disk_of(monkeypatch, 500)
    what, hint = refused(capsys, "teacher-logits", "--config", config)
    assert "No space left on device; 0.00 MB are free, at least 0.00 MB are needed" in what
    assert "store.dir" in hint
    assert "store.compression" in hint
    assert "teacher.top_k" in hint


def test_a_store_that_may_not_fit_is_written_with_a_word_on_it(config, tmp_path, monkeypatch, capsys):
    disk_of(monkeypatch, 20_000)
    assert main(["teacher-logits", "--config", config, "--set", "teacher.max_positions=4"]) == EXIT_DONE
    assert (
        f"0.02 MB are free in {tmp_path}/stores; at least 0.00 MB will be needed, at most 0.0"
        in capsys.readouterr().out
    )


@pytest.mark.usefixtures("no_engine")
def test_a_limit_of_file_sizes_is_told_before_an_engine_starts(config, monkeypatch, capsys):
    monkeypatch.setattr(resource, "getrlimit", lambda of: (100, 100))
    what, hint = refused(capsys, "teacher-logits", "--config", config)
    assert "a shard needs at least" in what
    assert "store.shard_rows" in hint


@pytest.mark.usefixtures("no_engine")
def test_a_real_small_disk_is_told_before_an_engine_starts(lab_config, tmp_path, capsys):
    rows = [{"question": f"Where was person {n} born?"} for n in range(1000)]
    data = two_sets(tmp_path, rows)
    with small_disk(tmp_path / "disk", 64) as disk:
        what, _ = refused(
            capsys, "teacher-logits", "--config", str(lab_config(data=data, store__dir=str(disk / "stores")))
        )
        assert f"cannot write {disk}/stores/" in what
        assert "0.07 MB are free" in what
        assert not list(disk.iterdir())


# Runs all stages once, so that everything is imported, then as another user, who may read the store of the first.
AS_ANOTHER = """
import os, sys
from duet.pipeline.cli.main import main
config, name, mine = sys.argv[1:4]
for stage in ("teacher-logits", "distill", "evaluate"):
    assert main([stage, "--config", config, "--set", f"runs_dir={mine}/warm"]) == 0
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print("--- another user", flush=True)
for stage in ("teacher-logits", "distill", "evaluate"):
    code = main([stage, "--config", config, "--set", f"runs_dir={mine}/runs"])
    assert code == 0, (stage, code)
for command in (["cache", "find", "--config", config], ["cache", "verify", name], ["cache", "inspect", name]):
    assert main(command) == 0
sys.exit(main(["teacher-logits", "--config", config, "--set", f"runs_dir={mine}/more", "--set", "teacher.top_k=3"]))
"""


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="duet-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_somebody_elses_store_is_used_without_a_write_to_it(lab_config, outside):
    data = two_sets(outside, QUESTIONS)
    changes = {"data": data, "store__dir": str(outside / "stores"), "train__epochs": 1, "evaluate__attacks": []}
    config = shutil.copy(lab_config(**changes, evaluate__max_new_tokens=4), outside / "config.yaml")
    assert main(["teacher-logits", "--config", str(config), "--set", f"runs_dir={outside / 'first'}"]) == EXIT_DONE
    [store] = (outside / "stores").iterdir()
    (outside / "mine").mkdir()
    (outside / "mine").chmod(0o777)

    def snapshot() -> dict[Path, tuple[int, int]]:
        return {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in (outside / "stores").rglob("*")
            if path.name != "manifest.json"
        }

    before = snapshot()
    command = [*PROGRAM, "-c", AS_ANOTHER, str(config), str(store), str(outside / "mine")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = done.stdout.partition("--- another user")[2]
    assert done.returncode == EXIT_USER, done.stderr[-3000:]
    assert "reused the store of the same fingerprint" in told
    assert snapshot() == before
    lines = done.stderr.strip().splitlines()[-2:]
    assert lines[0].startswith(f"error: cannot write {outside}/stores/")
    assert lines[0].endswith("Permission denied")
    assert "store.dir" in lines[1]


def test_an_unfinished_store_that_is_not_ours_to_write_is_told(config, tmp_path, monkeypatch, capsys, no_engine):
    [expected] = teacher_stores(load_config(config))
    plan = expected.under("transformers").plan
    with StoreWriter(Folder(tmp_path / "stores" / plan.fingerprint[:16]), plan):
        pass
    monkeypatch.setattr("duet.stages.cost.store.is_writable", lambda folder: False)
    what, hint = refused(capsys, "teacher-logits", "--config", config)
    assert "the store is incomplete, 0 of 12 rows are there, and it is not yours to write" in what
    assert "let your group write" in hint


def test_two_runs_at_once_write_one_store_and_both_point_to_it(config, tmp_path):
    """Real engines; whoever starts later finds shards that are taken, or the whole store."""
    command = [*PROGRAM, "teacher-logits", "--config", config, "--set"]
    runs = [
        subprocess.Popen(
            [*command, f"name={name}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [EXIT_DONE, EXIT_DONE], told
    [store] = (tmp_path / "stores").iterdir()
    assert len(read_all(store)) == 12
    pointers = [json.loads((tmp_path / "runs" / name / "teacher/store.json").read_text()) for name in ("one", "two")]
    assert pointers[0] == pointers[1]
    assert store.name in json.dumps(pointers[0])


def unfinished(store: Path) -> Path:
    """A finished store of four shards as it was before the last one and the manifest."""
    for name in ("manifest.json", "shard-00003.json", "shard-00003.arrow"):
        (store / name).unlink()
    return store


def written(config: str, tmp_path: Path) -> Path:
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    [store] = (tmp_path / "stores").iterdir()
    return store


@pytest.mark.parametrize(
    "names",
    [["plan.json"], ["shard-00002.json"], ["tokenizer/tokenizer.json"], ["plan.json", "shard-00000.json"]],
    ids=" ".join,
)
def test_what_the_manifest_tells_is_repaired_without_an_engine(config, tmp_path, capsys, monkeypatch, names):
    store = written(config, tmp_path)
    monkeypatch.setattr("duet.stages.teacher.capture.open_engine", None)
    good = {name: (store / name).read_bytes() for name in names}
    for name in names:
        flip_byte(store / name)
    what, hint = refused(capsys, "cache", "verify", str(store))
    assert what.startswith(f"error: {len(names)} of the store's files are damaged: {store}/")
    assert hint == f"hint: run: duet cache repair {store} --config FILE, with the config that made it"
    assert main(["cache", "repair", str(store), "--config", config]) == EXIT_DONE
    assert "every shard is as it was written" in capsys.readouterr().out
    assert {name: (store / name).read_bytes() for name in names} == good
    assert main(["cache", "verify", str(store)]) == EXIT_DONE
    assert "all 4 shards and all other files are as they were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["plan.json"], "plan.json is not"),
        (["shard-00001.json"], "shard-00001.json is not"),
        (["shard-00001.arrow"], "shard-00001.arrow is damaged: sha256"),
    ],
    ids=str,
)
def test_an_unfinished_store_is_verified_and_repaired(config, tmp_path, capsys, names, told):
    store = written(config, tmp_path)
    before = read_all(store)
    unfinished(store)
    (store / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(["cache", "verify", str(store)]) == EXIT_DONE
    out = capsys.readouterr().out
    assert f"{store}: unfinished, 3 of 4 shards are written, all files are as they were written" in out
    assert "not checked, files that nothing reads: notes.txt" in out
    good = {name: (store / name).read_bytes() for name in names}
    for name in names:
        flip_byte(store / name, 90)
    what, hint = refused(capsys, "cache", "verify", str(store))
    assert told in what
    assert "duet cache repair" in hint
    assert main(["cache", "repair", str(store), "--config", config]) == EXIT_DONE
    assert main(["cache", "verify", str(store)]) == EXIT_DONE
    assert names != ["plan.json"] or (store / "plan.json").read_bytes() == good["plan.json"]
    assert nearly_same_rows(read_all(store), before)


def test_a_store_that_says_nothing_of_itself_any_more_is_known_by_its_name(config, tmp_path, capsys):
    """Manifest and plan are both damaged: the shards that their side files vouch for stay."""
    store = written(config, tmp_path)
    good = {name: (store / name).read_bytes() for name in Folder(store).names()}
    for name in ("manifest.json", "plan.json"):
        flip_byte(store / name)
    repair = ["cache", "repair", str(store), "--config", config]
    assert "nothing is left of its manifest and its plan" in refused(capsys, *repair, "--set", "teacher.top_k=9")[0]
    assert main(repair) == EXIT_DONE
    assert "wrote 0 rows of 0 shards again" in capsys.readouterr().out
    assert {name: (store / name).read_bytes() for name in Folder(store).names()} == good
