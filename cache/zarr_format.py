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

from cache.codec import ZSTD_LEVEL, Block, Layout, concat_blocks, join_tokens, position_columns, split_tokens
from cache.errors import UserError
from cache.record import cut, offsets_of

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

    def __init__(self, file: BufferedReader, name: str, layout: Layout, block_rows: int) -> None:
        import zarr
        from zarr.storage import MemoryStore

        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._layout, self._block_rows = layout, block_rows
        try:
            group = zarr.open_group(MemoryStore(_entries(self._map)), mode="r")
            arrays: dict[str, Any] = dict(group.arrays())
            small = {name: np.asarray(arrays.pop(name)[...]) for name in _arrays_of_rows()}
            _check_columns(arrays, int(small["position_offsets"][-1]), layout)
        except (zipfile.BadZipFile, KeyError, ValueError, IndexError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{name} is not a shard of this store: {error}", "make the store anew") from None
        self._columns = arrays
        offsets = pa.py_buffer(small["row_id_offsets"].astype(np.int32))
        self._row_ids = pa.StringArray.from_buffers(len(small["subset"]), offsets, pa.py_buffer(small["row_id"]))
        self._subsets = small["subset"]
        self._token_offsets, self._position_offsets = small["token_offsets"], small["position_offsets"]
        self._tokens = join_tokens(small["tokens_low"], small["tokens_high"], self._token_offsets, layout.high_bits)

    @property
    def num_blocks(self) -> int:
        return -(-len(self._subsets) // self._block_rows)

    def block(self, index: int) -> Block:
        """Decoded anew at each call."""
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


def _check_columns(arrays: dict[str, Any], num_positions: int, layout: Layout) -> None:
    """ValueError unless the arrays over positions are those of a shard of this layout."""
    dtype = "linear16" if "step" in arrays else str(arrays["topk_logits"].dtype)
    expected = position_columns(layout, dtype, "logsumexp" in arrays)
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if found != {name: (dtype, (num_positions, *shape)) for name, (dtype, shape) in expected.items()}:
        raise ValueError("its arrays are not those of a shard")


def _arrays_of_rows() -> tuple[str, ...]:
    return ("row_id", "row_id_offsets", "subset", "tokens_low", "tokens_high", "token_offsets", "position_offsets")
