"""`duet cache export` and `duet cache import`: what they print, and what they refuse before any work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from command_line import duet, refused
from support import make_plan, make_rows, read_all, same_rows, write_store


def a_store(folder, **more):
    rows = make_rows(range(6), positions=None, forget=2)
    if "values" in more:
        rows = replace(rows, topk_logits_NK=rows.topk_logits_NK + np.float32(1e-3), logsumexp_N=rows.logsumexp_N + 1)
    write_store(folder, make_plan(6, 2, **more), rows)
    return rows


def test_a_store_goes_out_and_comes_back(tmp_path):
    rows = a_store(tmp_path / "store")
    done = duet("cache", "export", str(tmp_path / "store"), str(tmp_path / "out"), "--format", "parquet")
    assert (done.code, "bit for bit" in done.out) == (0, True)
    done = duet("cache", "import", str(tmp_path / "out"), str(tmp_path / "stores"), "--format", "zarr")
    assert done.code == 0, done.err
    [folder] = (tmp_path / "stores").iterdir()
    assert folder.name.endswith(".zarr")
    assert str(folder) in done.out
    assert same_rows(read_all(folder), rows)
    assert duet("cache", "verify", str(folder)).code == 0


def test_a_rounding_is_said(tmp_path):
    a_store(tmp_path / "store", values="float32")
    done = duet("cache", "export", str(tmp_path / "store"), str(tmp_path / "out"), "--format", "distillkit")
    assert done.code == 0, done.err
    assert "fingerprint of its own" in done.out


def test_mistakes_are_refused_in_two_lines(tmp_path, capsys):
    a_store(tmp_path / "store")
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    error, hint = refused(capsys, "cache", "export", store, store, "--format", "hf")
    assert ("there already" in error, "new folder" in hint) == (True, True)
    error, _ = refused(capsys, "cache", "export", store, "s3://bucket/out", "--format", "hf")
    assert "is a URL" in error
    error, _ = refused(capsys, "cache", "export", out, out, "--format", "hf")
    assert "not a store" in error
    error, hint = refused(capsys, "cache", "import", store, out)
    assert ("not an export" in error, "duet cache export" in hint) == (True, True)
    error, _ = refused(capsys, "cache", "import", "s3://bucket/out", out)
    assert "is a URL" in error
    assert not (tmp_path / "out").exists()
