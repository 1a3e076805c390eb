"""Both formats: what is written is read, crashes are resumed to the same bytes, and damage of any kind is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, FakeClock, flip_byte, make_plan, make_rows, read_all, same_rows, write_store

from duet.cache import maintain, reader
from duet.cache.errors import UserError
from duet.cache.files import json_bytes, sha256_json
from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME, read_manifest
from duet.cache.plan import FORMAT_VERSION, PLAN_NAME
from duet.cache.reader import Store
from duet.cache.record import Rows, check_distinct, check_rows, concat_rows
from duet.cache.writer import StoreWriter

FORMATS = ("arrow", "zarr")
ROWS = make_rows(range(10), positions=None, forget=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory, data):
    fmt = data.draw(st.sampled_from(FORMATS))
    compression = data.draw(st.sampled_from(["none", "lz4", "zstd"]))
    vocab_size = data.draw(st.sampled_from([50, 70_000, 151_936]))
    count, forget = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    top_k = data.draw(st.integers(1, 9))
    rows = make_rows(
        range(count), None, top_k, vocab_size, logsumexp=data.draw(st.booleans()), forget=min(forget, count)
    )
    plan = make_plan(
        count, min(forget, count), shard_rows=data.draw(st.integers(1, 13)), format=fmt, compression=compression,
        top_k=top_k, vocab_size=vocab_size, values=data.draw(st.sampled_from(["lossless", "float32"])),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("s") / "s"
    manifest = write_store(folder, plan, rows)
    assert same_rows(read_all(folder), rows)
    assert manifest.logsumexp == (rows.logsumexp_N is not None)
    assert manifest.value_dtype == ("float32" if plan.values == "float32" else "float16")
    assert not list(maintain.verify(Folder(folder), manifest))
    assert manifest.longest == np.diff(rows.token_offsets).max()


def test_rows_come_in_pieces_of_any_size(tmp_path):
    whole = write_store(tmp_path / "whole", make_plan(10, 4, shard_rows=10), ROWS)
    with StoreWriter(Folder(tmp_path / "pieces"), make_plan(10, 4, shard_rows=10)) as writer:
        shard = writer.claim()
        for first, end in itertools.pairwise([0, 1, 4, 9, 10]):
            shard.append(ROWS[first:end])
        writer.publish(shard)
        assert writer.finalise({"python": "3"}) == whole


def test_a_shard_that_needs_float32_does_not_change_the_others(tmp_path):
    logits = ROWS.topk_logits_NK.copy()
    logits[-1] = [0.1, 0.01, 0.001, 1e-9]
    rows = dataclasses.replace(ROWS, topk_logits_NK=logits)
    for fmt in FORMATS:
        manifest = write_store(tmp_path / fmt, make_plan(10, 4, format=fmt), rows)
        assert [shard.value_dtype for shard in manifest.shards] == ["float16", "float16", "float32"]
        assert (manifest.value_dtype, manifest.value_error) == ("float32", 0.0)
        assert same_rows(read_all(tmp_path / fmt), rows)
        store = Store(Folder(tmp_path / fmt))
        _, block = next(store.batches(store.order(0), 10))
        assert block.decoded().topk_logits_NK.shape == logits.shape
        assert 1e-9 in block.topk_logits().astype(np.float64).round(12)


@pytest.fixture(scope="module", params=[(fmt, long) for fmt in FORMATS for long in (False, True)])
def mixed_store(request, tmp_path_factory) -> Store:
    """30 rows in shards of 7 and blocks of 2, of which the last needs float32; long rows are not copied to be picked."""
    fmt, long = request.param
    rows = make_rows(range(30), 70 if long else None, vocab_size=70_000, forget=9)
    rows.topk_logits_NK[-1] = [0.1, 0.01, 0.001, 1e-9]
    plan = make_plan(30, 9, shard_rows=7, max_positions=2048, format=fmt, vocab_size=70_000)
    folder = tmp_path_factory.mktemp("mixed") / "s"
    manifest = write_store(folder, plan, rows)
    assert {shard.value_dtype for shard in manifest.shards} == {"float16", "float32"}
    return Store(Folder(folder))


@given(numbers=st.sets(st.integers(0, 29)).map(sorted) | st.lists(st.integers(0, 29)))
def test_a_block_of_any_rows_is_these_rows(mixed_store, numbers):
    """Of any value dtype, in the order given."""
    block = mixed_store.block_of(np.array(numbers, np.int64))
    assert block.value_dtype == "float32"
    assert len(block) == len(numbers)
    if numbers:
        assert same_rows(block.decoded(), concat_rows([next(mixed_store.rows(row, row + 1)) for row in numbers]))


def test_a_block_of_linear16_rows_keeps_every_bit(tmp_path):
    rows = dataclasses.replace(ROWS, topk_logits_NK=ROWS.topk_logits_NK / 3)
    write_store(tmp_path / "s", make_plan(10, 4, values="linear16"), rows)
    store = Store(Folder(tmp_path / "s"))
    block = store.block_of(np.arange(10))
    assert block.value_dtype == "linear16"
    assert same_rows(block.decoded(), concat_rows(list(store.rows())))


@pytest.mark.parametrize("fmt", FORMATS)
def test_conversion_keeps_every_bit_both_ways(tmp_path, fmt):
    other = FORMATS[1 - FORMATS.index(fmt)]
    for values in ("lossless", "float16", "linear16"):
        rows = ROWS if values == "lossless" else dataclasses.replace(ROWS, topk_logits_NK=ROWS.topk_logits_NK / 3)
        source, there, back = (Folder(tmp_path / values / name) for name in ("source", "there", "back"))
        attachments = {"tokenizer/t.json": b"{}"}
        manifest = write_store(source, make_plan(10, 4, format=fmt, values=values), rows, attachments)
        converted = maintain.convert(source, there, other, "zstd")
        assert (converted.format, converted.compression) == (other, "zstd")
        assert converted.fingerprint == manifest.fingerprint
        assert converted.value_error == manifest.value_error
        assert same_rows(read_all(there), read_all(source))
        assert there.read("tokenizer/t.json") == b"{}"
        again = maintain.convert(there, back, fmt, "none")
        assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in manifest.shards]


class Crash(Exception):
    pass


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_crash_at_any_write_point_is_resumed_to_the_same_bytes(tmp_path, monkeypatch, fmt):
    """Before and after each rename and each new directory; the crashed writer's leases run out."""
    plan, files = make_plan(10, 4, format=fmt), {"tokenizer/t.json": b"{}"}
    write_store(tmp_path / "unbroken", plan, ROWS, files)

    def content(folder: Path) -> dict[str, bytes]:
        return {name: Folder(folder).read(name) for name in Folder(folder).names()}

    expected = content(tmp_path / "unbroken")
    originals = {name: getattr(os, name) for name in ("replace", "rename", "mkdir")}
    crashed = 0
    for crash_at, after in ((at, after) for at in itertools.count() for after in (False, True)):
        folder, clock, calls = tmp_path / f"crash-{crash_at}-{after}", FakeClock(), itertools.count()

        def crashing(name, *arguments, crash_at=crash_at, after=after, calls=calls, **more):
            crash = next(calls) == crash_at
            try:
                if not crash or after:
                    originals[name](*arguments, **more)
            finally:
                if crash:
                    raise Crash

        def write(folder=folder, clock=clock):
            with StoreWriter(Folder(folder), plan, files, clock=clock) as writer:
                while shard := writer.claim():
                    shard.append(ROWS[shard.range.start : shard.range.stop])
                    writer.publish(shard)
                    writer.wait()
                writer.finalise({"python": "3"})

        for name in originals:
            monkeypatch.setattr(os, name, lambda *a, name=name, crashing=crashing, **m: crashing(name, *a, **m))
        try:
            write()
        except Crash:
            crashed += 1
            if MANIFEST_NAME not in Folder(folder).names():
                with pytest.raises(UserError, match=r"incomplete|not a store"):
                    Store(Folder(folder))
        else:
            break  # there is no such late write point
        finally:
            for name, original in originals.items():
                monkeypatch.setattr(os, name, original)
        clock.time += 1000
        write()
        assert content(folder) == expected
    assert crashed > 30


