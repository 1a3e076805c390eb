"""What it costs to give a store to another program and to take it back: rates and memory on one core.

`python benchmarks/exchange.py` prints the tables; `--json` prints one object; `--quick` takes little data and says nothing of
value about rates.

Data: that of store.py, k = 64, rows of 256 positions after a question of 32 tokens, 128,256 ids, float16, with a log-sum-exp.

Definitions, each for every format
* `exchange.export_mb_per_s.*`: bytes of the store's shards (4.2 per kept token), in units of 10^6, over the processor's seconds
  in a whole `export_store`, on one core, hashes, writing and reading included; the least of some turns. What the disk takes
  beyond that is not in it: the table has seconds of the clock too. The files that it writes are 1.3 to 2 times as large.
* `exchange.import_mb_per_s.*`: the same bytes over the processor's seconds in a whole `import_store`.
* `exchange.rss_growth_mb`: peak resident memory of a process that exports and imports 10^6 positions, less that of one that
  does 10^5; the largest of all formats.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, on_one_core, parser, reset_peak, seconds, show, status_mb
from store import make_rows, plan_of, write

from duet.cache.exchange import EXCHANGE_FORMATS, export_store, import_store
from duet.cache.location import Folder

VOCAB_SIZE, PER_ROW, MADE = 128_256, 256, 2**16
BOUNDS = {
    **{f"exchange.{way}_mb_per_s.{name}": (">=", 50) for name in EXCHANGE_FORMATS for way in ("export", "import")},
    "exchange.rss_growth_mb": ("<=", 64),
}


def a_store(folder: Path, num_positions: int) -> int:
    """Write it; bytes of its shards."""
    rows = make_rows(min(num_positions, MADE), PER_ROW, VOCAB_SIZE)
    sums_N = rows.topk_logits_NK[:, 0].astype(np.float32) + 1
    return write(
        folder, plan_of(num_positions // PER_ROW, PER_ROW, VOCAB_SIZE), replace(rows, logsumexp_N=sums_N)
    ).shard_bytes


def both_ways(folder: Path, name: str) -> tuple[float, float, float, float]:
    """Seconds of an export and of an import, then the processor's seconds in each."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "back", ignore_errors=True)
    started = time.process_time()
    away_s = seconds(lambda: export_store(Folder(folder / "store"), folder / "out", name))
    between = time.process_time()
    back_s = seconds(lambda: import_store(folder / "out", Folder(folder / "back"), "arrow", "none"))
    return away_s, back_s, between - started, time.process_time() - between


def rates(folder: Path, num_positions: int, turns: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    num_bytes, claims, table = a_store(folder / "store", num_positions), {}, []
    for name in EXCHANGE_FORMATS:
        times = [both_ways(folder, name) for _ in range(turns)]
        away_s, back_s, away_cpu_s, back_cpu_s = (min(found) for found in zip(*times, strict=True))
        claims[f"exchange.export_mb_per_s.{name}"] = num_bytes / away_cpu_s / 1e6
        claims[f"exchange.import_mb_per_s.{name}"] = num_bytes / back_cpu_s / 1e6
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
        table.append({"format": name, "positions": num_positions, "export, clock s": away_s, "import, clock s": back_s})
        table[-1] |= {
            "export, processor s": away_cpu_s,
            "import, processor s": back_cpu_s,
            "bytes / the store's": size / num_bytes,
        }
    return claims, table


def memory(folder: Path, num_positions: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    table = []
    for name in EXCHANGE_FORMATS:
        line: dict[str, Any] = {"format": name}
        for count in (num_positions // 10, num_positions):
            command = [sys.executable, __file__, "--child", name, "--positions", str(count), "--folder", str(folder)]
            line[f"peak MB, {count:.0e}"] = float(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
        small_mb, large_mb = list(line.values())[1:]
        table.append(line | {"growth MB": large_mb - small_mb})
    return {"exchange.rss_growth_mb": max(line["growth MB"] for line in table)}, table


def child(name: str, folder: Path, num_positions: int) -> None:
    """Write a store, export and import it, and print the peak of the latter two."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        a_store(Path(inner) / "store", num_positions)
        gc.collect()
        reset_peak()
        both_ways(Path(inner), name)
        print(status_mb("VmHWM"))


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--folder", type=Path, help="where to write; default: a new one")
    command.add_argument("--child", choices=EXCHANGE_FORMATS, help=argparse.SUPPRESS)
    command.add_argument("--positions", type=int, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    on_one_core()
    if arguments.child:
        child(arguments.child, arguments.folder, arguments.positions)
        return
    num_positions = 2**14 if arguments.quick else 10**6
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-exchange-") as folder:
        claims, table = rates(Path(folder), num_positions, 1 if arguments.quick else 3)
        grown, peaks = memory(Path(folder), num_positions)
    report = {
        "machine": machine("numpy", "pyarrow"),
        "claims": claims | grown,
        "details": {"rates": table, "memory": peaks},
    }
    show(report, BOUNDS, arguments.json)


if __name__ == "__main__":
    main()
