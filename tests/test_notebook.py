"""The lab's notebook runs from its first cell to its last, in a folder of its own, and is kept without outputs."""

from __future__ import annotations

import json
import os

import pytest
from support import ROOT

NOTEBOOK = ROOT / "notebooks" / "lab.ipynb"


def test_no_outputs_are_kept():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs"), cell["source"]
        assert cell.get("execution_count") is None


def test_the_notebook_runs_and_ends_with_the_labs_numbers(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `test`: run `make setup`")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `test`: run `make setup`")
    for name in ("configs", "lab"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": os.fspath(tmp_path)}})
    client.execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream"
    )
    assert "forget/dugira-duchok/town/0 (forget)" in printed
    assert "student:base: suppressed until attacked" in printed.splitlines()[-1]
    models = json.loads((tmp_path / "runs/notebook/results.json").read_text())["models"]
    assert (
        models["student:base"]["forget.rougeL_recall"]["value"] < 0.2 < models["base"]["forget.rougeL_recall"]["value"]
    )
