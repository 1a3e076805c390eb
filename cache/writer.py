"""Writing a store: plan first, shards in any order by any number of processes, manifest last. Any step can be repeated.

A shard is written when its side file `shard-NNNNN.json` exists. It is published by rename out of the writer's lease, the
shard before it, so a crash costs at most the shard in progress, and a writer that lost its lease publishes nothing. Whoever
writes the manifest reads every side file and refuses one whose shard has not the size that it names.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from duet.cache import arrow_format, zarr_format
from duet.cache.claims import Claim, Claims
from duet.cache.codec import MAX_VOCAB_SIZE, VALUE_DTYPES, Block, encode, of_one_dtype, position_columns
from duet.cache.errors import DamagedStore, UserError
from duet.cache.files import (
    TEMPORARY,
    NotAsWritten,
    json_bytes,
    sha256_file,
    sync_dir,
    sync_file,
    telling_of_full_disks,
)
from duet.cache.leases import Clock, Lease, LeaseLost, Leases
from duet.cache.location import Folder, Location
from duet.cache.manifest import MANIFEST_NAME, Manifest, Shard, manifest_of, read_entry, read_manifest
from duet.cache.plan import PLAN_NAME, Plan, begin
from duet.cache.record import Rows, check_draws, check_rows, concat_rows, counts_of

LEASES_NAME = "leases"
LEASE_S = 120.0
FORMAT_WRITERS = {"arrow": arrow_format.write_shard, "zarr": zarr_format.write_shard}


class ShardWriter:
    """The rows of one shard, taken by this process: filled with `append` in plan order, then handed to `publish`."""

    def __init__(self, plan: Plan, claim: Claim) -> None:
        self.claim, self.index, self.lease = claim, claim.index, claim.lease
        self.range = plan.shard_range(claim.index)
        self.num_rows, self.longest, self.error = 0, 0, 0.0
        self._plan = plan
        self._waiting: list[Rows] = []  # fewer rows than a block
        self._blocks: list[Block] = []

    def append(self, rows: Rows) -> None:
        """Check and encode the next rows; raises UserError, naming the row, for what cannot be stored."""
        size = self._plan.block_rows
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            check_rows(part, self._plan.top_k, self._plan.max_positions, self._plan.vocab_size)
            check_draws(part, self._plan.layout.drawn)
            self.longest = max(self.longest, int(counts_of(part.token_offsets).max()))
            self._waiting.append(part)
            while sum(map(len, self._waiting)) >= size:
                self._encode(size)
        self.num_rows += len(rows)

    def take_over(self, blocks: list[Block], entry: Shard) -> None:
        """All blocks of the same shard of another store, with what that store knows of them."""
        self._blocks, self.num_rows = blocks, entry.rows
        self.longest, self.error = entry.longest, entry.value_error

    def _encode(self, num_rows: int) -> None:
        waiting = concat_rows(self._waiting)
        block, error = encode(waiting[:num_rows], self._plan.layout, self._plan.values)
        self._blocks.append(block)
        self.error = max(self.error, error)
        self._waiting = [waiting[num_rows:]] if len(waiting) > num_rows else []

    def finish(self) -> list[Block]:
        """The blocks of the whole shard, of one value dtype: float32 for all where a lossless one needed it."""
        if self.num_rows != len(self.range):
            raise ValueError(f"shard {self.index} has {self.num_rows} rows, the plan says {len(self.range)}")
        if self._waiting:
            self._encode(self._plan.block_rows)
        return list(of_one_dtype(self._blocks))


class StoreWriter:
    """One process's hand on a store: it claims shards that nobody has, publishes them, and in the end the manifest."""

    def __init__(
        self,
        location: Location,
        plan: Plan,
        attachments: dict[str, bytes] | None = None,
        lease_s: float = LEASE_S,
        clock: Clock | None = None,
    ) -> None:
        """Write the plan, or check that the one there is the same; a place with anything else in it is refused.

        `attachments` are further files of the store (the teacher's tokenizer), by name.
        """
        if plan.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"a vocabulary of {plan.vocab_size} ids: at most {MAX_VOCAB_SIZE} can be stored", "use another model"
            )
        self.location = location
        with telling_of_full_disks(Path(location.name_of(PLAN_NAME)), plan.num_shards * _most_bytes(plan)):
            self.plan = begin(location, plan, attachments or {})
        self._folder = location.path if isinstance(location, Folder) else None
        self._leases = Leases(self._folder / LEASES_NAME, lease_s, clock) if self._folder else None
        self._claims = Claims(location, self.plan, self._leases)
        self._background = ThreadPoolExecutor(max_workers=2, thread_name_prefix="publish")
        self._publishing: list[Future[None]] = []
        self._written: dict[int, Shard] = {}  # by this process, or read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.shutdown(wait=True)
        self._claims.close()

    def missing(self) -> list[int]:
        """Indices of the shards that are not written, in plan order."""
        return self._claims.missing()

    def claim(self) -> ShardWriter | None:
        """A shard that is neither written nor held by a living writer; None if there is none now."""
        while self._publishing and self._publishing[0].done():
            self._publishing.pop(0).result()
        needed = self._needed_bytes(self._claims.num_missing())
        with telling_of_full_disks(Path(self.location.name_of(LEASES_NAME)), needed):
            claim = self._claims.take()
        return ShardWriter(self.plan, claim) if claim else None

    def _needed_bytes(self, num_shards: int) -> int:
        """Of shards to come: as many as the written ones have, or what they can have at most where none is written."""
        sizes = [shard.bytes for shard in list(self._written.values())]
        return num_shards * (sum(sizes) // len(sizes) if sizes else _most_bytes(self.plan))

    def publish(self, shard: ShardWriter) -> None:
        """Write a full shard in the background; what goes wrong is raised by one of the next calls or by `wait`.

        While the last shard is written, the one before may still be waiting for the disk. A shard whose lease was lost is
        thrown away: another process writes it.
        """
        blocks = shard.finish()
        while len(self._publishing) > 1:
            self._publishing.pop(0).result()
        self._publishing.append(self._background.submit(self._publish, shard, blocks))

    def release(self, shard: ShardWriter) -> None:
        """Give an unfinished shard back."""
        self._claims.release(shard.claim)

    def wait(self) -> None:
        """Until all published shards are safe; raises what went wrong with one."""
        while self._publishing:
            self._publishing.pop(0).result()

    def _publish(self, shard: ShardWriter, blocks: list[Block]) -> None:
        """Write the shard's file and its side file, make them durable and move them in, in this order."""
        name, side = self.plan.shard_name(shard.index), self.plan.side_name(shard.index)
        needed = sum(block.num_bytes for block in blocks) * (self.plan.num_shards - len(self._written))
        directory = shard.lease.path if shard.lease else Path(tempfile.mkdtemp(prefix="duet-"))
        try:
            with telling_of_full_disks((self._folder or directory) / name, needed):
                entry = self._write(directory / name, blocks, shard)
                blocks.clear()  # their memory is the next shard's
                (directory / side).write_bytes(json_bytes(entry.as_json()))
                for file in (name, side):
                    sync_file(directory / file)
                if not shard.lease and self.location.size(side) is not None:
                    return  # another writer was quicker, and a manifest may have the hash of its bytes
                for file in (name, side):
                    if shard.lease and self._folder:
                        shard.lease.publish(file, self._folder / file)
                    else:
                        self.location.move_in(directory / file, file)
                if self._folder:
                    sync_dir(self._folder)
            self._written[shard.index] = entry
            self._claims.wrote(shard.index)
        except (LeaseLost, FileNotFoundError):  # our folder goes when somebody takes over
            if not shard.lease or shard.lease.path.exists():
                raise
        finally:
            self.release(shard)
            if not shard.lease:
                shutil.rmtree(directory)

    def _write(self, path: Path, blocks: list[Block], shard: ShardWriter) -> Shard:
        FORMAT_WRITERS[self.plan.format](path, blocks, self.plan.compression)
        return Shard(
            name=path.name,
            rows=shard.num_rows,
            positions=sum(block.num_positions for block in blocks),
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
            value_dtype=blocks[0].value_dtype,
            value_error=shard.error,
            longest=shard.longest,
            logsumexp="logsumexp" in blocks[0].columns,
        )

    def finalise(self, environment: dict[str, Any], wait_s: float = 0.2) -> Manifest:
        """Publish the manifest once every shard is there; of many processes one does it, and all return the same."""
        self.wait()
        if missing := self.missing():
            raise ValueError(f"cannot finalise {self.location}: shards {missing} are missing")
        while self.location.size(MANIFEST_NAME) is None:
            if self._leases is None or self._folder is None:
                data = self._manifest(environment)
                with telling_of_full_disks(Path(self.location.name_of(MANIFEST_NAME)), len(data)):
                    self.location.write(MANIFEST_NAME, data)
            elif not self._finalise_alone(environment, self._leases, self._folder):
                time.sleep(wait_s)
        self._tidy()
        return read_manifest(self.location)

    def _finalise_alone(self, environment: dict[str, Any], leases: Leases, folder: Path) -> bool:
        """Unless somebody else is at it."""
        with telling_of_full_disks(folder / MANIFEST_NAME):
            if lease := leases.acquire("manifest"):
                try:
                    self._publish_manifest(environment, lease, folder)
                finally:
                    leases.release(lease)
        return lease is not None

    def _manifest(self, environment: dict[str, Any]) -> bytes:
        """Of all shards, each of which is read once; damaged ones are a UserError and are no longer there."""
        damaged = []
        for index in range(self.plan.num_shards):
            shard = self._written.get(index) or written_shard(self.location, self.plan, index)
            if shard:
                self._written[index] = shard
            else:
                damaged.append(self.plan.shard_name(index))
                self.location.remove(self.plan.side_name(index))
        if damaged:
            raise DamagedStore(
                f"{len(damaged)} shards are not as they were written, the first is {self.location.name_of(damaged[0])}",
                "run the same command again: they are written again",
            )
        shards = [self._written[index] for index in range(self.plan.num_shards)]
        return json_bytes(manifest_of(self.plan, shards, environment).as_json())

    def _publish_manifest(self, environment: dict[str, Any], lease: Lease, folder: Path) -> None:
        """Unless there is one, or somebody took over."""
        if self.location.size(MANIFEST_NAME) is not None:
            return
        data = self._manifest(environment)
        try:
            with telling_of_full_disks(folder / MANIFEST_NAME, len(data)):
                (lease.path / MANIFEST_NAME).write_bytes(data)
                sync_file(lease.path / MANIFEST_NAME)
                lease.publish(MANIFEST_NAME, folder / MANIFEST_NAME)
                sync_dir(folder)
        except (LeaseLost, FileNotFoundError):
            if lease.path.exists():
                raise

    def _tidy(self) -> None:
        """Remove what killed writers left in a complete store; its leases' folder goes last, and says that it was done."""
        if self._leases and self._leases.dir.exists():
            with suppress(PermissionError):  # files that others own harm no reader
                for name in filter(TEMPORARY.fullmatch, self.location.names()):
                    self.location.remove(name)
                self._leases.tidy()


def written_shard(location: Location, plan: Plan, index: int) -> Shard | None:
    """The shard's entry if its file has the size that was written, else None: the shard is rewritten."""
    try:
        shard = read_entry(location, plan, index)
    except NotAsWritten:
        return None
    return shard if shard and location.size(shard.name) == shard.bytes else None


def _most_bytes(plan: Plan) -> int:
    """Bytes of a shard with every response as long as it can be, but for its tokens."""
    value_dtype = plan.values if plan.values in VALUE_DTYPES else "float32"
    columns = position_columns(plan.layout, value_dtype, logsumexp=True)
    per_position = sum(dtype.itemsize * math.prod(shape) for dtype, shape in columns.values())
    return min(plan.shard_rows, plan.rows) * plan.max_positions * per_position
