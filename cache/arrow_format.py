"""One shard as an Arrow IPC file: a row per query, a record batch per block of rows, positions as lists of structs.

Uncompressed, a block is views into the memory map. docs/store-format.md describes the columns.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa

from duet.cache.codec import ZSTD_LEVEL, Block, Columns, Layout, position_columns
from duet.cache.packed_ids import join_tokens, split_tokens, token_high_offsets
from duet.cache.record import MAIN_SUBSETS, SUBSETS


def schema(positions: Columns) -> pa.Schema:
    """The columns of a shard whose positions have these."""
    struct = []
    for name, (dtype, shape) in positions.items():
        kind = pa.from_numpy_dtype(dtype)
        struct.append(_field(name, pa.list_(_field("item", kind), *shape) if shape else kind))
    return pa.schema(
        [
            _field("row_id", pa.string()),
            _field("subset", pa.dictionary(pa.int8(), pa.string())),
            _field("tokens_low", pa.list_(_field("item", pa.uint16()))),
            _field("tokens_high", pa.list_(_field("item", pa.uint8()))),
            _field("positions", pa.list_(_field("item", pa.struct(struct)))),
        ]
    )


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def write_shard(path: Path, blocks: Sequence[Block], compression: str) -> None:
    """Write the blocks, all of one layout, value dtype and with or without log-sum-exp, in order, to a file."""
    first = blocks[0]
    columns = schema(position_columns(first.layout, first.value_dtype, "logsumexp" in first.columns))
    has_more = any((block.subsets >= len(MAIN_SUBSETS)).any() for block in blocks)
    names = pa.array(SUBSETS if has_more else MAIN_SUBSETS)  # a file has one dictionary
    options = pa.ipc.IpcWriteOptions(compression=_codec(compression))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns, options=options) as writer:
        for block in blocks:
            writer.write_batch(_batch(block, columns, names))


def _codec(compression: str) -> pa.Codec | str | None:
    if compression == "zstd":
        return pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    return None if compression == "none" else compression


def _batch(block: Block, columns: pa.Schema, names: pa.StringArray) -> pa.RecordBatch:
    low, high = split_tokens(block.tokens_S, block.token_offsets, block.layout.high_bits)
    struct_type = columns.field("positions").type.value_type
    children = [_child(block.columns[field.name], field.type) for field in struct_type]
    structs = pa.StructArray.from_arrays(children, fields=list(struct_type))
    subsets = pa.DictionaryArray.from_arrays(pa.array(block.subsets.astype(np.int8)), names)
    arrays = [
        block.row_ids,
        subsets,
        _list(block.token_offsets, pa.array(low), columns.field("tokens_low").type),
        _list(
            token_high_offsets(block.token_offsets, block.layout.high_bits),
            pa.array(high),
            columns.field("tokens_high").type,
        ),
        _list(block.position_offsets, structs, columns.field("positions").type),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def _child(column: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = pa.Array.from_buffers(
        kind.value_type if pa.types.is_fixed_size_list(kind) else kind,
        column.size,
        [None, pa.py_buffer(np.ascontiguousarray(column))],
    )
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if pa.types.is_fixed_size_list(kind) else flat


def _list(offsets: np.ndarray, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=kind)


class ArrowShard:
    """A memory-mapped shard; `block(i)` holds its rows i*block_rows and on."""

    def __init__(self, file: BufferedReader, layout: Layout, columns: Columns, block_rows: int) -> None:
        """`block_rows` is the size of its record batches. Any error of pyarrow, here and in `block`, means it is not one."""
        self._map, self._layout = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), layout
        self._file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
        if self._file.schema != schema(columns):
            raise ValueError("its columns are others")

    @property
    def num_blocks(self) -> int:
        return self._file.num_record_batches

    def block(self, index: int) -> Block:
        """Views into the map where it is not compressed; they stay valid after `release`."""
        batch = self._file.get_batch(index)
        batch.validate(full=True)  # offsets that lead out of it would be followed
        token_offsets = _offsets(batch.column("tokens_low"))
        positions = batch.column("positions")
        structs = positions.values
        high = batch.column("tokens_high").values.to_numpy()
        return Block(
            layout=self._layout,
            row_ids=batch.column("row_id"),
            subsets=batch.column("subset").indices.to_numpy().view(np.uint8),
            token_offsets=token_offsets,
            tokens_S=join_tokens(
                batch.column("tokens_low").values.to_numpy(), high, token_offsets, self._layout.high_bits
            ),
            position_offsets=_offsets(positions),
            columns={field.name: _numpy(structs.field(number)) for number, field in enumerate(structs.type)},
        )

    def release(self) -> None:
        """Give back the memory of the pages that were read; the system's file cache keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _offsets(column: pa.ListArray) -> np.ndarray:
    return column.offsets.to_numpy().astype(np.int64)


def _numpy(column: pa.Array) -> np.ndarray:
    """A column over positions, without copying: [N] or [N, width]."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy(zero_copy_only=True)
    return column.values.to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)
