"""Stores in other programs' formats and back: a folder that pandas or DistillKit reads, with all that a store needs to return.

An export is a folder: data files, one for each shard, and `duet/` with the store's manifest, its tokenizer and `export.json`,
which is written last and has every other file's sha256. Nobody can add or change a row unnoticed: a store that is imported has
the fingerprint of the one that was exported, or, where the format rounds logits, one of its own that says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from duet.cache import exchange_distillkit, exchange_rows
from duet.cache.codec import Block
from duet.cache.errors import DamagedStore, UserError, first_line
from duet.cache.exchange_distillkit import BESIDE, Grid
from duet.cache.files import json_bytes, publishing_dir, read_signed, sha256_file, signed
from duet.cache.location import Folder, Location, read_attachments
from duet.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from duet.cache.plan import PLAN_NAME, Plan, read_plan, store_name
from duet.cache.reader import Store
from duet.cache.record import Rows
from duet.cache.writer import StoreWriter

EXCHANGE_FORMATS = ("parquet", "hf", "distillkit")
EXPORT_VERSION = 1
OURS, EXPORT_NAME = "duet", "export.json"
AGAIN = "export the store again: what an export holds is vouched for as a whole"
MOST_NUMBERS = 2**31  # Arrow's lists have offsets of 32 bits, and other programs read no others everywhere
CARD = """---
configs:
- config_name: default
  data_files: "data/*.parquet"
---
Teacher logits of a store of Duet's, a row per query; its columns: docs/exchange.md of Duet.
"""


@dataclass(frozen=True)
class Export:
    """What `export.json` holds."""

    export_version: int
    format: str
    value_error: float  # largest absolute difference between a logit of the store and what comes back
    files: dict[str, str]  # sha256 of every other file


def export_store(source: Location, target: Path, exchange_format: str) -> Export:
    """Write a complete store's rows to a new folder. Rows are read block by block, so memory does not grow with the store.

    UserError where the folder exists, the format needs what the store has not, or its tokenizer is not as it was written.
    """
    store = Store(source)
    manifest = store.manifest
    _check_new(target)
    if exchange_format == "distillkit" and not manifest.logsumexp:
        raise UserError(
            f"{source} has no log-sum-exp, and DistillKit reads log-probabilities",
            "export it as parquet, or write the store with an engine that has the log-sum-exp",
        )
    if exchange_format == "distillkit" and manifest.layout.drawn:
        raise UserError(
            f"the ids of {source} were drawn, and DistillKit has no column for the number of their draws",
            "export it as parquet, or write a store with teacher.ids: top_k",
        )
    _check_lists(manifest, exchange_format)
    beside = read_attachments(source, manifest.attachments)
    beside[MANIFEST_NAME] = source.read(MANIFEST_NAME) or b""
    if plan := read_plan(source):
        beside[PLAN_NAME] = json_bytes(plan.as_json())
    with publishing_dir(target, new=True) as folder:
        write = _write_distillkit if exchange_format == "distillkit" else _write_rows
        errors = [write(folder, store, index, exchange_format) for index in range(len(manifest.shards))]
        _describe(folder, manifest, exchange_format)
        for name, raw in beside.items():
            (folder / OURS / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / OURS / name).write_bytes(raw)
        files = {
            str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        export = Export(EXPORT_VERSION, exchange_format, max(errors), files)
        (folder / OURS / EXPORT_NAME).write_bytes(json_bytes(signed(vars(export), "sha256")))
    return export


def _check_new(target: Path) -> None:
    """Refuse, before any work, a place where something is, or where no folder can be made."""
    if os.path.lexists(target):
        raise UserError(f"{target} is there already", "name a new folder")
    above = next(path for path in target.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{target} cannot be made: {above} is a file", "name a folder elsewhere")


def _check_lists(manifest: Manifest, exchange_format: str) -> None:
    """Refuse rows of which some that are written at once have more numbers than the lists of these formats can count."""
    of_block, of_kit = manifest.block_rows * manifest.max_positions, 4 * _grid(manifest, 0).cells_at_once
    count = (of_kit if exchange_format == "distillkit" else of_block) * manifest.top_k
    if count >= MOST_NUMBERS:
        raise UserError(
            f"{manifest.top_k} ids at each position of rows of up to {manifest.longest} tokens are {count} numbers at once, "
            f"and lists in {exchange_format} have less than {MOST_NUMBERS}",
            "write a store with a smaller teacher.top_k or with shorter rows",
        )


def _data_name(manifest: Manifest, index: int, exchange_format: str) -> str:
    if exchange_format == "parquet":
        return f"data/rows-{index:05d}.parquet"
    return f"data-{index:05d}-of-{len(manifest.shards):05d}.arrow"


def _beside_name(index: int) -> str:
    return f"{OURS}/rows-{index:05d}.arrow"


@contextmanager
def _writing(path: Path, columns: pa.Schema) -> Iterator[Any]:
    """A function that appends a record batch to a new file: Parquet, or Arrow's stream format, as the name ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        options: Any = {"compression": "snappy", "use_dictionary": ["subset"]}  # all other numbers hardly ever recur
        with pq.ParquetWriter(path, columns, **options) as parquet:
            yield parquet.write_batch
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
            yield stream.write_batch


def _write_rows(folder: Path, store: Store, index: int, exchange_format: str) -> float:
    columns = exchange_rows.schema(store.manifest)
    with _writing(folder / _data_name(store.manifest, index, exchange_format), columns) as write:
        for block in store.each_block(index):
            write(exchange_rows.batch_of(block, columns))
    return 0.0


