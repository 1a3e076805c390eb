"""A store's location on object storage: any URL that fsspec knows, such as `s3://bucket/folder`, with a local cache.

Whatever goes wrong with the storage is a UserError that names the URL.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from duet.cache.errors import NotPermitted, UserError
from duet.cache.files import MAX_JSON_BYTES, publishing

CACHE_DIR = "~/.cache/duet"
CACHE_BYTES = 20 * 10**9


class Remote:
    """A store on object storage, through fsspec. Shards are read through a local cache of bounded size, keyed by sha256."""

    def __init__(self, url: str, cache_dir: Path, cache_bytes: int) -> None:
        self.url, self.cache_dir, self._cache_bytes = url, cache_dir, cache_bytes
        protocol = url.split("://", maxsplit=1)[0]
        try:
            import fsspec

            self._fs: Any = fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url}: {error}", f"install what fsspec needs for {protocol}://, e.g. pip install 'duet-unlearn[s3]'"
            ) from None

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}", self.cache_dir, self._cache_bytes)

    def name_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        return sorted(self.sizes())

    def entries(self) -> set[str]:
        return {name.partition("/")[0] for name in self.names()}

    def sizes(self) -> dict[str, int]:
        found: dict[str, dict[str, Any]] = {}
        with _explaining(self.url), suppress(FileNotFoundError):
            found = self._fs.find(self.url, detail=True)
        sizes = {self._relative(path): info["size"] for path, info in found.items()}
        return {name: size for name, size in sizes.items() if name and name[-1] != "/"}  # S3 consoles write "folder/"

    def folders(self) -> list[str]:
        with _explaining(self.url):
            found = self._fs.ls(self.url, detail=True)
        return sorted(self._relative(info["name"]) for info in found if info["type"] == "directory")

    def _relative(self, path: str) -> str:
        return path[len(self._fs._strip_protocol(self.url)) + 1 :]

    def read(self, name: str) -> bytes | None:
        url = self.name_of(name)
        with _explaining(url), suppress(FileNotFoundError), self._fs.open(url, "rb") as file:
            return file.read(MAX_JSON_BYTES + 1)
        return None

    def size(self, name: str) -> int | None:
        with _explaining(self.name_of(name)), suppress(FileNotFoundError):
            found = self._fs.info(self.name_of(name))
            return found["size"] if found["type"] == "file" else None
        return None

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with _explaining(self.name_of(name)), self._fs.open(self.name_of(name), "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
        return digest.hexdigest()

    def open(self, name: str, size: int, sha256: str) -> BufferedReader:
        path = self.cache_dir / sha256
        if file := _cached(path, size):
            return file
        with _locked(self.cache_dir):
            if file := _cached(path, size):  # another process was quicker
                return file
            self._make_room(size)
            with publishing(path) as temporary:
                with _explaining(self.name_of(name)):
                    self._fs.get_file(self.name_of(name), str(temporary))
                return open(temporary, "rb")

    def drop(self, sha256: str) -> None:
        with _locked(self.cache_dir):
            (self.cache_dir / sha256).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for longest until `size` more bytes fit; one larger than all is let in."""
        for path in self.cache_dir.glob(".*.tmp"):  # of a process that was killed: we hold the lock
            path.unlink(missing_ok=True)
        files = [(path, path.stat()) for path in self.cache_dir.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
        total = sum(found.st_size for _, found in files)
        for path, found in sorted(files, key=lambda file: file[1].st_atime_ns):
            if total + size <= self._cache_bytes:
                return
            path.unlink(missing_ok=True)
            total -= found.st_size

    def write(self, name: str, data: bytes) -> None:
        with _explaining(self.name_of(name)):
            self._fs.pipe_file(self.name_of(name), data)

    def move_in(self, path: Path, name: str) -> None:
        with _explaining(self.name_of(name)):
            self._fs.put_file(str(path), self.name_of(name))
        path.unlink()

    def remove(self, name: str) -> None:
        if self.size(name) is not None:
            with _explaining(self.name_of(name)):
                self._fs.rm_file(self.name_of(name))


@contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Turn what a file system of fsspec raises into a UserError: each has errors of its library's own. Full disks pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = f"not found: {reason}"
        kind = NotPermitted if isinstance(error, PermissionError) else UserError
        raise kind(
            f"{url}: {reason}",
            "check that the bucket exists, and the endpoint and credentials in the environment, e.g. AWS_ENDPOINT_URL",
        ) from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One at a time, thread or process, fills the local cache: its size stays bounded and nothing is fetched twice."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems, as they are often mounted
            raise UserError(
                f"store.cache_dir: {directory} lies on a file system without locks: {os.strerror(error.errno or 0)}",
                "set store.cache_dir to a folder on a local disk, e.g. /tmp/duet",
            ) from error
        yield


def _cached(path: Path, size: int) -> BufferedReader | None:
    """The cached file, marked as used now, or None where there is none of this size. Once open it can be evicted."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    found = os.fstat(file.fileno())
    if found.st_size != size:
        file.close()
        return None
    os.utime(file.fileno(), ns=(time.time_ns(), found.st_mtime_ns))  # the time of change stays: the reader asks for it
    return file
