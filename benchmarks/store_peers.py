"""What a store is compared with: Megatron-LM's layout, copies of memory, plain numpy memory maps and plain files.

store.py measures them beside the store, and says what each claim means.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap

from duet.cache.codec import Layout, encode, position_columns
from duet.cache.manifest import Shard
from duet.cache.record import Rows


def megatron_bytes(rows: Rows, shard_rows: int) -> tuple[int, int]:
    """Raw and zstd bytes of the emulated layout; its ids have 17 bits at most."""
    if rows.topk_ids_NK.max() >= 2**17:
        raise ValueError("its vocabulary ends at 131,072")
    raw = compressed = 0
    for first in range(0, len(rows), shard_rows):
        part = rows[first : first + shard_rows]
        columns = (part.topk_ids_NK.astype(np.uint16), part.topk_ids_NK > 0xFFFF, part.topk_logits_NK)
        data = b"".join(column.tobytes() for column in columns)
        raw += len(data)
        compressed += len(pa.Codec("zstd", compression_level=3).compress(data, asbytes=True))
    return raw + rows.tokens_S.nbytes, compressed + rows.tokens_S.nbytes


def small_pages(num_bytes: int) -> np.ndarray:
    """Touched memory of 4 KiB pages."""
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = 1
    return array


def plain_epoch(columns: dict[str, np.ndarray], orders: list[np.ndarray], per_row: int) -> None:
    """The same batches by plain numpy: an array per column, indexed row by row."""
    for rows in orders:
        taken = {name: column[rows].reshape(-1, column.shape[-1]) for name, column in columns.items()}  # tokens too
        k = taken["topk_low"].shape[-1]
        ids = taken["topk_low"].astype(np.int32)
        ids |= np.unpackbits(taken["topk_high"], axis=1, count=k, bitorder="little").astype(np.int32) << 16
        ids.reshape(len(rows), per_row, k)
        taken["topk_logits"].astype(np.float32).reshape(len(rows), per_row, k)


def memory_maps(folder: Path, rows: Rows, per_row: int) -> dict[str, np.ndarray]:
    """One .npy file per stored column, memory-mapped, [rows, positions, width], and the tokens."""
    layout = Layout(rows.topk_ids_NK.shape[1], 128_256)
    block, _ = encode(rows, layout, "lossless")
    columns = {name: block.columns[name] for name in position_columns(layout, "float16", logsumexp=False)}
    columns = {name: column.reshape(len(rows), per_row, -1) for name, column in columns.items()}
    columns["tokens"] = rows.tokens_S.reshape(len(rows), -1)
    maps = {}
    for name, column in columns.items():
        target = open_memmap(folder / f"{name}.npy", "w+", column.dtype, column.shape)
        target[...] = column
        target.flush()
        maps[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return maps


def plain_files(folder: Path, shards: Sequence[Shard], data: bytes, hashed: bool) -> None:
    """A file per shard, each with the first bytes of `data` and fsync."""
    folder.mkdir()
    for shard in shards:
        with open(folder / shard.name, "wb", buffering=0) as file:
            file.write(data[: shard.bytes])
            if hashed:
                hashlib.sha256(data[: shard.bytes]).digest()
            os.fsync(file.fileno())
