"""One shard as an Arrow IPC file: a row per query, positions as lists of fixed-size lists of K.

Uncompressed, so that a memory map is the data: `ShardView` slices it without copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache.record import Record


def schema(top_k: int) -> pa.Schema:
    """The columns of every shard. Ids are int32, logits float32; `logsumexp` is null where the engine gave none."""
    return pa.schema(
        [
            pa.field("row_id", pa.string(), nullable=False),
            pa.field("subset", pa.string(), nullable=False),
            pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("topk_ids", pa.list_(pa.list_(pa.int32(), top_k)), nullable=False),
            pa.field("topk_logits", pa.list_(pa.list_(pa.float32(), top_k)), nullable=False),
            pa.field("logsumexp", pa.list_(pa.float32()), nullable=True),
        ]
    )


def write_shard(path: Path, records: Sequence[Record], top_k: int) -> None:
    """Write the rows, in the given order, as one record batch."""
    arrays = [
        pa.array([record.row_id for record in records], pa.string()),
        pa.array([record.subset for record in records], pa.string()),
        _lists([record.prompt_ids for record in records], pa.int32()),
        _lists([record.response_ids for record in records], pa.int32()),
        _lists([record.topk_ids_PK for record in records], pa.int32(), top_k),
        _lists([record.topk_logits_PK for record in records], pa.float32(), top_k),
        pa.array([record.logsumexp_P for record in records], pa.list_(pa.float32())),
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema(top_k))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _lists(parts: Sequence[np.ndarray], value_type: pa.DataType, width: int | None = None) -> pa.ListArray:
    """Concatenate arrays of one row each into a list array; 2-D parts become lists of fixed-size lists."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    values = pa.array(np.concatenate(parts).reshape(-1).astype(value_type.to_pandas_dtype(), copy=False), value_type)
    return pa.ListArray.from_arrays(
        offsets, values if width is None else pa.FixedSizeListArray.from_arrays(values, width)
    )


class ShardView:
    """A memory-mapped shard; `view[i]` is row i, its arrays views into the map."""

    def __init__(self, path: Path, top_k: int) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.num_rows = batch.num_rows
        self._row_ids, self._subsets = batch.column("row_id"), batch.column("subset")
        self._prompts = _flat(batch.column("prompt_ids"))
        self._responses = _flat(batch.column("response_ids"))
        self._topk_ids = _flat(batch.column("topk_ids"), top_k)
        self._topk_logits = _flat(batch.column("topk_logits"), top_k)
        self._has_logsumexp = batch.column("logsumexp").is_valid().to_numpy(zero_copy_only=False)
        self._logsumexp = _flat(batch.column("logsumexp"))

    def __getitem__(self, row: int) -> Record:
        return Record(
            row_id=self._row_ids[row].as_py(),
            subset=self._subsets[row].as_py(),
            prompt_ids=_slice(self._prompts, row),
            response_ids=_slice(self._responses, row),
            topk_ids_PK=_slice(self._topk_ids, row),
            topk_logits_PK=_slice(self._topk_logits, row),
            logsumexp_P=_slice(self._logsumexp, row) if self._has_logsumexp[row] else None,
        )


def _flat(column: pa.ListArray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [rows+1], values [sum] or [sum, width]) of a list column, without copying."""
    values = column.values if width is None else column.values.values
    array = values.to_numpy(zero_copy_only=True)
    return column.offsets.to_numpy(), array if width is None else array.reshape(-1, width)


def _slice(flat: tuple[np.ndarray, np.ndarray], row: int) -> np.ndarray:
    offsets, values = flat
    return values[offsets[row] : offsets[row + 1]]
