"""Writers that are killed or stopped at any moment and disks that fill up: the store ends as an undisturbed one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hostile
import numpy as np
import pytest
import storm
from command_line import refused
from support import (
    ROOT,
    make_plan,
    make_rows,
    nearly_same_rows,
    read_all,
    same_rows,
    small_disk,
    two_sets,
    write_store,
)

from duet.cache import maintain
from duet.cache.errors import EXIT_DONE, UserError
from duet.cache.location import Folder, location_of
from duet.cache.manifest import MANIFEST_NAME, read_manifest
from duet.cache.plan import Plan
from duet.cache.reader import Store
from duet.cache.record import Rows
from duet.cache.writer import StoreWriter
from duet.pipeline.cli.main import main

ROWS = make_rows(range(10), positions=None, forget=4)
FILES = {"tokenizer/t.json": b"{}"}
FORMATS = ("arrow", "zarr")
PYTHON_PATH = os.pathsep.join(map(str, (ROOT / "tests" / "helpers", ROOT / "tests" / "cache")))


def content(folder: Path) -> dict[str, bytes | None]:
    """All files' bytes; also names what should not be there, and empty folders."""
    empty = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
    return {name: Folder(folder).read(name) for name in Folder(folder).names()} | dict.fromkeys(empty)


def is_whole(folder: Path, rows: Rows) -> bool:
    """It verifies and holds every row once."""
    return not list(maintain.verify(Folder(folder), read_manifest(Folder(folder)))) and same_rows(
        read_all(folder), rows
    )


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("fmt", "kills"), [("arrow", 200), ("zarr", 40)])
def test_writers_killed_at_random_moments_leave_the_undisturbed_store(tmp_path, fmt, kills):
    write_store(tmp_path / "undisturbed", storm.plan_of(fmt), storm.ROWS, storm.FILES)
    expected = content(tmp_path / "undisturbed")
    done = python(storm.__file__, str(tmp_path / "stores"), fmt, str(kills), "0")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == kills
    folders = list((tmp_path / "stores").iterdir())
    assert len(folders) == report["stores"]
    for folder in folders:
        assert content(folder) == expected
        assert is_whole(folder, storm.ROWS)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_signed_shard_of_any_bytes_is_read_or_refused(tmp_path, fmt, compression):
    """What is not caught by its hash: no other error, no crash, nothing read beyond the shard."""
    done = python(hostile.__file__, str(tmp_path / "s"), fmt, compression, "100", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert sum(report.values()) == 100
    assert set(report) == {"read", "refused"}


# Stops itself at one of the moments at which a writer that was taken over could do harm.
STOPPED = """
import signal, sys, threading
from pathlib import Path
from duet.cache import leases

at, calls = int(sys.argv[3]), []
publish, acquire = leases.Lease.publish, leases.Leases.acquire

def stop():
    calls.append(1)
    if len(calls) == at + 1:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # to this very thread: it stops here

def stopping_publish(self, *arguments):
    stop()
    publish(self, *arguments)

def stopping_acquire(self, key):
    lease = acquire(self, key)
    stop()
    return lease

leases.Lease.publish, leases.Leases.acquire = stopping_publish, stopping_acquire
from test_faults import write_beside_others
write_beside_others(Path(sys.argv[1]), sys.argv[2])
"""
LEASE_S = 0.4


def write_beside_others(folder: Path, fmt: str) -> list[int]:
    """One of several writers with short leases; the shards that it worked on."""
    worked = []
    with StoreWriter(Folder(folder), make_plan(10, 4, format=fmt), FILES, LEASE_S) as writer:
        while writer.missing():
            if shard := writer.claim():
                worked.append(shard.index)
                shard.append(ROWS[shard.range.start : shard.range.stop])
                writer.publish(shard)
                writer.wait()
        writer.finalise({"python": "3"}, wait_s=0.01)
    return worked


# Of each shard 3 moments: claimed, before its file and before its side file is published; then 2 of the manifest.
@pytest.mark.parametrize(
    ("fmt", "at"), [("arrow", 0), ("arrow", 4), ("arrow", 8), ("arrow", 9), ("arrow", 10), ("zarr", 1)]
)
def test_a_writer_that_was_stopped_beyond_its_lease_publishes_nothing(tmp_path, fmt, at):
    write_store(tmp_path / "undisturbed", make_plan(10, 4, format=fmt), ROWS, FILES)
    folder = tmp_path / "s"
    command = [sys.executable, "-c", STOPPED, str(folder), fmt, str(at)]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as stopped:
        try:
            status = os.waitpid(stopped.pid, os.WUNTRACED)[1]
            assert os.WIFSTOPPED(status), stopped.stderr and stopped.stderr.read()
            worked = write_beside_others(folder, fmt)
            assert at // 3 in [*worked, 3]  # the stopped writer's shard; 3 is the manifest
            before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
            stopped.send_signal(signal.SIGCONT)
            _, err = stopped.communicate()
        finally:
            stopped.kill()
    assert stopped.returncode == 0, err
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert content(folder) == content(tmp_path / "undisturbed")
    assert is_whole(folder, ROWS)


def fill(disk: Path, but_bytes: int) -> Path:
    """A file that leaves so much of the disk free."""
    filler = disk / "filler"
    filler.write_bytes(bytes(free_bytes(disk) - but_bytes))
    return filler


def free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_a_full_disk_is_told_in_two_lines_and_the_next_run_goes_on(tmp_path, lab_config, capsys):
    """The real command; the disk is full from the start, or when the tokenizer and some shards are written."""
    rows = [{"question": f"Where was person {i} born?"} for i in range(200)]
    data = two_sets(tmp_path, rows)
    with small_disk(tmp_path / "disk", 2048) as disk:
        config = lab_config(data=data, store__dir=str(disk / "stores"), store__shard_rows=100)
        command = ["teacher-logits", "--config", str(config)]
        for free in (0, 175_000):
            filler = fill(disk, free)
            what, hint = refused(capsys, *command)
            assert what.startswith(f"error: cannot write {disk}/stores/")
            assert "No space left on device" in what
            assert "MB are needed" in what
            assert "run the same command again" in hint
            filler.unlink()
        assert list((disk / "stores").glob("*/shard-*.json"))  # whichever found room
        assert main(command) == EXIT_DONE
        assert "wrote 400 rows" not in capsys.readouterr().out
        assert main([*command, "--set", f"store.dir={tmp_path / 'undisturbed'}"]) == EXIT_DONE
        found, expected = (next(root.iterdir()) for root in (disk / "stores", tmp_path / "undisturbed"))
        rows = read_all(found)
        assert is_whole(found, rows)
        assert nearly_same_rows(rows, read_all(expected))  # scored in other company


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_disk_that_fills_at_any_write_is_told_and_the_next_writer_goes_on(tmp_path, fmt):
    """One more page of 4096 bytes is left free each time, until the whole store fits in."""
    plan = make_plan(10, 4, format=fmt)
    write_store(tmp_path / "undisturbed", plan, ROWS, FILES)
    expected = content(tmp_path / "undisturbed")
    told = set()
    with small_disk(tmp_path / "disk", 512) as disk:
        for pages in itertools.count():
            filler, folder = fill(disk, pages * 4096), disk / "s"
            try:
                write_store(folder, plan, ROWS, FILES)
            except UserError as error:
                told.add(what_was_written(error, folder))
            else:
                break
            with pytest.raises(UserError, match=r"incomplete|not a store"):
                Store(Folder(folder))
            filler.unlink()
            write_store(folder, plan, ROWS, FILES)
            assert content(folder) == expected
            maintain.remove_store(folder)
    assert {"tokenizer/t.json", "plan.json", "leases", f"shard-00002.{plan_end(plan)}", MANIFEST_NAME} <= told


def plan_end(plan: Plan) -> str:
    return plan.shard_name(0).partition(".")[2]


def what_was_written(error: UserError, folder: Path) -> str:
    """The file that a full disk's error names, which must also say how much is needed."""
    assert "MB are needed" in error.what
    return error.what.partition(": ")[0].removeprefix(f"cannot write {folder}/")


def test_without_leases_a_writer_takes_no_shard_that_it_has_in_hand():
    """On object storage, where its own publishing goes on in the background."""
    with StoreWriter(location_of("memory://in-hand/s"), make_plan(10, 4)) as writer:
        shards = [writer.claim() for _ in range(4)]
        assert sorted(shard.index for shard in shards if shard) == [0, 1, 2]
        assert shards[1]
        writer.release(shards[1])
        again = writer.claim()
        assert again
        assert again.index == shards[1].index
        assert writer.claim() is None


def test_without_leases_a_slower_writer_of_a_shard_leaves_the_quicker_ones_in_place():
    """Its logits may be rounded otherwise, and the manifest has the hash of those that were there first."""
    location, plan, rows = location_of("memory://slower/s"), make_plan(3), make_rows(range(3))
    rounded = replace(rows, topk_logits_NK=rows.topk_logits_NK + np.float32(1e-6))
    with StoreWriter(location, plan) as quick, StoreWriter(location, plan) as slow:
        shards = [writer.claim() for writer in (quick, slow)]
        for writer, shard, found in zip((quick, slow), shards, (rows, rounded), strict=True):
            assert shard
            shard.append(found)
            writer.publish(shard)
            writer.finalise({"python": "3"})
    assert not list(maintain.verify(location, read_manifest(location)))
    assert same_rows(read_all(location), rows)