def _write_distillkit(folder: Path, store: Store, index: int, exchange_format: str) -> float:
    grid, error = _grid(store.manifest, index), 0.0
    data, beside = folder / _data_name(store.manifest, index, exchange_format), folder / _beside_name(index)
    with _writing(data, exchange_distillkit.SCHEMA) as write, _writing(beside, BESIDE) as write_beside:
        for block in store.each_block(index):
            for part in _parts(block, grid.rows_at_once):
                rows, more, found = exchange_distillkit.batches_of(part, grid)
                write(rows)
                write_beside(more)
                error = max(error, found)
    return error


def _grid(manifest: Manifest, index: int) -> Grid:
    return Grid(manifest.longest, manifest.top_k, manifest.vocab_size, manifest.shards[index].value_dtype)


def _parts(block: Block, size: int) -> Iterator[Block]:
    for first in range(0, len(block), size):
        yield block[first : first + size]


def _describe(folder: Path, manifest: Manifest, exchange_format: str) -> None:
    """What other programs look for beside the data."""
    if exchange_format == "parquet":
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        return
    names = [_data_name(manifest, index, exchange_format) for index in range(len(manifest.shards))]
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": manifest.fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_bytes(json_bytes(state))
    (folder / "dataset_info.json").write_bytes(json_bytes({"description": "Teacher logits of a store of Duet's."}))
    if exchange_format == "distillkit":
        text = exchange_distillkit.config_text(_grid(manifest, 0))
        (folder / "compression_config.yaml").write_text(text, encoding="utf-8")


def import_store(source: Path, root: Location, store_format: str, compression: str) -> tuple[Location, Manifest]:
    """Write an export back as a store, in its own folder under `root`; resumes like any writing.

    UserError where `source` is not an export, or not as it was exported.
    """
    export = read_export(source)
    manifest = read_manifest(Folder(source / OURS))
    provenance = dict(manifest.provenance)
    if export.value_error:
        provenance["imported"] = {"format": export.format, "value_error": export.value_error}
    plan = Plan(
        subsets=manifest.subsets, shard_rows=manifest.shard_rows, top_k=manifest.top_k,
        max_positions=manifest.max_positions, vocab_size=manifest.vocab_size, provenance=provenance,
        format=store_format, compression=compression, values=_values(manifest, read_plan(Folder(source / OURS))),
    )  # fmt: skip
    target = root / store_name(plan.fingerprint, store_format)
    attachments = {name: (source / OURS / name).read_bytes() for name in manifest.attachments}
    with StoreWriter(target, plan, attachments) as writer:
        while writer.missing():
            while shard := writer.claim():
                for rows in _rows(source, manifest, export.format, shard.index):
                    shard.append(rows)
                shard.error = max(shard.error, manifest.shards[shard.index].value_error + export.value_error)
                writer.publish(shard)
            writer.wait()
            time.sleep(0.2 if writer.missing() else 0)  # others are writing what is left
        return target, writer.finalise(manifest.environment)


def read_export(source: Path) -> Export:
    """What an export says of itself, with every byte of its files checked."""
    name = f"{OURS}/{EXPORT_NAME}"
    path = source / name
    if not path.is_file():
        raise UserError(f"{source} is not an export: it has no {name}", "make one with `duet cache export`")
    value = read_signed(path.read_bytes(), str(path), "sha256", AGAIN)
    if value.get("export_version") != EXPORT_VERSION:
        raise DamagedStore(
            f"{path} has export_version {value.get('export_version')}, this program reads {EXPORT_VERSION}",
            "take the version of Duet that exported it",
        )
    export = Export(**value)
    for name, digest in export.files.items():
        found = sha256_file(source / name) if (source / name).is_file() else "missing"
        if found != digest:
            raise DamagedStore(
                f"{source / name} is not as it was exported: sha256 {found[:16]}, not {digest[:16]}", AGAIN
            )
    return export


def _values(manifest: Manifest, plan: Plan | None) -> str:
    """How logits are kept again: as before, but for linear16, whose decoded values only float32 holds."""
    if plan and plan.values != "linear16":
        return plan.values  # as the config says that may repair it
    found = {"float32" if shard.value_dtype == "linear16" else shard.value_dtype for shard in manifest.shards}
    return found.pop() if len(found) == 1 else "lossless"


def _rows(source: Path, manifest: Manifest, exchange_format: str, index: int) -> Iterator[Rows]:
    """A shard's rows, some at a time; a UserError where a file has other columns, or none is there."""
    try:
        yield from _read(source, manifest, exchange_format, index)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        name = source / _data_name(manifest, index, exchange_format)
        raise DamagedStore(f"{name} does not hold the rows of this export: {first_line(error)}", AGAIN) from error


def _read(source: Path, manifest: Manifest, exchange_format: str, index: int) -> Iterator[Rows]:
    path = source / _data_name(manifest, index, exchange_format)
    if exchange_format == "parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=manifest.block_rows):
                yield exchange_rows.rows_of(batch, manifest.top_k)
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        if exchange_format == "hf":
            for batch in stream:
                yield exchange_rows.rows_of(batch, manifest.top_k)
            return
        grid = _grid(manifest, index)
        with pa.memory_map(str(source / _beside_name(index))) as more, pa.ipc.open_stream(more) as beside:
            for batch, other in zip(stream, beside, strict=True):
                yield exchange_distillkit.rows_of(batch, other, grid)
