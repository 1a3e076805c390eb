"""A store in a folder that several people share: modes, owners, reading without writing, and what it says of who wrote it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import make_plan, make_rows, read_all, same_rows, small_disk, write_store

from duet.cache import maintain, reader
from duet.cache.errors import NotPermitted, UserError
from duet.cache.files import DiskFull, publish_json, publishing_dir
from duet.cache.leases import Leases
from duet.cache.location import Folder, local_folder
from duet.cache.manifest import read_manifest
from duet.cache.reader import Store
from duet.cache.writer import LEASES_NAME, StoreWriter

ROWS = make_rows(range(40), positions=None, forget=4)
FILES = {"tokenizer/t.json": b"{}"}
ALICE, BOB, GROUP = 64001, 64002, 64000
only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can take other people's user ids")


@pytest.fixture
def group_folder() -> Iterator[Path]:
    """As docs/shared-store.md sets it up: setgid and writable by the group; not below a folder that only its owner enters."""
    outer = Path(tempfile.mkdtemp(prefix="duet-test-"))
    outer.chmod(0o755)
    (outer / "stores").mkdir()
    if os.getuid() == 0:
        os.chown(outer / "stores", -1, GROUP)
    (outer / "stores").chmod(0o2775)
    yield outer / "stores"
    shutil.rmtree(outer)


@pytest.fixture(params=[0o002, 0o027], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def as_user(uid: int, umask: int, work: Callable[[], object]) -> int:
    """Start a process of that user, who is of the group; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(uid)
        os.umask(umask)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(*pids: int) -> bool:
    return not any([os.waitpid(pid, 0)[1] for pid in pids])


def check_modes(folder: Path, umask: int) -> None:
    for path in (folder, *folder.rglob("*")):
        found = path.stat()
        wanted = (0o2777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(found.st_mode) == wanted, f"{path} has {stat.S_IMODE(found.st_mode):o}, not {wanted:o}"
        assert found.st_gid == folder.parent.stat().st_gid, path


@pytest.mark.parametrize("fmt", ["arrow", "zarr"])
def test_all_files_follow_the_umask_and_the_folders_group(group_folder, umask, fmt):
    folder = group_folder / "s"
    with StoreWriter(Folder(folder), make_plan(40, 4, format=fmt), FILES) as writer:
        shard = writer.claim()
        assert shard
        assert shard.lease
        (shard.lease.path / "a-shard").write_bytes(b"")
        check_modes(folder, umask)
        assert (folder / LEASES_NAME / shard.lease.key).is_dir()
        writer.release(shard)
    write_store(folder, make_plan(40, 4, format=fmt), ROWS, FILES)
    check_modes(folder, umask)
    with publishing_dir(folder / "folder") as temporary:
        (temporary / "file").write_bytes(b"")
        save_file({"weight": np.zeros(3)}, temporary / "model.safetensors")
        assert stat.S_IMODE((temporary / "model.safetensors").stat().st_mode) == 0o600, "the library does it itself now"
    publish_json(folder / "file.json", {})
    check_modes(folder, umask)


def write_with_others(folder: Path) -> None:
    with StoreWriter(Folder(folder), make_plan(40, 4), FILES) as writer:
        while writer.missing():
            while shard := writer.claim():
                shard.append(ROWS[shard.range.start : shard.range.stop])
                writer.publish(shard)
                writer.wait()
        writer.finalise({"python": "3"}, wait_s=0.01)


@only_root
def test_two_people_of_a_group_write_one_store_together(group_folder):
    """And one takes over what the other, killed, has begun; both read it."""
    folder = group_folder / "s"
    write_store(group_folder.parent / "warm", make_plan(40, 4), ROWS, FILES)  # imports what they may not be able to

    def begin() -> None:
        with StoreWriter(Folder(folder), make_plan(40, 4), FILES) as writer:
            assert writer.claim()
            os._exit(0)

    assert ended(as_user(ALICE, 0o002, begin))
    assert Leases(folder / LEASES_NAME, 1.0).stamps().keys() == {"shard-00000"}
    users = [as_user(uid, 0o002, lambda: write_with_others(folder)) for uid in (BOB, ALICE, BOB)]
    assert ended(*users)
    assert same_rows(read_all(folder), ROWS)
    assert not (folder / LEASES_NAME).exists()
    check_modes(folder, 0o002)
    assert (folder / "plan.json").stat().st_uid == ALICE
    assert (folder / "shard-00000.json").stat().st_uid in (ALICE, BOB)


@only_root
def test_a_store_of_one_who_lets_nobody_write_is_read_but_not_written(group_folder):
    complete, begun = group_folder / "complete", group_folder / "begun"
    write_store(group_folder.parent / "warm", make_plan(40, 4), ROWS, FILES)

    def make() -> None:
        write_store(complete, make_plan(40, 4), ROWS, FILES)
        with StoreWriter(Folder(begun), make_plan(40, 4), FILES) as writer:
            shard = writer.claim()
            assert shard
            shard.append(ROWS[shard.range.start : shard.range.stop])
            writer.publish(shard)
            writer.wait()

    def snapshot() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in group_folder.rglob("*")}

    def use() -> None:
        manifest = read_manifest(Folder(complete))
        assert not list(maintain.verify(Folder(complete), manifest))
        assert same_rows(read_all(complete), ROWS)
        assert local_folder(Folder(complete), "tokenizer", manifest.attachments) == complete / "tokenizer"
        assert {found.state for found in maintain.find_stores(Folder(group_folder))} == {"complete", "incomplete"}
        with StoreWriter(Folder(begun), make_plan(40, 4), FILES) as writer, pytest.raises(UserError) as caught:
            writer.claim()
        assert caught.value.what.startswith(f"cannot write {begun}/leases: Permission denied")
        assert "store.dir" in caught.value.hint

    assert ended(as_user(ALICE, 0o022, make))
    before = snapshot()
    assert ended(as_user(BOB, 0o022, use))
    assert snapshot() == before