def faults(location: Folder) -> list[str]:
    try:
        return list(maintain.verify(location, read_manifest(location)))
    except UserError as error:
        return [error.what]


def read_into(row_ids: list[str], location: Folder) -> None:
    for rows in Store(location).rows():
        row_ids += rows.row_ids


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_flipped_byte_anywhere_is_noticed(tmp_path, fmt):
    """200 places of shards, manifest and attachment: by `verify`, and by the reader before it hands out a row."""
    location = Folder(tmp_path / "s")
    manifest = write_store(location, make_plan(10, 4, format=fmt), ROWS, {"tokenizer/t.json": b'{"a": 1}'})
    rng = random.Random(0)
    for _ in range(200):
        name = rng.choice([*(shard.name for shard in manifest.shards), MANIFEST_NAME])
        good = (location.path / name).read_bytes()
        flip_byte(location.path / name, rng.randrange(len(good)), rng.randrange(1, 256))
        assert faults(location)
        handed_out: list[str] = []
        with pytest.raises(UserError) as caught:
            read_into(handed_out, location)
        assert caught.value.hint
        index = int(name[6:11]) if name != MANIFEST_NAME else 0
        assert len(handed_out) <= 4 * index  # nothing of the damaged shard
        (location.path / name).write_bytes(good)
    assert same_rows(read_all(location), ROWS)


