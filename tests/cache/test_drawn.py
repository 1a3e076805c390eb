"""Stores whose ids were drawn: the numbers of draws are kept, checked, and taken along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import make_plan, make_rows, read_all, same_rows, write_store

from duet.cache.codec import position_columns
from duet.cache.errors import UserError
from duet.cache.exchange import export_store, import_store
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.cache.record import Rows, check_rows

SAMPLED = {"k": 4, "ids": {"kind": "sampled", "seed": 0}}


def drawn_rows(count: int = 10, top_k: int = 4) -> Rows:
    rows = make_rows(range(count), positions=None, top_k=top_k)
    draws = np.random.default_rng(0).multinomial(top_k - 1, np.ones(top_k) / top_k, len(rows.topk_ids_NK))
    return replace(rows, draws_NK=draws.astype(np.int32))


def a_store(folder: Path, **more) -> Rows:
    rows = drawn_rows()
    write_store(folder, make_plan(10, provenance=SAMPLED, **more), rows)
    return rows


@pytest.mark.parametrize("fmt", ["arrow", "zarr"])
def test_draws_come_back(tmp_path, fmt):
    rows = a_store(tmp_path / "s", format=fmt)
    assert same_rows(read_all(tmp_path / "s"), rows)
    block = Store(Folder(tmp_path / "s")).block_of(np.array([7, 2]))
    first, end = rows.position_offsets[7:9]
    assert np.array_equal(block.columns["draws"][: end - first], rows.draws_NK[first:end])
    assert block.columns["draws"].dtype == np.uint8


def test_only_a_store_of_drawn_ids_has_the_column():
    plain, drawn = make_plan(), make_plan(provenance=SAMPLED)
    assert "draws" not in position_columns(plain.layout, "float32", logsumexp=True)
    assert "draws" in position_columns(drawn.layout, "float32", logsumexp=True)
    assert plain.fingerprint != drawn.fingerprint


@pytest.mark.parametrize("fmt", ["parquet", "hf"])
def test_draws_go_to_other_programs_and_back(tmp_path, fmt):
    rows = a_store(tmp_path / "s")
    export_store(Folder(tmp_path / "s"), tmp_path / "out", fmt)
    location, manifest = import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
    assert same_rows(read_all(location), rows)
    assert manifest.layout.drawn


def test_distillkit_has_no_place_for_them(tmp_path):
    a_store(tmp_path / "s")
    with pytest.raises(UserError, match=r"ids of .* were drawn"):
        export_store(Folder(tmp_path / "s"), tmp_path / "out", "distillkit")


def test_draws_that_cannot_be_are_refused():
    rows = drawn_rows(3)
    check_rows(rows, 4, 3, 100)
    assert rows.draws_NK is not None
    for change in (1, -1):
        draws = rows.draws_NK.copy()
        draws[-1, 2] += change
        with pytest.raises(UserError, match=r"row 'retain/2' cannot be stored: its ids were not drawn 3 times"):
            check_rows(replace(rows, draws_NK=draws), 4, 3, 100)
    negative = rows.draws_NK.copy()
    negative[0] = [4, -1, 0, 0]
    with pytest.raises(UserError, match=r"row 'retain/0' cannot be stored: its ids were not drawn"):
        check_rows(replace(rows, draws_NK=negative), 4, 3, 100)
    with pytest.raises(UserError, match="numbers of draws of the wrong shape"):
        check_rows(replace(rows, draws_NK=rows.draws_NK[:, :3]), 4, 3, 100)


def test_a_store_gets_draws_where_its_plan_says_so_and_nowhere_else(tmp_path):
    for provenance, rows in (({"k": 4}, drawn_rows()), (SAMPLED, replace(drawn_rows(), draws_NK=None))):
        with pytest.raises(UserError, match=r"with(out)? the number of draws of its ids"):
            write_store(tmp_path / str(len(provenance)), make_plan(10, provenance=provenance), rows)
