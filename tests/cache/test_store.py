"""The store: what goes in comes out, a crash costs one shard, damage is seen, an epoch is a permutation."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, make_record, same_record
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import files, writer
from cache.errors import UserError
from cache.files import sha256_json
from cache.manifest import MANIFEST_NAME, Plan, read_manifest
from cache.reader import Cursor, Store
from cache.record import Record, check_record


def plan_of(rows: int, shard_rows: int = 4, **more) -> Plan:
    return Plan(rows=rows, shard_rows=shard_rows, top_k=4, max_positions=3, vocab_size=100, provenance={"k": 4}, **more)


def write_all(store_dir: Path, plan: Plan, records: list[Record]) -> None:
    writer.open_for_writing(store_dir, plan)
    for index in writer.missing_shards(store_dir, plan):
        writer.write_shard(store_dir, plan, index, [records[row] for row in plan.shard_range(index)])
    writer.finalise(store_dir, plan, {"by": "test"})


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 13), shard_rows=st.integers(1, 6), positions=st.integers(1, 3), logsumexp=st.booleans())
def test_what_is_written_is_read(tmp_path_factory, rows, shard_rows, positions, logsumexp):
    store_dir = tmp_path_factory.mktemp("store") / "s"
    records = [make_record(row, positions=1 + (row % positions), logsumexp=logsumexp) for row in range(rows)]
    write_all(store_dir, plan_of(rows, shard_rows), records)
    store = Store(store_dir)
    assert len(store) == rows
    assert store.manifest.positions == sum(len(record.response_ids) for record in records)
    assert all(same_record(store[row], record) for row, record in enumerate(records))


def test_stock_pyarrow_opens_a_shard(tmp_path):
    records = [make_record(row) for row in range(3)]
    write_all(tmp_path / "s", plan_of(3), records)
    table = pa.ipc.open_file(tmp_path / "s" / "shard-00000.arrow").read_all()
    assert table["row_id"].to_pylist() == [record.row_id for record in records]
    assert np.array_equal(np.array(table["topk_ids"].to_pylist()), np.stack([r.topk_ids_PK for r in records]))


class Crash(Exception):
    pass


def test_a_crash_at_any_write_point_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    plan, records = plan_of(10), [make_record(row) for row in range(10)]
    write_all(tmp_path / "unbroken", plan, records)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "unbroken").iterdir()}
    replace, calls = os.replace, itertools.count()

    for crash_at in range(len(expected)):
        for after in (False, True):
            store_dir = tmp_path / f"crash-{crash_at}-{after}"
            calls = itertools.count()

            def crashing(source, target, crash_at=crash_at, after=after):
                crash = next(calls) == crash_at  # noqa: B023 - the counter of this round
                if not crash or after:
                    replace(source, target)
                if crash:
                    raise Crash

            monkeypatch.setattr(files.os, "replace", crashing)
            with pytest.raises(Crash):
                write_all(store_dir, plan, records)
            if crash_at < len(expected) - 1 or not after:
                with pytest.raises(UserError, match=r"incomplete|not a store"):
                    Store(store_dir)
            monkeypatch.setattr(files.os, "replace", replace)
            write_all(store_dir, plan, records)
            assert {path.name: path.read_bytes() for path in store_dir.iterdir()} == expected


def test_only_the_damaged_shard_is_written_again(tmp_path):
    plan, records = plan_of(10), [make_record(row) for row in range(10)]
    write_all(tmp_path / "s", plan, records)
    flip_byte(tmp_path / "s" / "shard-00001.arrow")
    assert writer.missing_shards(tmp_path / "s", plan) == [1]


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_flipped_byte_a_missing_and_a_cut_shard_are_refused(tmp_path):
    for name, damage in {
        "is damaged": flip_byte,
        "is missing": Path.unlink,
        "bytes, the manifest says": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    }.items():
        store_dir = tmp_path / name.replace(" ", "-")
        write_all(store_dir, plan_of(5), [make_record(row) for row in range(5)])
        damage(store_dir / "shard-00001.arrow")
        with pytest.raises(UserError, match=name) as caught:
            Store(store_dir)
        assert "shard-00001" in caught.value.what
        assert caught.value.hint


def test_an_edited_or_newer_manifest_is_refused(tmp_path):
    write_all(tmp_path / "s", plan_of(5), [make_record(row) for row in range(5)])
    path = tmp_path / "s" / MANIFEST_NAME
    good = json.loads(path.read_text())
    for change, message in (
        ({"format_version": 99}, "format_version 99"),
        ({"provenance": {"k": 5}}, "does not give the fingerprint"),
        ({"unheard_of": 1}, "unknown fields"),
        ({"complete": False}, "complete"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path / "s")


def test_another_plan_and_a_foreign_directory_are_refused(tmp_path):
    writer.open_for_writing(tmp_path / "s", plan_of(5))
    with pytest.raises(UserError, match="another plan"):
        writer.open_for_writing(tmp_path / "s", plan_of(6))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        writer.open_for_writing(tmp_path / "foreign", plan_of(5))
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "x"


BAD = {
    "NaN or infinite": {"topk_logits_PK": np.array([[3, 2, np.nan, 0]], np.float32)},
    "not sorted": {"topk_logits_PK": np.array([[3, 2, 2.5, 0]], np.float32)},
    "outside 0..99": {"topk_ids_PK": np.array([[1, 2, 3, 100]], np.int32)},
    "occurs twice": {"topk_ids_PK": np.array([[1, 2, 3, 1]], np.int32)},
    "shapes": {"topk_ids_PK": np.array([[1, 2, 3]], np.int32)},
    "subset": {"subset": "both"},
    "prompt is empty": {"prompt_ids": np.array([], np.int32)},
    "below the largest": {"logsumexp_P": np.array([1.0], np.float32)},
    "0 positions": {"response_ids": np.array([], np.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_refused_by_row_id(message):
    good = {
        "row_id": "forget/7",
        "subset": "forget",
        "prompt_ids": np.array([1, 2], np.int32),
        "response_ids": np.array([1], np.int32),
        "topk_ids_PK": np.array([[1, 2, 3, 4]], np.int32),
        "topk_logits_PK": np.array([[3, 2, 1, 0]], np.float32),
        "logsumexp_P": np.array([3.5], np.float32),
    }
    check_record(Record(**good), 4, 3, 100)
    with pytest.raises(UserError, match=message) as caught:
        check_record(Record(**(good | BAD[message])), 4, 3, 100)
    assert "forget/7" in caught.value.what


def make_store(path: Path, rows: int, shard_rows: int) -> Store:
    write_all(path, plan_of(rows, shard_rows), [make_record(row) for row in range(rows)])
    return Store(path)


def test_an_epoch_holds_each_row_once_and_epochs_differ(tmp_path):
    store = make_store(tmp_path / "s", rows=50, shard_rows=3)
    orders = [store.epoch_order(seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[2], store.epoch_order(seed=1, epoch=2))


def test_a_cursor_resumes_on_the_very_next_batch(tmp_path):
    store = make_store(tmp_path / "s", rows=11, shard_rows=4)
    whole = list(itertools.islice(store.batches(4, seed=3), 9))
    assert [len(records) for _, records in whole[:3]] == [4, 4, 3]
    for cut in range(8):
        resumed = list(itertools.islice(store.batches(4, seed=3, cursor=whole[cut][0]), 8 - cut))
        expected = [[record.row_id for record in records] for _, records in whole[cut + 1 :]]
        assert [[record.row_id for record in records] for _, records in resumed] == expected
    second_epoch = next(store.batches(4, seed=3, cursor=Cursor(1, 0)))
    assert [record.row_id for record in second_epoch[1]] == [record.row_id for record in whole[3][1]]


def test_the_fingerprint_does_not_depend_on_the_process():
    value = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    code = f"from cache.files import sha256_json; print(sha256_json({value!r}))"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == sha256_json(value)
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})