def test_only_the_damaged_shard_is_written_again(tmp_path):
    location, plan = Folder(tmp_path / "s"), make_plan(10, 4)
    good = write_store(location, plan, ROWS)
    flip_byte(location.path / "shard-00001.arrow")
    (location.path / "shard-00002.json").write_text("{")
    times = {name: (location.path / name).stat().st_mtime_ns for name in location.names()}
    assert maintain.invalidate(location, plan) == [1]  # the side file is that of the manifest
    assert write_store(location, plan, ROWS) == good
    assert maintain.check(location).faults == ()
    assert (location.path / "shard-00000.arrow").stat().st_mtime_ns == times["shard-00000.arrow"]


def test_a_shard_that_is_damaged_before_the_store_is_complete_is_written_anew_by_the_next_run(tmp_path):
    location, plan = Folder(tmp_path / "s"), make_plan(10, 4)
    good = write_store(tmp_path / "undisturbed", plan, ROWS)
    with StoreWriter(location, plan) as writer:
        while shard := writer.claim():
            shard.append(ROWS[shard.range.start : shard.range.stop])
            writer.publish(shard)
        writer.wait()
    (location.path / "shard-00001.arrow").write_bytes(b"cut")
    (location.path / "shard-00002.json").write_text("{")
    with pytest.raises(UserError, match=r"2 shards are not as they were written, .*shard-00001\.arrow") as caught:
        write_store(location, plan, ROWS)
    assert "run the same command again" in caught.value.hint
    assert write_store(location, plan, ROWS) == good


def test_a_missing_and_a_cut_shard_are_refused(tmp_path):
    for name, damage in {
        "is missing": Path.unlink,
        "bytes, the manifest says": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    }.items():
        location = Folder(tmp_path / name.replace(" ", "-"))
        write_store(location, make_plan(10, 4), ROWS)
        damage(location.path / "shard-00001.arrow")
        with pytest.raises(UserError, match=name) as caught:
            Store(location)
        assert "shard-00001" in caught.value.what


def edited(location: Folder, **changes) -> None:
    """A manifest of somebody who knows how to sign it."""
    value = json.loads((location.path / MANIFEST_NAME).read_text())
    value.pop("sha256")
    for key, change in changes.items():
        value[key] = change(value[key]) if callable(change) else change
    value["fingerprint"] = sha256_json(value["provenance"])
    (location.path / MANIFEST_NAME).write_bytes(json_bytes({**value, "sha256": sha256_json(value)}))


def with_name(name: str):
    return lambda shards: [{**shards[0], "name": name}, *shards[1:]]


