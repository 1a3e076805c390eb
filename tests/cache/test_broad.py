"""Stores with broad rows beside forget and retain rows: what is written is read, and nothing else changes for them."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from support import make_plan, make_rows, read_all, same_rows, with_broad, write_store

from duet.cache.errors import DamagedStore
from duet.cache.files import json_bytes, signed
from duet.cache.location import Folder
from duet.cache.maintain import convert, verify
from duet.cache.manifest import MANIFEST_NAME, read_manifest
from duet.cache.reader import Store
from duet.cache.record import subset_counts

SUBSETS = {"forget": 4, "retain": 5, "broad": 5}


@pytest.fixture(params=["arrow", "zarr"])
def store_format(request) -> str:
    return request.param


def written(folder, store_format: str, broad: int = 5):
    plan, rows = make_plan(14, 4, format=store_format), make_rows(range(14), None, forget=4)
    return write_store(folder, *(with_broad(plan, rows, broad) if broad else (plan, rows)))


def test_broad_rows_are_read_as_they_were_written(tmp_path, store_format):
    manifest = written(tmp_path / "s", store_format)
    assert manifest.subsets == SUBSETS
    assert read_manifest(Folder(tmp_path / "s")) == manifest
    assert not list(verify(Folder(tmp_path / "s"), manifest))
    _, expected = with_broad(make_plan(14, 4), make_rows(range(14), None, forget=4), 5)
    assert same_rows(read_all(tmp_path / "s"), expected)
    store = Store(Folder(tmp_path / "s"))
    _, block = next(store.batches(store.order(seed=0), 14))
    read = block.decoded()
    assert sorted(read.row_ids) == sorted(expected.row_ids)
    assert read.subsets.tolist() == [0] * 4 + [1] * 5 + [2] * 5, "a subset's rows do not lie together"
    other = "zarr" if store_format == "arrow" else "arrow"
    convert(Folder(tmp_path / "s"), Folder(tmp_path / "other"), other, "none")
    assert same_rows(read_all(tmp_path / "other"), expected)


def test_shards_without_broad_rows_have_the_bytes_that_they_had_before_there_were_any(tmp_path, store_format):
    """Rows 0 to 3 are of the forget set, 4 to 7 to be kept, 8 and on to be kept and broad: only those bytes differ."""
    with_some, without = (written(tmp_path / str(broad), store_format, broad).shards for broad in (5, 0))
    assert [a.sha256 == b.sha256 for a, b in zip(with_some, without, strict=True)] == [True, True, False, False]


def test_a_shard_names_the_subsets_that_a_reader_may_meet(tmp_path):
    written(tmp_path / "s", "arrow")
    names = [
        pa.ipc.open_file(path).read_all()["subset"].combine_chunks().dictionary.to_pylist()
        for path in sorted((tmp_path / "s").glob("*.arrow"))
    ]
    assert names == [["forget", "retain"]] * 2 + [["forget", "retain", "broad"]] * 2


@pytest.mark.parametrize(
    "subsets",
    [{"forget": 4, "retain": 10, "wide": 0}, {"forget": 4, "broad": 10}, {"forget": 4, "retain": 5, "broad": 6}],
)
def test_a_manifest_of_other_subsets_is_refused(tmp_path, subsets):
    written(tmp_path / "s", "arrow")
    path = tmp_path / "s" / MANIFEST_NAME
    value = json.loads(path.read_text(encoding="utf-8")) | {"subsets": subsets}
    del value["sha256"]
    path.write_bytes(json_bytes(signed(value, "sha256")))
    with pytest.raises(DamagedStore, match="subsets"):
        read_manifest(Folder(tmp_path / "s"))


def test_broad_rows_are_counted_only_where_there_are_some():
    assert subset_counts([]) == {"forget": 0, "retain": 0}
    assert subset_counts(["retain", "broad", "retain"]) == {"forget": 0, "retain": 2, "broad": 1}
