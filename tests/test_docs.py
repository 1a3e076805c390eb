"""The documents say what is so: commands run, links exist, commands and columns are listed, imports go one way."""

from __future__ import annotations

import re
import subprocess
from urllib.parse import urlsplit

import numpy as np
import pytest
from docs_pages import METRICS_PATH
from support import ROOT, make_plan, make_rows, write_store

from duet.cache.arrow_format import schema
from duet.cache.codec import Layout, position_columns
from duet.cache.manifest import Manifest, Shard
from duet.cache.plan import FORMATS
from duet.stages.evaluate.definitions import all_metrics, as_markdown

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "lab/README.md", "lab/smollm2/README.md")]
STORE_FORMAT = (ROOT / "docs/store-format.md").read_text(encoding="utf-8")
SOURCES = sorted(path for package in ("pipeline", "stages", "cache") for path in (ROOT / package).rglob("*.py"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What a reader would run: the lines of all sh blocks, but a block that writes a file as a whole."""
    found = blocks(text, "sh")
    return [command for block in found for command in ([block] if "<<" in block else block.splitlines())]


def test_the_readme_is_a_front_page():
    """Short enough to be read to its end; code blocks fit a narrow window; every command is one link away."""
    lines = README.splitlines()
    assert len(lines) <= 130
    fenced = [
        line
        for number, part in enumerate(re.split(r"^```.*\n", README, flags=re.MULTILINE))
        if number % 2
        for line in part.splitlines()
    ]
    assert max(map(len, fenced)) <= 100, "GitHub shows about 110 columns"
    assert "](docs/reference/cli.md)" in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_or_is_well_formed(document):
    """In the repository; that pages and anchors are there on the site is what building it strictly checks."""
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if ":" in target:
            address = urlsplit(target)
            assert address.scheme == "https", target
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), target
            assert not re.search(r"[\s\"<>`]|[.,;]$", target), target
        elif file := target.partition("#")[0]:
            assert (document.parent / file).exists(), target


def test_every_room_stands_in_the_readmes_tree():
    tree = README.split("## The code")[1].split("## Tests")[0]
    rooms = {path.parent.name for path in SOURCES} | {"api"}
    assert set(re.findall(r"^ *(\w+)/  ", tree, re.MULTILINE)) == rooms


def test_the_store_format_lists_every_column_and_field():
    columns = position_columns(Layout(4, 2**17), "linear16", logsumexp=True)
    arrow = schema(columns).names
    for name in (*columns, *arrow, *Manifest.__dataclass_fields__, *Shard.__dataclass_fields__):
        assert f"`{name}`" in STORE_FORMAT, name


def test_the_page_of_metrics_is_that_of_the_code():
    page = as_markdown(all_metrics())
    assert METRICS_PATH.read_text(encoding="utf-8") == page, "docs/metrics.md is stale: run `make docs-metrics`"
    for metric in all_metrics():
        assert f"## {metric.id}@{metric.version}\n\n{metric.definition[:40]}" in page
        assert metric.definition.endswith("."), metric.id


@pytest.mark.parametrize("vocab_size", [900, 70_000, 151_936])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_store_formats_examples_read_with_plain_libraries_what_we_wrote(tmp_path, capsys, fmt, vocab_size):
    rows = make_rows(range(4), None, vocab_size=vocab_size, forget=2)
    write_store(tmp_path / "s", make_plan(4, 2, format=fmt, vocab_size=vocab_size), rows)
    found: dict = {"store": str(tmp_path / "s")}
    exec(compile(blocks(STORE_FORMAT, "python")[list(FORMATS).index(fmt)], "store-format.md", "exec"), found)
    assert found["row_ids"] == rows.row_ids
    assert np.array_equal(found["offsets"], rows.position_offsets)
    assert np.array_equal(found["logits"], rows.topk_logits_NK)
    assert np.array_equal(
        found["ids" if fmt == "arrow" else "low"], rows.topk_ids_NK if fmt == "arrow" else rows.topk_ids_NK % 2**16
    )
    assert capsys.readouterr().out.startswith("forget/0 [[")


def test_no_unsafe_loading_and_no_remote_code_by_default():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
        assert not re.search(r"trust_remote_code\s*(?::\s*bool\s*)?=\s*(True|Field\(True)", text), path


def test_nothing_private_is_tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        if not name.endswith((".safetensors", "tokenizer.json", ".jsonl", ".arrow", ".zip")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|Users)/\w", text) or name.startswith("tests/"), name
