"""One shard as a Zarr v3 group in a zip file: one array per stored column, each with the sharding codec.

The zip's entries are stored as they are and dated 1980, so that equal rows give equal bytes; stock zarr opens it through
`ZipStore`. docs/store-format.md describes the arrays.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from duet.cache.codec import ZSTD_LEVEL, Block, Columns, Layout, concat_blocks
from duet.cache.packed_ids import join_tokens, split_tokens, token_high_offsets
from duet.cache.record import counts_of, cut, offsets_of

ARRAYS_OF_ROWS = (
    "row_id",
    "row_id_offsets",
    "subset",
    "tokens_low",
    "tokens_high",
    "token_offsets",
    "position_offsets",
)
CHUNK = 4096  # entries (positions, tokens or rows) of an inner chunk: what a read of one of them decodes at least


def write_shard(path: Path, blocks: Sequence[Block], compression: str) -> None:
    """Write the blocks, all of one layout, value dtype and with or without log-sum-exp, in order, to a file."""
    import zarr
    from zarr.storage import MemoryStore

    entries: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(entries), zarr_format=3)
    for name, array in _arrays(blocks).items():
        chunk = max(1, min(len(array), CHUNK))
        target = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(chunk, *array.shape[1:]),
            shards=(-(-max(1, len(array)) // chunk) * chunk, *array.shape[1:]),
            compressors=_compressors(compression),
        )
        if array.size:
            target[...] = array
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name), entries[name].to_bytes())


def _compressors(compression: str) -> tuple[Any, ...]:
    from zarr.codecs import BloscCodec, ZstdCodec

    return {
        "none": (),
        "lz4": (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),),
        "zstd": (ZstdCodec(level=ZSTD_LEVEL),),
    }[compression]


def _arrays(blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """The stored arrays of all blocks. Texts are UTF-8 bytes with offsets: Zarr has no settled type for them."""
    rows = concat_blocks(blocks)
    texts = [text.encode() for text in rows.row_ids.to_pylist()]
    low, high = split_tokens(rows.tokens_S, rows.token_offsets, rows.layout.high_bits)
    return {
        "row_id": np.frombuffer(b"".join(texts), np.uint8),
        "row_id_offsets": offsets_of([len(text) for text in texts]),
        "subset": rows.subsets,
        "tokens_low": low,
        "tokens_high": high,
        "token_offsets": rows.token_offsets,
        "position_offsets": rows.position_offsets,
        **rows.columns,
    }


class ZarrShard:
    """An opened shard; `block(i)` holds its rows i*block_rows and on. What is small is read at once."""

    def __init__(self, file: BufferedReader, layout: Layout, columns: Columns, block_rows: int) -> None:
        """Whatever zarr, numpy or zipfile raise, here and in `block`: it is not such a shard."""
        import zarr
        from zarr.storage import MemoryStore

        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._layout, self._block_rows = layout, block_rows
        found = zarr.open_group(MemoryStore(_entries(self._map)), mode="r")
        arrays: dict[str, Any] = {name: found[name] for name in (*ARRAYS_OF_ROWS, *columns)}
        small = {name: np.asarray(arrays.pop(name)[...]) for name in ARRAYS_OF_ROWS}
        self._subsets, self._columns = small["subset"], arrays
        self._token_offsets, self._position_offsets = small["token_offsets"], small["position_offsets"]
        num_positions = arrays["topk_low"].shape[0]
        for offsets, size in (
            (self._position_offsets, num_positions),
            (self._token_offsets, len(small["tokens_low"])),
            (token_high_offsets(self._token_offsets, layout.high_bits), len(small["tokens_high"])),
            (small["row_id_offsets"], len(small["row_id"])),
        ):
            _check_offsets(offsets, size, len(self._subsets))
        expected = {name: (dtype, (num_positions, *shape)) for name, (dtype, shape) in columns.items()}
        if {name: (array.dtype, array.shape) for name, array in arrays.items()} != expected:
            raise ValueError("its columns are others")
        ends = pa.py_buffer(small["row_id_offsets"].astype(np.int32))
        self._row_ids = pa.StringArray.from_buffers(len(self._subsets), ends, pa.py_buffer(small["row_id"]))
        self._row_ids.validate(full=True)
        self._tokens = join_tokens(small["tokens_low"], small["tokens_high"], self._token_offsets, layout.high_bits)

    @property
    def num_blocks(self) -> int:
        return -(-len(self._subsets) // self._block_rows)

    def block(self, index: int) -> Block:
        """Decoded again at each call."""
        first, end = index * self._block_rows, min((index + 1) * self._block_rows, len(self._subsets))
        token_offsets, tokens = cut(self._token_offsets, first, end)
        position_offsets, positions = cut(self._position_offsets, first, end)
        return Block(
            layout=self._layout,
            row_ids=self._row_ids[first:end],
            subsets=self._subsets[first:end],
            token_offsets=token_offsets,
            tokens_S=self._tokens[tokens],
            position_offsets=position_offsets,
            columns={name: array[positions] for name, array in self._columns.items()},
        )

    def release(self) -> None:
        """Give back the memory of the pages that were read; the system's file cache keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _entries(mapped: mmap.mmap) -> dict[str, Any]:
    """The zip's entries as views into the map: `ZipStore` would read an entry from its start for every chunk in it."""
    from zarr.buffer.cpu import Buffer

    raw = np.frombuffer(mapped, np.uint8)
    entries = {}
    mapped.seek(0)
    with zipfile.ZipFile(cast(Any, mapped)) as archive:
        for info in archive.infolist():
            lengths = (
                int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little"),
                int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little"),
            )
            first = info.header_offset + 30 + sum(lengths)  # after the local header, the name and the extra field
            entries[info.filename] = Buffer.from_array_like(cast(Any, raw)[first : first + info.file_size])
    return entries


def _check_offsets(offsets: np.ndarray, size: int, num_rows: int) -> None:
    """ValueError unless they lead each row to a part of `size` items."""
    if len(offsets) != num_rows + 1 or offsets[0] != 0 or offsets[-1] != size or (counts_of(offsets) < 0).any():
        raise ValueError("offsets lead out of it")