@only_root
def test_a_store_that_is_its_owners_alone_is_told(group_folder):
    write_store(group_folder.parent / "warm", make_plan(40, 4), ROWS, FILES)

    def use() -> None:
        with pytest.raises(UserError) as caught:
            read_manifest(Folder(group_folder / "s"))
        assert caught.value.what == f"cannot read {group_folder}/s/manifest.json: Permission denied"
        assert "let your group read" in caught.value.hint

    assert ended(as_user(ALICE, 0o077, lambda: write_store(group_folder / "s", make_plan(40, 4), ROWS, FILES)))
    assert ended(as_user(BOB, 0o077, use))


def test_a_store_names_no_path_no_machine_and_no_secret(tmp_path, monkeypatch):
    """Of all text in a finished store; while it is written, only the leases name the machine."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    write_store(tmp_path / "s", make_plan(40, 4), ROWS, FILES)
    machine = f"{os.uname().nodename}/"  # as leases name it
    private = [str(Path.home()), os.getcwd(), str(tmp_path), machine, "hf_secret_of_the_environment"]
    for path in (path for path in (tmp_path / "s").rglob("*") if path.is_file()):
        raw = path.read_bytes()
        assert not [text for text in private if text.encode() in raw], path
    with StoreWriter(Folder(tmp_path / "begun"), make_plan(40, 4), FILES) as writer:
        assert writer.claim()
        for path in (path for path in (tmp_path / "begun").rglob("*") if path.is_file()):
            raw = path.read_bytes()
            assert not [text for text in private if text.encode() in raw and text != machine], path


def test_a_quota_and_a_limit_of_file_sizes_are_told_like_a_full_disk(tmp_path, monkeypatch):
    for number in (errno.EDQUOT, errno.EFBIG):

        def refuse(path: Path, data: bytes, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(DiskFull, match=f"cannot write .*: {os.strerror(number)}") as caught:
            publish_json(tmp_path / "file.json", {})
        assert "MB are free" in caught.value.what


def test_a_store_that_is_read_for_days_is_not_taken_for_unused(tmp_path, monkeypatch):
    write_store(tmp_path / "s", make_plan(40, 4), ROWS, FILES)
    opened = Store(Folder(tmp_path / "s"))
    batches = opened.batches(opened.order(0), 8)
    next(batches)
    for path in (tmp_path / "s").rglob("*"):
        os.utime(path, (0, 0))  # as if it had been opened then
    monkeypatch.setattr(reader, "NOTE_S", -1.0)
    assert maintain.removable(Folder(tmp_path), 1.0)
    next(batches)
    assert not maintain.removable(Folder(tmp_path), 1.0)


def test_a_disk_that_cannot_be_written_is_told_as_such(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot make it read-only here: {done.stderr.strip()}")
        with pytest.raises(NotPermitted, match=r"file\.json: Read-only"):
            publish_json(disk / "file.json", {})


@only_root
def test_a_store_that_one_may_not_enter_does_not_hide_the_others(group_folder):
    for name in ("mine", "theirs"):
        write_store(group_folder / name, make_plan(40, 4), ROWS, FILES)
    (group_folder / "theirs").chmod(0o700)

    def look() -> None:
        found = {Path(str(one.location)).name: one.state for one in maintain.find_stores(Folder(group_folder))}
        assert found == {"mine": "complete", "theirs": "not readable"}
        assert not maintain.removable(Folder(group_folder), None)

    assert ended(as_user(ALICE, 0o002, look))
