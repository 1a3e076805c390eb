"""What a store costs: bytes per kept token, read and write rates beside what the machine can do at all, memory.

`make bench-store` prints the tables; `--json` prints one object; `--quick` takes less data and says nothing of value about
rates. All ratios are of two things measured in turns in one run on one core.

Data: k = 64 logits of a bf16 head, sorted, and ids that follow Zipf's law as those of a tokenizer do. A row is a question
of 32 tokens and an answer of 1, 16 or 256 supervised positions.

Definitions
* `raw_bytes_per_token.*`: bytes of all shard files, with questions, answers, ids of rows and offsets, per kept token, at
  256 positions per row.
* `bytes_vs_megatron_layout.*`: the same against the columns that Megatron-LM's offline logits hold for the same data: low 16
  bits as uint16, the 17th as a bool, a 2-byte value, and the int32 tokens of its data set. `zstd`: both sides with zstd at
  level 3, theirs a file per shard, its tokens as they are.
* `read_packed_vs_memcpy`: bytes per second of shuffled batches in stored form, of 64 rows of 256 positions, against copying
  as many bytes between two arrays of ordinary (4 KiB) pages, which is what the file cache and the batches consist of.
* `read_padded_vs_memmap`: decoded int32 ids and float32 logits of the same batches, against plain numpy memory maps of
  the same columns and of int32 tokens, indexed in the same order and decoded with numpy's own `unpackbits` and `astype`.
* `write_vs_file`: bytes per second of a whole store (checks, encoding, sha256, fsync, renames) against writing as many
  bytes to as many files with fsync; medians, since a disk's rate depends on what it did before.
* `rss_growth_mb`: peak resident memory of a process that writes, and of one that reads, 10^7 positions, less that of
  10^5; the larger of the two.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, on_one_core, parser, reset_peak, rounds, seconds, show, status_mb
from store_peers import megatron_bytes, memory_maps, plain_epoch, plain_files, small_pages

from duet.cache.location import Folder
from duet.cache.manifest import Manifest
from duet.cache.plan import Plan
from duet.cache.reader import Store
from duet.cache.record import Rows, offsets_of
from duet.cache.writer import StoreWriter

K = 64
QUESTION = 32  # tokens
SHARD_POSITIONS = 2**16
BATCH_POSITIONS = 2**14
BOUNDS = {
    "store.raw_bytes_per_token.v128k": ("<=", 4.2),
    "store.raw_bytes_per_token.v152k": ("<=", 4.3),
    "store.bytes_vs_megatron_layout.raw": ("<=", 1.0),
    "store.bytes_vs_megatron_layout.zstd": ("<=", 1.0),
    "store.read_packed_vs_memcpy": (">=", 0.2),
    "store.read_padded_vs_memmap": (">=", 0.9),
    "store.zarr_read_positions_per_s": (">=", 0.7e6),
    "store.write_vs_file": (">=", 0.5),
    "store.rss_growth_mb": ("<=", 64),
}


def make_rows(num_positions: int, per_row: int, vocab_size: int, top_k: int = K) -> Rows:
    """Rows as a bf16 head gives them; the same for the same arguments."""
    rng = np.random.default_rng(0)
    count = num_positions // per_row
    ranks = np.exp(rng.uniform(0, np.log(vocab_size - top_k), (num_positions, top_k))).astype(np.int32)
    ids = np.sort(ranks, axis=1) + np.arange(top_k, dtype=np.int32)  # distinct
    ids = np.take_along_axis(ids, rng.random((num_positions, top_k), np.float32).argsort(axis=1), axis=1)
    top = rng.normal(24, 4, (num_positions, 1)).astype(np.float32)
    falls = rng.exponential(4 / np.arange(1, top_k + 1), (num_positions, top_k)).astype(np.float32)
    logits = top - falls.cumsum(axis=1)
    bf16 = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
    num_tokens = count * (QUESTION + per_row)
    return Rows(
        row_ids=[f"{'forget' if row < count // 4 else 'retain'}/{row}" for row in range(count)],
        subsets=(np.arange(count) >= count // 4).astype(np.uint8),
        token_offsets=offsets_of([QUESTION + per_row] * count),
        tokens_S=np.exp(rng.uniform(0, np.log(vocab_size), num_tokens)).astype(np.int32),
        position_offsets=offsets_of([per_row] * count),
        topk_ids_NK=ids,
        topk_logits_NK=bf16.astype(np.float16),
    )


def plan_of(rows: int, per_row: int, vocab_size: int, **more: Any) -> Plan:
    subsets = {"forget": rows // 4, "retain": rows - rows // 4}
    return Plan(subsets, max(1, SHARD_POSITIONS // per_row), K, per_row, vocab_size, {"benchmark": 1}, **more)


def write(folder: Path, plan: Plan, rows: Rows) -> Manifest:
    """Write a store of the plan's size from `rows`, taken again and again, a shard's worth at a time."""
    shutil.rmtree(folder, ignore_errors=True)
    with StoreWriter(Folder(folder), plan) as writer:
        while shard := writer.claim():
            first = shard.range.start % (len(rows) - len(shard.range) + 1)
            shard.append(rows[first : first + len(shard.range)])
            writer.publish(shard)
        return writer.finalise({})


def sizes(folder: Path, num_positions: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    claims, table = {}, []
    for (name, vocab_size), per_row in itertools.product({"v128k": 128_256, "v152k": 151_936}.items(), (256, 16, 1)):
        rows = make_rows(num_positions, per_row, vocab_size)
        plan = plan_of(len(rows), per_row, vocab_size)
        kept = num_positions * K
        found = {
            f"{fmt}, {compression}": write(
                folder, plan_of(len(rows), per_row, vocab_size, format=fmt, compression=compression), rows
            ).shard_bytes
            for fmt, compression in itertools.product(("arrow", "zarr"), ("none", "lz4", "zstd"))
        }
        line: dict[str, Any] = {"vocabulary": name, "positions per row": per_row}
        line |= {key: found[key] / kept for key in found}
        line["u32 + fp32"] = 8.0
        if name == "v128k":
            raw, compressed = megatron_bytes(rows, plan.shard_rows)
            line |= {"megatron": raw / kept, "megatron, zstd": compressed / kept}
            if per_row == 256:
                claims["store.bytes_vs_megatron_layout.raw"] = found["arrow, none"] / raw
                claims["store.bytes_vs_megatron_layout.zstd"] = found["arrow, zstd"] / compressed
        else:
            line |= {"megatron": "cannot", "megatron, zstd": "cannot"}
        if per_row == 256:
            claims[f"store.raw_bytes_per_token.{name}"] = found["arrow, none"] / kept
        table.append(line)
    return claims, table


def epoch(store: Store, batch_rows: int, padded: bool) -> None:
    order = store.order(seed=0)
    for _, block in itertools.islice(store.batches(order, batch_rows), -(-order.num_slots // batch_rows)):
        if padded:
            block.padded()


def row_orders(store: Store, batch_rows: int) -> list[np.ndarray]:
    """Numbers of each batch's rows."""
    order = store.order(seed=0)
    blocks = itertools.islice(store.batches(order, batch_rows), -(-order.num_slots // batch_rows))
    return [np.array([int(row_id.split("/")[1]) for row_id in block.row_ids.to_pylist()]) for _, block in blocks]


def reading(folder: Path, num_positions: int, repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    claims, table = {}, []
    for per_row in (256, 16, 1):
        rows = make_rows(num_positions, per_row, 128_256)
        manifest = write(folder / "store", plan_of(len(rows), per_row, 128_256), rows)
        zarr_bytes = write(
            folder / "zarr", plan_of(len(rows), per_row, 128_256, format="zarr", compression="zstd"), rows
        ).shard_bytes
        store, zarr = Store(Folder(folder / "store")), Store(Folder(folder / "zarr"))
        hashing = seconds(lambda store=store: epoch(store, len(store), padded=False))  # the first use hashes
        batch_rows = BATCH_POSITIONS // per_row
        orders = row_orders(store, batch_rows)
        (folder / "plain").mkdir(exist_ok=True)
        maps = memory_maps(folder / "plain", rows, per_row)
        source, target = small_pages(manifest.shard_bytes), small_pages(manifest.shard_bytes)
        huge = np.ones(manifest.shard_bytes, np.uint8), np.ones(manifest.shard_bytes, np.uint8)
        times = rounds(
            {
                "packed": lambda store=store, n=batch_rows: epoch(store, n, padded=False),
                "memcpy": lambda a=target, b=source: np.copyto(a, b),
                "memcpy, huge pages": lambda pair=huge: np.copyto(*pair),
                "padded": lambda store=store, n=batch_rows: epoch(store, n, padded=True),
                "numpy memmap": lambda m=maps, o=orders, p=per_row: plain_epoch(m, o, p),
                "sha256": lambda f=folder, m=manifest: [
                    hashlib.sha256((f / "store" / s.name).read_bytes()).digest() for s in m.shards
                ],
            },
            repeats,
        )
        times |= rounds({"zarr, zstd": lambda store=zarr, n=batch_rows: epoch(store, n, padded=False)}, 2)
        if per_row == 256:
            claims = {
                "store.read_packed_vs_memcpy": times["memcpy"] / times["packed"],
                "store.read_padded_vs_memmap": times["numpy memmap"] / times["padded"],
                "store.zarr_read_positions_per_s": num_positions / times["zarr, zstd"],
            }
        table.append({"positions per row": per_row, "rows per batch": batch_rows})
        table[-1] |= {f"{name}, M positions/s": num_positions / time / 1e6 for name, time in times.items()}
        table[-1] |= {
            "first epoch with hashing": num_positions / hashing / 1e6,
            "zarr bytes / arrow": zarr_bytes / manifest.shard_bytes,
        }
        del maps
    return claims, table


def writing(folder: Path, num_positions: int, repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    rows = make_rows(min(num_positions, 2**18), 256, 128_256)
    plan = plan_of(num_positions // 256, 256, 128_256)
    shards = write(folder / "store", plan, rows).shards
    data = np.random.default_rng(0).bytes(max(shard.bytes for shard in shards))

    works: dict[str, Callable[[], Any]] = {
        "store": lambda: write(folder / "store", plan, rows),
        "plain files": lambda: plain_files(folder / "plain", shards, data, hashed=False),
        "plain files and sha256": lambda: plain_files(folder / "hashed", shards, data, hashed=True),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        names = list(works)
        for name in names[turn % 3 :] + names[: turn % 3]:  # what the disk did just before matters
            for target in folder.iterdir():
                shutil.rmtree(target)
            os.sync()
            found[name].append(seconds(works[name]))
    num_bytes = sum(shard.bytes for shard in shards)
    table = [
        {"what": name, **{f"{label} GB/s": num_bytes / time / 1e9 for label, time in spread(times).items()}}
        for name, times in found.items()
    ]
    times = {name: spread(times)["median"] for name, times in found.items()}
    return {"store.write_vs_file": times["plain files"] / times["store"]}, table


def spread(times: list[float]) -> dict[str, float]:
    return {"best": min(times), "median": statistics.median(times), "worst": max(times)}


def peak_mb(task: str, folder: Path, num_positions: int) -> float:
    """Peak resident memory of a process of its own, in MB."""
    command = [sys.executable, __file__, "--child", task, "--positions", str(num_positions), "--folder", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(task: str, folder: Path, num_positions: int) -> None:
    """Do the task and print the peak. The kernel's own figure is reset first: it would be that of making the rows."""
    rows = make_rows(SHARD_POSITIONS, 16, 128_256)
    gc.collect()
    reset_peak()
    if task == "write":
        write(folder, plan_of(num_positions // 16, 16, 128_256), rows)
    else:
        epoch(Store(Folder(folder)), BATCH_POSITIONS // 16, padded=True)
    print(status_mb("VmHWM"))


def memory(folder: Path, large: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    table = []
    for task in ("write", "read"):
        small_mb, large_mb = (peak_mb(task, folder / f"{count}", count) for count in (10**5, large))
        table.append({"task": task, "peak MB, 10^5": small_mb, f"peak MB, {large:.0e}": large_mb})
        table[-1]["growth MB"] = large_mb - small_mb
    return {"store.rss_growth_mb": max(line["growth MB"] for line in table)}, table


def main() -> None:
    command = parser(__doc__)
    command.add_argument(
        "--folder", type=Path, help="where to write, e.g. on the disk to be measured; default: a new one"
    )
    command.add_argument("--child", choices=["write", "read"], help=argparse.SUPPRESS)
    command.add_argument("--positions", type=int, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    on_one_core()
    if arguments.child:
        child(arguments.child, arguments.folder, arguments.positions)
        return
    claims: dict[str, float] = {}
    details: dict[str, Any] = {}
    few = arguments.quick
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-store-") as folder:
        for title, measure, *sized in (
            ("reading", reading, 2**15 if few else 2**19, 1 if few else 5),
            ("writing", writing, 2**17 if few else 2**22, 1 if few else 9),
            ("memory", memory, 2 * 10**5 if few else 10**7),
            ("bytes per kept token", sizes, 2**15 if few else 2**18),
        ):
            path = Path(folder) / title.partition(" ")[0]
            path.mkdir()
            found, details[title] = measure(path, *sized)
            claims |= found
            shutil.rmtree(path)
    report = {"machine": machine("numpy", "pyarrow", "zarr"), "claims": claims, "details": details}
    show(report, BOUNDS, arguments.json)


if __name__ == "__main__":
    main()
