"""Damage of any file of a store, complete or unfinished: `check` finds it, and repair brings back the same bytes.

`DUET_FLIPS` is the number of random bits that are flipped in each kind of store; `make soak-store` flips 1,000.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
from collections.abc import Callable

import pytest
from support import make_plan, make_rows, same_rows
from test_golden import FOLDER as GOLDEN_FOLDER
from test_golden import GOLDEN, golden_rows, plan_of_golden

from duet.cache import maintain
from duet.cache.errors import UserError
from duet.cache.files import NotAsWritten, json_bytes
from duet.cache.leases import Leases
from duet.cache.location import Folder, Location, location_of
from duet.cache.manifest import MANIFEST_NAME, read_entry, read_manifest
from duet.cache.plan import PLAN_NAME, Plan, is_signed, planned, read_plan
from duet.cache.reader import Store
from duet.cache.record import concat_rows
from duet.cache.writer import LEASE_S, LEASES_NAME, StoreWriter

FLIPS = int(os.environ.get("DUET_FLIPS", "50"))  # in each of the four kinds of store
ROWS = make_rows(range(10), positions=None, forget=4)
FILES = {"tokenizer/t.json": b'{"a": 1}', "tokenizer/u.txt": "Grüße\n".encode()}
WRITTEN = 3  # of 5 shards, in an unfinished store
KINDS = [(fmt, complete) for fmt in ("arrow", "zarr") for complete in (True, False)]


def plan_of(fmt: str) -> Plan:
    return make_plan(10, 4, shard_rows=2, format=fmt, provenance={"k": 4, "prefix": "Vergiß „Ann“.", "rate": 1e-05})


def write(location: Location, plan: Plan, complete: bool) -> None:
    """What is missing of a store, of an unfinished one its first shards."""
    with StoreWriter(location, plan, FILES) as writer:
        while shard := writer.claim():
            if complete or shard.index < WRITTEN:  # else it stays in hand, to be released in the end
                shard.append(ROWS[shard.range.start : shard.range.stop])
                writer.publish(shard)
                writer.wait()
        if complete:
            writer.finalise({"python": "3"})


def repair(location: Location, plan: Plan, complete: bool) -> list[int]:
    bad = maintain.invalidate(location, planned(plan, FILES))
    write(location, plan, complete)
    return bad


def content(location: Location) -> dict[str, bytes]:
    return {name: location.read(name) or b"" for name in location.names()}


def found(location: Location) -> str:
    """What `check` says is wrong; empty if nothing is."""
    try:
        return "\n".join(maintain.check(location).faults)
    except UserError as error:
        return error.what


def flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


@pytest.mark.parametrize(("fmt", "complete"), KINDS)
def test_random_bit_flips_are_found_and_repaired_to_the_same_bytes(tmp_path, fmt, complete):
    """Every second bit is one of all bits, which are those of shards above all; the others are of files drawn before."""
    location, plan, rng = Folder(tmp_path / "s"), plan_of(fmt), random.Random(f"{fmt} {complete}")
    write(location, plan, complete)
    good = content(location)
    names, sizes = list(good), [len(raw) for raw in good.values()]
    missed = []
    for number in range(FLIPS):
        [name] = rng.choices(names, sizes if number % 2 else None)
        bit = rng.randrange(8 * len(good[name]))
        (location.path / name).write_bytes(flipped(good[name], bit))
        if name not in found(location):
            missed.append((name, bit))
        repair(location, plan, complete)
        assert content(location) == good, (name, bit)
    assert not missed
    assert not found(location)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a changed byte": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 255]) + raw[len(raw) // 2 + 1 :],
    "one byte less": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b" ",
    "emptied": lambda raw: b"",
    "deleted": lambda raw: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("fmt", "complete"), KINDS)
@pytest.mark.parametrize("remote", [False, True])
def test_damage_of_each_file_is_found_and_repaired_to_the_same_bytes(tmp_path, fmt, complete, remote, damage):
    folder = "memory://damage" if remote else str(tmp_path / "damage")
    location, plan = location_of(f"{folder}/{fmt}-{complete}-{damage.replace(' ', '-')}"), plan_of(fmt)
    write(location, plan, complete)
    good = content(location)
    assert not found(location)
    for name, raw in good.items():
        changed = DAMAGES[damage](raw)
        location.remove(name) if changed is None else location.write(name, changed)
        if changed is None and not complete and name.startswith("shard-") and name.endswith(".json"):
            assert (
                f"{name.removesuffix('.json')}.{'arrow' if fmt == 'arrow' else 'zarr.zip'}"
                in maintain.check(location).unread
            )
        elif changed is None and not complete and name == PLAN_NAME:
            assert "is not a store" in found(location)
        elif changed is None and name == MANIFEST_NAME:
            assert f"{name} is missing, though all 5 shards are written" in found(location)
        else:
            assert name in found(location)
        bad = repair(location, plan, complete)
        assert [index for index in bad if complete or index < WRITTEN] == (
            [int(name[6:11])] if _rewritten(name, complete) else []
        )
        assert content(location) == good, name
    assert not found(location)


def _rewritten(name: str, complete: bool) -> bool:
    """Whether the teacher is asked again: the side file of a complete store is made from its manifest."""
    return name.startswith("shard-") and (not complete or not name.endswith(".json"))


@pytest.mark.parametrize(("name", "read"), [
    (MANIFEST_NAME, read_manifest),
    (PLAN_NAME, read_plan),
    ("shard-00001.json", lambda location: read_entry(location, plan_of("arrow"), 1)),
])  # fmt: skip
def test_every_bit_of_what_describes_a_store_is_looked_at(tmp_path, monkeypatch, name, read):
    location = Folder(tmp_path / "s")
    write(location, plan_of("arrow"), complete=True)
    raw, changed = location.read(name) or b"", [b""]
    assert read(location)
    monkeypatch.setattr(Folder, "read", lambda self, name: changed[0])
    for bit in range(8 * len(raw)):
        changed[0] = flipped(raw, bit)
        with pytest.raises(NotAsWritten) as caught:
            read(location)
        assert name in caught.value.what
        assert "duet cache repair" in caught.value.hint


NUMBERS = [b"NaN", b"Infinity", b"1e999", b"1e5", b'"\\ud800"', b"[" * 500 + b"]" * 500, b"9" * 5000]


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
@pytest.mark.parametrize("name", [MANIFEST_NAME, PLAN_NAME, "shard-00001.json"])
def test_json_that_we_never_write_is_told_as_damage(tmp_path, name, number):
    location = Folder(tmp_path / "s")
    write(location, plan_of("arrow"), complete=True)
    raw = (location.path / name).read_bytes()
    key = b'"rate": 1e-05' if name == PLAN_NAME else b'"value_error": 0.0'
    assert key in raw
    (location.path / name).write_bytes(raw.replace(key, key.partition(b":")[0] + b": " + number))
    assert name in found(location)


def test_repair_asks_the_teacher_for_no_more_than_is_damaged(tmp_path):
    """Manifest, plan, a side file and an attachment at once; then a shard, too."""
    location, plan = Folder(tmp_path / "s"), plan_of("arrow")
    write(location, plan, complete=True)
    good = content(location)
    for name in (PLAN_NAME, "shard-00003.json", "tokenizer/t.json"):
        (location.path / name).write_bytes(b"{}")
    assert repair(location, plan, complete=True) == []
    assert content(location) == good
    for name in (MANIFEST_NAME, PLAN_NAME, "shard-00003.arrow", "tokenizer/u.txt"):
        (location.path / name).write_bytes(b"{}")
    assert repair(location, plan, complete=True) == [3]
    assert content(location) == good


def test_a_repair_by_another_plan_is_refused_and_changes_nothing(tmp_path):
    for complete in (True, False):
        location = Folder(tmp_path / str(complete))
        write(location, plan_of("arrow"), complete)
        (location.path / "shard-00001.arrow").write_bytes(b"cut")
        (location.path / PLAN_NAME).write_bytes(b"{}" if complete else (location.path / PLAN_NAME).read_bytes())
        before = content(location)
        with pytest.raises(UserError, match="shard_rows 2 there and 3 now"):
            maintain.invalidate(location, dataclasses.replace(plan_of("arrow"), shard_rows=3))
        assert content(location) == before


class Stopped(Exception):
    pass


def test_a_repair_that_is_stopped_at_any_write_is_gone_on_with(tmp_path, monkeypatch):
    """The store is damaged, then unfinished, never complete with other bytes."""
    plan, stopped = plan_of("arrow"), 0
    while True:
        location = Folder(tmp_path / str(stopped))
        write(location, plan, complete=True)
        good = content(location)
        for name in (PLAN_NAME, "shard-00000.json", "shard-00001.arrow", "shard-00003.json", "tokenizer/t.json"):
            (location.path / name).write_bytes(b"{}")
        with monkeypatch.context() as patch:
            stop_after(patch, stopped)
            try:
                maintain.invalidate(location, planned(plan, FILES))
            except Stopped:
                stopped += 1
            else:
                break
        assert found(location) or MANIFEST_NAME not in location.names()
        assert repair(location, plan, complete=True) == [1]
        assert content(location) == good
    assert stopped == 7


def stop_after(patch: pytest.MonkeyPatch, changes: int) -> None:
    """Of files of a store."""
    left = [changes]

    def stopping(original: Callable[..., None], *arguments: object) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        original(*arguments)

    for name in ("write", "remove"):
        patch.setattr(Folder, name, functools.partialmethod(_called, stopping, getattr(Folder, name)))


def _called(location: Folder, stopping: Callable[..., None], original: Callable[..., None], *arguments: object) -> None:
    stopping(original, location, *arguments)


def test_files_that_nothing_reads_are_told_and_are_no_damage(tmp_path):
    location, plan = Folder(tmp_path / "s"), plan_of("arrow")
    write(location, plan, complete=False)
    with StoreWriter(location, plan, FILES) as writer:
        shard = writer.claim()
        assert shard
        (location.path / "notes.txt").write_text("mine")
        (location.path / "shard-00004.arrow").write_text("of a writer that died before it wrote the side file")
        checked = maintain.check(location)
        assert (checked.complete, checked.written, checked.shards, checked.faults) == (False, WRITTEN, 5, ())
        leases = [name for name in location.names() if name.startswith(f"{LEASES_NAME}/")]
        assert leases
        assert sorted(checked.unread) == sorted([*leases, "notes.txt", "shard-00004.arrow"])


def test_a_damaged_lease_stops_nobody(tmp_path):
    """Its holder loses it at most: then another does the work."""
    location, plan = Folder(tmp_path / "s"), plan_of("arrow")
    write(location, plan, complete=False)
    with StoreWriter(location, plan, FILES) as writer:
        shard = writer.claim()
        assert shard
        assert shard.lease
        path = shard.lease.path.parent / "owner.json"
        raw = path.read_bytes()
        for bit in range(8 * len(raw)):
            path.write_bytes(flipped(raw, bit))
            Leases(location.path / LEASES_NAME, LEASE_S).held()
        for damaged in (
            b"",
            b"{}",
            b"[]",
            b'{"machine": 1}',
            raw[:-1],
            json.dumps({**json.loads(raw), "lease_s": "x"}).encode(),
        ):
            path.write_bytes(damaged)
            assert Leases(location.path / LEASES_NAME, LEASE_S).held() == ["shard-00003"]
            assert Leases(location.path / LEASES_NAME, LEASE_S).num_holders() == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_a_store_of_an_earlier_version_is_checked_and_repaired(tmp_path, name):
    """Its plan and side files carry no hash: in a complete store they are compared with the manifest."""
    shutil.copytree(GOLDEN_FOLDER / name, tmp_path / "s")
    location, rng = Folder(tmp_path / "s"), random.Random(name)
    good = content(location)
    assert not any(is_signed(good[file]) for file in good if file.endswith(".json") and file != MANIFEST_NAME)
    assert maintain.check(location).faults == ()
    assert [store.state for store in maintain.find_stores(Folder(tmp_path))] == ["complete"]
    for file in [file for file in good if not file.endswith((".arrow", ".zip"))]:
        for bit in rng.sample(range(8 * len(good[file])), min(40, 8 * len(good[file]))):
            (location.path / file).write_bytes(flipped(good[file], bit))
            assert file in found(location), bit
        (location.path / file).write_bytes(good[file])
    (location.path / PLAN_NAME).write_bytes(b"{}")
    (location.path / "shard-00001.json").unlink()
    assert maintain.invalidate(location, plan_of_golden(name)) == []
    assert maintain.check(location).faults == ()
    assert same_rows(concat_rows(list(Store(location).rows())), golden_rows(GOLDEN[name][1])) or "linear16" in name


def test_an_unfinished_store_of_an_earlier_version_is_gone_on_with(tmp_path):
    location, plan = Folder(tmp_path / "s"), plan_of("arrow")
    write(undisturbed := Folder(tmp_path / "undisturbed"), plan, complete=True)
    write(location, plan, complete=False)
    of_plan = dataclasses.asdict(planned(plan, FILES))
    (location.path / PLAN_NAME).write_bytes(json_bytes(of_plan))
    for path in location.path.glob("shard-*.json"):
        entry = json.loads(path.read_bytes())
        del entry["self_sha256"]
        path.write_bytes(json_bytes(entry))
    checked = maintain.check(location)
    assert (checked.faults, checked.written) == ((), WRITTEN)
    assert set(checked.unsigned) == {PLAN_NAME, *(f"shard-{index:05d}.json" for index in range(WRITTEN))}
    write(location, plan, complete=True)
    assert not found(location)
    assert location.read(MANIFEST_NAME) == undisturbed.read(MANIFEST_NAME)
