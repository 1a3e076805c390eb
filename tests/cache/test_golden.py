"""Stores of the past stay readable. A new format version gets new golden stores beside the old ones; none is ever rewritten.

`PYTHONPATH=.:tests python tests/cache/test_golden.py NEW_FOLDER` writes what `GOLDEN` describes with the code of today.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import make_plan, make_rows, read_all, same_rows, write_store

from duet.cache import maintain
from duet.cache.location import Folder
from duet.cache.manifest import read_manifest
from duet.cache.plan import FORMAT_VERSION, Plan
from duet.cache.reader import Store
from duet.cache.record import Rows

FOLDER = Path(__file__).parent / "golden"
# name: format, vocabulary, and what else differs from the plan of `make_plan`
GOLDEN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "v2-arrow": ("arrow", 900, {}),
    "v2-arrow-lz4": ("arrow", 128_256, {"compression": "lz4", "values": "float32"}),
    "v2-arrow-linear16-zstd": ("arrow", 151_936, {"compression": "zstd", "values": "linear16"}),
    "v2-zarr": ("zarr", 151_936, {}),
    "v2-zarr-linear16-zstd": ("zarr", 900, {"compression": "zstd", "values": "linear16"}),
    "v2-zarr-lz4": ("zarr", 128_256, {"compression": "lz4", "values": "float32"}),
}


def golden_rows(vocab_size: int) -> Rows:
    return make_rows(range(10), None, vocab_size=vocab_size, forget=4, logsumexp=vocab_size > 900)


def plan_of_golden(name: str) -> Plan:
    fmt, vocab_size, more = GOLDEN[name]
    return make_plan(10, 4, format=fmt, vocab_size=vocab_size, provenance={"golden": name}, **more)


def write_golden(folder: Path, name: str) -> None:
    rows = golden_rows(GOLDEN[name][1])
    write_store(folder / name, plan_of_golden(name), rows, {"tokenizer/tokenizer.json": b"{}\n"})


def test_every_version_and_format_has_a_golden_store():
    assert {path.name for path in FOLDER.iterdir()} == set(GOLDEN)
    assert {(f"v{FORMAT_VERSION}", fmt) for fmt in ("arrow", "zarr")} <= {
        (name.partition("-")[0], fmt) for name, (fmt, _, _) in GOLDEN.items()
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_store_is_read(tmp_path, name):
    shutil.copytree(FOLDER / name, tmp_path / "s")  # reading notes the time of use
    location, expected = Folder(tmp_path / "s"), golden_rows(GOLDEN[name][1])
    why = "stores of this format exist: read them still, and give the new format another FORMAT_VERSION"
    manifest = read_manifest(location)
    assert not list(maintain.verify(location, manifest)), why
    rows = read_all(location)
    if manifest.value_error:
        error = np.abs(rows.topk_logits_NK - expected.topk_logits_NK).max()
        assert 0 < error <= manifest.value_error, why
        rows = dataclasses.replace(rows, topk_logits_NK=expected.topk_logits_NK)
    assert same_rows(rows, expected), why
    store = Store(location)
    _, batch = next(store.batches(store.order(seed=0), len(store)))
    assert sorted(batch.decoded().row_ids) == sorted(expected.row_ids)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_store_without_broad_rows_is_written_as_ever(tmp_path, name):
    """Its rows' bytes: those of lossless and linear values depend on no library but the one that writes the file."""
    write_golden(tmp_path, name)
    today, golden = (read_manifest(Folder(folder / name)) for folder in (tmp_path, FOLDER))
    assert list(today.as_json()["subsets"].items()) == [("forget", 4), ("retain", 6)]
    assert (today.fingerprint, today.shards) == (golden.fingerprint, golden.shards)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith(f"v{FORMAT_VERSION}-")])
def test_what_is_written_today_has_the_golden_columns(tmp_path, name):
    write_golden(tmp_path, name)
    today, golden = (Store(Folder(folder / name)) for folder in (tmp_path, FOLDER))
    assert today.block(0, 0).columns.keys() == golden.block(0, 0).columns.keys()
    for key, column in today.block(0, 0).columns.items():
        assert np.array_equal(column, golden.block(0, 0).columns[key]), key


if __name__ == "__main__":
    for golden_name in GOLDEN:
        write_golden(Path(sys.argv[1]), golden_name)
