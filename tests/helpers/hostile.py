"""Shards of somebody who knows how to sign a manifest, read in a process of their own: a crash of it would be noticed.

    python hostile.py FOLDER FORMAT COMPRESSION COUNT SEED

Changes up to eight bytes of a shard, signs it, reads the store; prints how many were {"read", "refused"}.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from support import make_plan, make_rows, write_store

from duet.cache.errors import UserError
from duet.cache.files import json_bytes, sha256_json
from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.reader import Store

VOCAB_SIZE = 151_936


def signed(manifest: dict[str, Any], raw: bytes) -> bytes:
    """The manifest that names these bytes as its first shard."""
    entry = {**manifest["shards"][0], "sha256": hashlib.sha256(raw).hexdigest()}
    fields = {key: value for key, value in manifest.items() if key != "sha256"} | {
        "shards": [entry, *manifest["shards"][1:]]
    }
    return json_bytes({**fields, "sha256": sha256_json(fields)})


def outcome(location: Folder) -> str:
    try:
        store = Store(location)
        for rows in store.rows():
            assert len(rows.row_ids) == len(rows)
        for _, block in itertools.islice(store.batches(store.order(0), 4), 3):
            block.padded()
    except UserError as error:
        return "refused" if error.hint else "refused without a hint"
    return "read"


def main(folder: Path, fmt: str, compression: str, count: int, seed: int) -> Counter[str]:
    rows = make_rows(range(10), None, forget=4, vocab_size=VOCAB_SIZE)
    write_store(folder, make_plan(10, 4, format=fmt, compression=compression, vocab_size=VOCAB_SIZE), rows)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    shard = folder / manifest["shards"][0]["name"]
    good, rng, found = shard.read_bytes(), random.Random(seed), Counter()
    for _ in range(count):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
        shard.write_bytes(raw)
        (folder / MANIFEST_NAME).write_bytes(signed(manifest, bytes(raw)))
        found[outcome(Folder(folder))] += 1
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