HOSTILE = {
    "parent": {"shards": with_name("../secret.arrow")},
    "absolute": {"shards": with_name("/etc/passwd")},
    "another shard": {"shards": with_name("shard-00001.arrow")},
    "negative size": {"shards": lambda shards: [{**shards[0], "bytes": -1}, *shards[1:]]},
    "size of text": {"shards": lambda shards: [{**shards[0], "bytes": "9"}, *shards[1:]]},
    "no hash": {"shards": lambda shards: [{**shards[0], "sha256": ""}, *shards[1:]]},
    "hash is a list": {"shards": lambda shards: [{**shards[0], "sha256": []}, *shards[1:]]},
    "fewer rows": {"shards": lambda shards: [{**shards[0], "rows": 3}, *shards[1:]]},
    "too many rows": {"rows": 11},
    "wide vocabulary": {"vocab_size": 2**31},
    "no positions": {"positions": 0},
    "no shards": {"shards": []},
    "format": {"format": "../arrow"},
    "subsets": {"subsets": {"forget": 10}},
    "attachment": {"attachments": {"../x": "0" * 64}},
    "attachment twice up": {"attachments": {"tokenizer/../../x": "0" * 64}},
    "not complete": {"complete": False},
    "more fields": {"unheard_of": 1},
    "newer": {"format_version": FORMAT_VERSION + 1},
    "older": {"format_version": 1},
    "version of text": {"format_version": "2"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_and_nothing_outside_is_opened(tmp_path, monkeypatch, name):
    location = Folder(tmp_path / "stores" / "s")
    write_store(location, make_plan(10, 4), ROWS)
    (tmp_path / "stores" / "secret.arrow").write_bytes(b"secret")
    edited(location, **HOSTILE[name])
    opened = []
    monkeypatch.setattr(
        os, "open", lambda path, *a, original=os.open, **m: opened.append(str(path)) or original(path, *a, **m)
    )
    with pytest.raises(UserError) as caught:
        read_into([], location)
    assert "manifest.json" in caught.value.what
    assert caught.value.hint
    assert all(Path(path).resolve().is_relative_to(location.path) for path in opened)


def test_a_newer_format_says_what_to_upgrade(tmp_path):
    write_store(tmp_path / "s", make_plan(10, 4), ROWS)
    edited(Folder(tmp_path / "s"), format_version=FORMAT_VERSION + 1)
    with pytest.raises(UserError, match="format_version 3") as caught:
        read_manifest(Folder(tmp_path / "s"))
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("bomb", ["[" * 100_000, "9" * 100_000, '{"a":' * 100_000, "\xff", "", "[]", "null"])
def test_json_bombs_are_refused(tmp_path, bomb):
    write_store(tmp_path / "s", make_plan(10, 4), ROWS)
    (tmp_path / "s" / MANIFEST_NAME).write_text(bomb, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store(Folder(tmp_path / "s"))


def test_a_manifest_too_large_is_not_parsed(tmp_path, monkeypatch):
    write_store(tmp_path / "s", make_plan(10, 4), ROWS)
    for module in ("duet.cache.files", "duet.cache.location"):
        monkeypatch.setattr(f"{module}.MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        Store(Folder(tmp_path / "s"))


def test_a_shard_that_is_a_link_is_refused(tmp_path):
    location = Folder(tmp_path / "s")
    write_store(location, make_plan(10, 4), ROWS)
    shard = location.path / "shard-00000.arrow"
    shard.rename(tmp_path / "elsewhere.arrow")  # the right bytes, but not in the store
    shard.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(UserError, match=r"not a regular file"):
        Store(location)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_shard_of_another_store_with_a_right_hash_is_refused(tmp_path, fmt):
    """Somebody else's shard behind a manifest that names its hash: its columns are not those of this store."""
    wide, location = Folder(tmp_path / "wide"), Folder(tmp_path / "s")
    write_store(wide, make_plan(10, 4, format=fmt, top_k=5), make_rows(range(10), None, 5, forget=4))
    manifest = write_store(location, make_plan(10, 4, format=fmt), ROWS)
    name = manifest.shards[0].name
    raw = (wide.path / name).read_bytes()
    (location.path / name).write_bytes(raw)
    import hashlib

    digest = hashlib.sha256(raw).hexdigest()
    edited(location, shards=lambda shards: [{**shards[0], "bytes": len(raw), "sha256": digest}, *shards[1:]])
    with pytest.raises(UserError, match="is not a shard of this store"):
        read_all(location)


def test_a_store_is_hashed_once_per_process(tmp_path, monkeypatch):
    write_store(tmp_path / "s", make_plan(10, 4), ROWS)
    read_all(tmp_path / "s")
    monkeypatch.setattr(reader.hashlib, "file_digest", None)
    assert same_rows(read_all(tmp_path / "s"), ROWS)


def test_another_plan_and_a_foreign_directory_are_refused(tmp_path):
    StoreWriter(Folder(tmp_path / "s"), make_plan(10)).__exit__()
    with pytest.raises(UserError, match="shard_rows 4 there and 5 now"):
        StoreWriter(Folder(tmp_path / "s"), make_plan(10, shard_rows=5))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        StoreWriter(Folder(tmp_path / "foreign"), make_plan(10))
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "x"


def one_row(**changes) -> Rows:
    return dataclasses.replace(make_rows([7], positions=1), **changes)


def logits(*values: float, dtype=np.float32) -> dict[str, np.ndarray]:
    return {"topk_logits_NK": np.array([values], dtype)}


BAD = {
    "NaN or infinite": [
        logits(*values, dtype=dtype)
        for dtype in (np.float32, np.float16)
        for values in ((3, 2, np.nan, 0), (np.nan, 2, 1, 0), (np.inf, 2, 1, 0), (3, 2, 1, -np.inf), (3, 2, 1, np.nan))
    ],
    "not sorted": [
        logits(3, 2, 2.5, 0),
        logits(3, 2, 2.5, 0, dtype=np.float16),
        logits(-3, -2, -1, 0, dtype=np.float16),
    ],
    "top-k id outside 0..99": [{"topk_ids_NK": np.array([[1, 2, 3, bad]], np.int32)} for bad in (100, -1)],
    "token id outside 0..99": [{"tokens_S": np.array([1, 100, 3, 4, 5, 6, 7], np.int32)}],
    "shapes": [{"topk_ids_NK": np.array([[1, 2, 3]], np.int32)}],
    "subset": [{"subsets": np.array([3], np.uint8)}],
    "prompt is empty": [{"tokens_S": np.array([1], np.int32), "token_offsets": np.array([0, 1])}],
    "log-sum-exp NaN": [{"logsumexp_N": np.array([value], np.float32)} for value in (-9.0, np.nan, np.inf)],
    "different lengths": [{"tokens_S": np.array([1, 2], np.int32)}],
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_refused_by_its_id(message):
    check_rows(one_row(), 4, 3, 100)
    check_rows(one_row(**logits(1, 0.0, -0.0, -1, dtype=np.float16)), 4, 3, 100)
    check_rows(one_row(**logits(1, -0.0, 0.0, -1, dtype=np.float16)), 4, 3, 100)
    for changes in BAD[message]:
        with pytest.raises(UserError, match=message) as caught:
            check_rows(one_row(**changes), 4, 3, 100)
        assert "retain/7" in caught.value.what


def test_the_bad_row_of_many_is_the_one_that_is_named():
    rows = make_rows(range(20), positions=None)
    for number in range(20):
        broken = rows.topk_logits_NK.copy()
        broken[rows.position_offsets[number + 1] - 1, 1] = np.nan
        with pytest.raises(UserError, match=f"'retain/{number}'"):
            check_rows(dataclasses.replace(rows, topk_logits_NK=broken), 4, 3, 100)


def test_an_id_that_comes_twice_is_refused():
    check_distinct(one_row())
    with pytest.raises(UserError, match=r"'retain/7'.*twice"):
        check_distinct(one_row(topk_ids_NK=np.array([[1, 2, 3, 1]], np.int32)))


def test_too_many_positions_are_refused():
    with pytest.raises(UserError, match="positions are not 1 to 2"):
        check_rows(make_rows([2], positions=3), 4, 2, 100)


def test_a_vocabulary_beyond_20_bits_is_refused(tmp_path):
    with pytest.raises(UserError, match="1048577 ids"):
        StoreWriter(Folder(tmp_path / "s"), make_plan(10, vocab_size=2**20 + 1))


def test_the_fingerprint_does_not_depend_on_the_process():
    value = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    code = f"from duet.cache.files import sha256_json; print(sha256_json({value!r}))"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == sha256_json(value)
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})


def test_the_plan_is_written_before_anything_else(tmp_path):
    StoreWriter(Folder(tmp_path / "s"), make_plan(10), {"tokenizer/t.json": b"{}"}).__exit__()
    assert Folder(tmp_path / "s").names() == [PLAN_NAME, "tokenizer/t.json"]
