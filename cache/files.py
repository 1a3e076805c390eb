"""Publishing files so that a crash at any moment leaves the old file or the new one, never half of one; hashes; JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from duet.cache.errors import DamagedStore, NotPermitted, UserError

MAX_JSON_BYTES = 256 * 2**20  # a manifest of a million shards
TEMPORARY = re.compile(r"(.*/)?\..*\.tmp")  # what a killed `publishing` leaves
NOT_WRITABLE_HINT = (
    "name a folder of your own (for runs: runs_dir, for a store: store.dir), or ask its owner to let your group write"
)
MAKE_SPACE_HINT = "make space and run the same command again: it goes on from there"
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(UserError):
    """No space left for a file."""


class NotAsWritten(DamagedStore):
    """A file that describes a store is not as it was written: `duet cache repair` can replace it."""


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # two containers may both be process 1
    try:
        with telling_of_full_disks(path):
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_dir(path.parent)
    finally:
        with suppress(OSError):  # of a folder that cannot be written: what was raised above says so
            temporary.unlink(missing_ok=True)


@contextmanager
def publishing_dir(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends well, flush its files and put it in `path`'s place.

    Whoever the umask lets read the folder may read its files: safetensors writes files for their owner alone. `new`: what
    came to be in `path`'s place meanwhile stays, and is a UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with telling_of_full_disks(path):
        temporary.mkdir(parents=True)
        readable = temporary.stat().st_mode & 0o666
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                if readable & ~(mode := stat.S_IMODE(file.stat().st_mode)):
                    with suppress(PermissionError):  # a file system that has no modes
                        file.chmod(mode | readable)
                sync_file(file)
        if new and os.path.lexists(path):
            raise UserError(
                f"{path} was not there before, and is now",
                f"all is written in {temporary}: move it to a folder of your choice",
            )
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        sync_dir(path.parent)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_dir(directory: Path) -> None:
    """Make a rename in this directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def telling_of_full_disks(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a DiskFull that names the path and, where known, the space needed.

    And a write that is not allowed into NotPermitted.
    """
    needed = f", about {needed_bytes / 1e6:.2f} MB are needed" if needed_bytes else ""
    try:
        yield
    except DiskFull as error:
        raise DiskFull(error.what + needed, error.hint) from error
    except OSError as error:
        if error.errno in NOT_ALLOWED:
            raise NotPermitted(f"cannot write {path}: {os.strerror(error.errno)}", NOT_WRITABLE_HINT) from error
        if error.errno not in NO_ROOM:
            raise
        raise DiskFull(
            f"cannot write {path}: {os.strerror(error.errno)}; {free_bytes(path.parent) / 1e6:.2f} MB are free{needed}",
            MAKE_SPACE_HINT,
        ) from error


def is_writable(folder: Path) -> bool:
    """Whether this process may make files in a folder, or where that is not there, in the one that it would be made in."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def free_bytes(folder: Path) -> int:
    """Where a folder lies or would be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def publish_json(path: Path, value: Any) -> None:
    with publishing(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """How we write JSON files: the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parse one of Duet's JSON files; a damaged one is a UserError that names it."""
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), str(path))


def parse_json(raw: bytes, name: str) -> Any:
    """Parse JSON from `name`; what is too large, too deep or no JSON is a UserError."""
    hint = "the file is damaged: restore it or write it again"
    if len(raw) > MAX_JSON_BYTES:
        raise UserError(f"{name} is larger than {MAX_JSON_BYTES} bytes", hint)
    try:
        return json.loads(raw.decode())
    except RecursionError:
        raise UserError(f"{name} is nested too deeply", hint) from None
    except ValueError as error:  # no UTF-8, no JSON, a number of too many digits
        raise UserError(f"{name} is not valid JSON: {error}", hint) from None


def signed(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """The fields and, as `key`, the hash of their canonical JSON: a changed byte is noticed."""
    return {**fields, key: sha256_json(fields)}


def read_signed(raw: bytes, name: str, key: str, hint: str, unsigned: bool = False) -> dict[str, Any]:
    """The fields that `signed` was given; NotAsWritten, with this hint, unless every byte is as `json_bytes` wrote it.

    `unsigned`: a file without `key` is taken, of which only the form can be checked.
    """
    try:
        value = parse_json(raw, name)
    except UserError as error:
        raise NotAsWritten(error.what, hint) from error
    fields = {field: found for field, found in value.items() if field != key} if isinstance(value, dict) else {}
    try:
        expected = sha256_json(fields)
        stated = value.get(key, expected if unsigned else None) if fields else None
        if stated == expected and raw == json_bytes(value):
            return fields
    except (ValueError, RecursionError):  # NaN, half a surrogate pair, too deep: we write none of these
        pass
    raise NotAsWritten(f"{name} is not as it was written", hint)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. The input of every hash we take of settings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
