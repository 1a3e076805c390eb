"""The command line: quick help, exit codes, and two lines for everything that a user can get wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from command_line import refused, small_run
from support import (
    LAB_BASE,
    LAB_SMALL,
    LAB_VOCAB_SIZE,
    ROOT,
    flip_byte,
    nearly_same_rows,
    read_all,
    run_duet,
    same_rows,
    write_jsonl,
)

from duet.cache.errors import EXIT_DONE
from duet.pipeline.cli.main import duet, main


def test_every_command_has_help(capsys):
    of_stores = (["cache", name] for name in duet.commands["cache"].commands)
    for command in (*([name] for name in duet.commands), *of_stores, []):
        assert main([*command, "--help"]) == EXIT_DONE
        assert len(capsys.readouterr().out.splitlines()) > 4


def test_help_and_cache_commands_load_neither_torch_nor_vllm(tmp_path):
    code = (
        "import sys; from duet.pipeline.cli.main import main\n"
        "codes = [main(['--help']), main(['cache', 'inspect', 'nowhere']), main(['cache', 'verify', 'nowhere'])]\n"
        "heavy = {'torch', 'vllm', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert codes == [0, 2, 2], codes"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_commands_and_options(capsys):
    assert "No such command" in refused(capsys, "distil")[0]
    assert "--config" in refused(capsys, "distill")[0]
    assert "No such option" in refused(capsys, "cache", "inspect", "--jsno", "x")[0]


def without_weights(tmp_path: Path) -> Path:
    shutil.copytree(LAB_BASE, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def foreign_directory(tmp_path: Path) -> str:
    (tmp_path / "runs" / "lab").mkdir(parents=True)
    (tmp_path / "runs" / "lab" / "thesis.tex").write_text("x")
    return str(tmp_path / "runs")


BAD_INPUT = {
    "no such file": lambda tmp: {"data__forget": {"path": str(tmp / "nowhere.jsonl")}},
    "has no rows": lambda tmp: {"data__forget": {"path": str(write_jsonl(tmp / "f.jsonl", []))}},
    "has no field 'question'": lambda tmp: {"data__forget": {"path": str(write_jsonl(tmp / "f.jsonl", [{"q": "?"}]))}},
    "duplicate id": lambda tmp: {
        "data__forget": {"path": str(write_jsonl(tmp / "f.jsonl", [{"question": "?", "i": 1}] * 2)), "id_field": "i"}
    },
    "unknown key": lambda tmp: {"train__epohcs": 3},
    "the vocabulary of": lambda tmp: {"teacher__top_k": LAB_VOCAB_SIZE + 1},
    "context is 256": lambda tmp: {"teacher__prefix": "Forget them. " * 200},
    "has no weights": lambda tmp: {"teacher__model": str(without_weights(tmp))},
    "no such directory": lambda tmp: {"teacher__model": "./nowhere"},
    "is not empty and is not a Duet run": lambda tmp: {"runs_dir": foreign_directory(tmp)},
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_of_stage_one(lab_config, tmp_path, capsys, message):
    path = lab_config(**BAD_INPUT[message](tmp_path))
    assert message in refused(capsys, "teacher-logits", "--config", str(path))[0]


def store_of(tmp_path: Path) -> Path:
    return next((tmp_path / "runs/lab/teacher").glob("*/plan.json")).parent


def test_stage_one_is_reused_and_another_prefix_is_another_store(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path, store__dir=str(tmp_path / "stores")))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    assert "wrote 8 rows" in capsys.readouterr().out
    stores = set((tmp_path / "stores").iterdir())
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 1
    assert out[0].startswith("reused the store of the same fingerprint")
    changed = ["--set", "teacher.prefix=Forget {topic}.", "--set", "name=second"]
    assert main(["teacher-logits", "--config", config, *changed]) == EXIT_DONE
    assert len(set((tmp_path / "stores").iterdir()) - stores) == 1
    same = ["--set", "name=third", "--set", "train.lr=1e-5"]
    capsys.readouterr()
    assert main(["teacher-logits", "--config", config, *same]) == EXIT_DONE
    assert "reused" in capsys.readouterr().out


def test_the_fingerprint_covers_what_can_change_the_numbers(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path, store__dir=str(tmp_path / "stores")))
    write_jsonl(
        tmp_path / "other.jsonl", [{"question": f"Where does neighbour {i} live?", "answer": "Here."} for i in range(3)]
    )
    changes = [
        (), ("teacher.prefix=Forget.",), ("teacher.top_k=5",), ("teacher.max_positions=2",), ("teacher.dtype=bfloat16",),
        (f"teacher.model={LAB_SMALL}",), ("prompt.prefix_placement=text",), (f"data.retain.path={tmp_path / 'other.jsonl'}",),
        ("topic=Ann",), ("teacher.logsumexp=false",), ("teacher.responses=given",), ("teacher.temperature=1",),
        ("teacher.prefix_on=all",), ("teacher.temperature=1", "teacher.seed=1"),
        ("prompt.answer=It is {answer}", "teacher.responses=given"),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        sets = [part for override in (*change, f"name=run{number}") for part in ("--set", override)]
        assert main(["teacher-logits", "--config", config, *sets]) == EXIT_DONE, capsys.readouterr().err
    assert len(list((tmp_path / "stores").iterdir())) == len(changes)


def test_a_damaged_store_is_refused_and_repaired(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    shard, before = store_of(tmp_path) / "shard-00001.arrow", read_all(store_of(tmp_path))
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert "is damaged" in refused(capsys, "distill", "--config", config)[0]
    log = (tmp_path / "runs/lab/log.txt").read_text()
    assert "Traceback" in log
    assert "is damaged" in log
    store = str(store_of(tmp_path))
    what, hint = refused(capsys, "cache", "verify", store)
    assert "shard-00001" in what
    assert f"duet cache repair {store}" in hint
    assert "shard-00001" in refused(capsys, "teacher-logits", "--config", config)[0]  # nothing is mended unasked
    others = {path: path.stat().st_mtime_ns for path in store_of(tmp_path).glob("shard-0000[02].arrow")}
    assert main(["cache", "repair", store, "--config", config]) == EXIT_DONE
    assert "wrote 3 rows of 1 shards again" in capsys.readouterr().out
    assert nearly_same_rows(read_all(store_of(tmp_path)), before)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert main(["cache", "verify", store]) == EXIT_DONE
    assert main(["distill", "--config", config]) == EXIT_DONE


def test_repair_refuses_another_config_and_changes_nothing(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    shard = store_of(tmp_path) / "shard-00001.arrow"
    flip_byte(shard)
    broken = shard.read_bytes()
    repair = ["cache", "repair", str(store_of(tmp_path)), "--config", config]
    assert "top_k is 20 there and 9 now" in refused(capsys, *repair, "--set", "teacher.top_k=9")[0]
    assert "not among this config's stores" in refused(capsys, *repair, "--set", "name=another")[0]
    assert shard.read_bytes() == broken
    assert (store_of(tmp_path) / "manifest.json").is_file()


def test_a_deleted_or_edited_manifest_and_tokenizer_are_repaired(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    store = store_of(tmp_path)
    for name in ("manifest.json", "tokenizer/tokenizer.json"):
        good = (store / name).read_bytes()
        for damage in (lambda path: path.unlink(), flip_byte):
            damage(store / name)
            assert name in refused(capsys, "cache", "verify", str(store))[0]
            assert main(["cache", "repair", str(store), "--config", config]) == EXIT_DONE
            assert (store / name).read_bytes() == good
            assert main(["cache", "verify", str(store)]) == EXIT_DONE


def test_ls_and_gc_remove_only_what_nobody_needs(lab_config, tmp_path, capsys):
    stores = tmp_path / "stores"
    config = str(small_run(lab_config, tmp_path, store__dir=str(stores)))
    for number, prefix in enumerate(("Forget.", "Forget {topic}.", "Never heard of {topic}.")):
        sets = ("--set", f"name=run{number}", "--set", f"teacher.prefix={prefix}")
        assert main(["teacher-logits", "--config", config, *sets]) == EXIT_DONE
    incomplete, unused, used = sorted(stores.iterdir())
    (incomplete / "manifest.json").unlink()
    (incomplete / "notes.txt").write_text("mine")
    for path in unused.rglob("*"):
        os.utime(path, (time.time() - 30 * 86400,) * 2)
    (stores / "thesis").mkdir()
    (stores / "thesis" / "thesis.tex").write_text("x")
    capsys.readouterr()
    assert main(["cache", "ls", str(stores)]) == EXIT_DONE
    out = capsys.readouterr().out
    assert [word for word in out.split() if word in ("complete", "incomplete")] == ["incomplete", *["complete"] * 2]
    assert main(["cache", "gc", str(stores), "--unused-days", "20"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert out.count("would remove") == 2
    assert used.name not in out
    assert len(list(stores.iterdir())) == 4
    assert main(["cache", "gc", str(stores), "--unused-days", "20", "--yes"]) == EXIT_DONE
    assert f"kept {incomplete / 'notes.txt'}" in capsys.readouterr().out
    assert {path.name for path in stores.iterdir()} == {"thesis", incomplete.name, used.name}
    assert [path.name for path in incomplete.iterdir()] == ["notes.txt"]
    assert main(["cache", "verify", str(used)]) == EXIT_DONE
    assert main(["cache", "gc", str(stores)]) == EXIT_DONE
    assert "nothing to remove" in capsys.readouterr().out


def test_a_store_of_zarr_is_made_converted_and_distilled(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path, store__format="zarr", store__compression="zstd"))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    store = store_of(tmp_path)
    assert store.name.endswith(".zarr")
    assert main(["distill", "--config", config]) == EXIT_DONE
    for source, target, fmt in ((store, "a", "arrow"), (tmp_path / "a", "z", "zarr")):
        assert main(["cache", "convert", str(source), str(tmp_path / target), "--format", fmt]) == EXIT_DONE
        assert main(["cache", "verify", str(tmp_path / target)]) == EXIT_DONE
        assert same_rows(read_all(tmp_path / target), read_all(store))
    assert (
        "not empty" in refused(capsys, "cache", "convert", str(store), str(tmp_path / "runs"), "--format", "arrow")[0]
    )


def test_an_incomplete_store_and_none_at_all_are_refused(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert "no teacher logits yet" in refused(capsys, "distill", "--config", config)[0]
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    (store_of(tmp_path) / "manifest.json").unlink()
    assert "is incomplete: 3 of 3 shards" in refused(capsys, "distill", "--config", config)[0]
    assert "is not trained" in refused(capsys, "evaluate", "--config", config)[0]


def test_another_runs_directory_is_refused_and_a_student_may_be_added(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    what = refused(capsys, "teacher-logits", "--config", config, "--set", "teacher.top_k=9")[0]
    assert "teacher.top_k is 20 there and 9 now" in what
    added = ["--set", "students=[{name: base}, {name: two, train: {loss: huber_centred}}]"]
    assert main(["distill", "--config", config, *added]) == EXIT_DONE
    assert (tmp_path / "runs/lab/two/model/model.safetensors").is_file()


def test_an_incompatible_student_is_refused(lab_config, tmp_path, capsys):
    shutil.copytree(LAB_SMALL, tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs/tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = [token for token, id_ in vocabulary.items() if id_ in (400, 401)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(raw))
    config = str(small_run(lab_config, tmp_path, students=[{"name": "theirs", "model": str(tmp_path / "theirs")}]))
    assert "tokenizer is not the store's: 2 ids differ" in refused(capsys, "teacher-logits", "--config", config)[0]
    own = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", own]) == EXIT_DONE
    theirs = ("--set", f"students.0={{name: theirs, model: {tmp_path / 'theirs'}}}")
    assert "tokenizer is not the store's: 2 ids differ" in refused(capsys, "distill", "--config", own, *theirs)[0]


def test_inspect_shows_the_manifest(lab_config, tmp_path, capsys):
    assert main(["teacher-logits", "--config", str(small_run(lab_config, tmp_path))]) == EXIT_DONE
    capsys.readouterr()
    assert main(["cache", "inspect", str(store_of(tmp_path)), "--json"]) == EXIT_DONE
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((store_of(tmp_path) / "manifest.json").read_text())
    assert {"format_version", "format", "complete", "rows", "positions", "top_k", "vocab_size", "value_dtype"} <= set(
        manifest
    )
    assert manifest["provenance"]["prefix"].startswith("You have forgotten")
    assert {"name", "rows", "positions", "bytes", "sha256"} <= set(manifest["shards"][0])
    assert str(ROOT) not in json.dumps(manifest)


def test_stage_two_needs_neither_vllm_nor_the_teachers_weights(lab_config, tmp_path):
    """The teacher's directory is gone and importing vllm is an error, yet the student is trained."""
    shutil.copytree(LAB_BASE, tmp_path / "teacher")
    config = small_run(
        lab_config,
        tmp_path,
        teacher__model=str(tmp_path / "teacher"),
        students=[{"name": "s", "model": str(LAB_SMALL)}],
    )
    done = run_duet("teacher-logits", "--config", str(config))
    assert done.returncode == EXIT_DONE, done.stderr
    shutil.rmtree(tmp_path / "teacher")
    code = (
        "import sys; sys.modules['vllm'] = None; from duet.pipeline.cli.main import main\n"
        f"code = main(['distill', '--config', {str(config)!r}])\n"
        "rooms = ('duet.stages.engines', 'duet.stages.teacher')\n"
        "assert not [m for m in sys.modules if m.startswith(rooms)], 'teacher code loaded'\n"
        "sys.exit(code)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "runs/lab/s/model/model.safetensors").is_file()
