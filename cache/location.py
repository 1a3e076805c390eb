"""Where a store lies: a folder, or a URL (see `bucket.py`). The same few operations on both.

Names are relative to the store, with `/`. What is written appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from duet.cache.bucket import CACHE_BYTES, CACHE_DIR, Remote
from duet.cache.errors import DamagedStore, NotPermitted, UserError
from duet.cache.files import MAX_JSON_BYTES, publishing, sha256_json, sync_dir


class Location(Protocol):
    """A store's folder."""

    def name_of(self, name: str) -> str: ...

    def __truediv__(self, name: str) -> Location: ...

    def names(self) -> list[str]:
        """All files, at any depth; empty where there is no such folder."""
        ...

    def entries(self) -> set[str]:
        """Names of what lies directly in it, files and folders, by one listing; empty where there is no such folder."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of all regular files, at any depth."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders directly in it; UserError where there is no such folder."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, or None where there is none."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is no regular file of that name."""
        ...

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes where it lies."""
        ...

    def open(self, name: str, size: int, sha256: str) -> BufferedReader:
        """A regular file for reading, perhaps from a cache; that it has this size and hash is for the caller to check."""
        ...

    def drop(self, sha256: str) -> None:
        """Forget a cached copy."""
        ...

    def write(self, name: str, data: bytes) -> None: ...

    def move_in(self, path: Path, name: str) -> None:
        """Publish a local file under this name; it is gone from where it was."""
        ...

    def remove(self, name: str) -> None: ...


def location_of(location: str | Path, cache_dir: str = CACHE_DIR, cache_bytes: int = CACHE_BYTES) -> Location:
    """The place that a path or URL names."""
    if not is_url(location):
        return Folder(Path(location))
    check_url(str(location))
    return Remote(str(location).rstrip("/"), Path(cache_dir).expanduser(), cache_bytes)


def is_url(location: str | Path) -> bool:
    return "://" in str(location)


def check_url(url: str) -> None:
    """Refuse a URL that may hold credentials, since we write URLs down. A secret may have `/` in it."""
    if re.search(r"://([^/]*@|.*:.*@|.*[?#])", url):
        shown = re.split("[?#]", re.sub("://.*@", "://…@", url))[0]
        raise UserError(
            f"the URL {shown} holds credentials or a query",
            "give credentials in the environment, and as URL only the folder, e.g. s3://bucket/folder",
        )


class Folder:
    """A store in a folder of a file system, local or shared."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.path / name)

    def name_of(self, name: str) -> str:
        return str(self.path / name)

    def names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(
            os.path.relpath(os.path.join(folder, name), self.path)
            for folder, _, names in os.walk(self.path)
            for name in names
        )

    def entries(self) -> set[str]:
        try:
            return set(os.listdir(self.path))
        except FileNotFoundError:
            return set()
        except PermissionError:
            raise _private(str(self.path)) from None

    def sizes(self) -> dict[str, int]:
        found = {name: self.size(name) for name in self.names()}
        return {name: size for name, size in found.items() if size is not None}

    def folders(self) -> list[str]:
        if not self.path.is_dir():
            raise UserError(f"no such folder: {self.path}", "name a folder of stores, e.g. runs/lab/teacher")
        return sorted(path.name for path in self.path.iterdir() if path.is_dir())

    def read(self, name: str) -> bytes | None:
        if self.size(name) is None:
            return None
        with self._open(name) as file:
            return file.read(MAX_JSON_BYTES + 1)

    def size(self, name: str) -> int | None:
        try:
            found = os.lstat(f"{self.path}/{name}")  # asked most of all: joining paths would take longer than the look
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise _private(self.name_of(name)) from None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def sha256(self, name: str) -> str:
        with self._open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self, name: str, size: int, sha256: str) -> BufferedReader:
        return self._open(name)

    def drop(self, sha256: str) -> None:
        """Nothing is cached."""

    def _open(self, name: str) -> BufferedReader:
        try:
            return os.fdopen(os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except PermissionError:
            raise _private(self.name_of(name)) from None

    def write(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with publishing(path) as temporary:
            temporary.write_bytes(data)

    def move_in(self, path: Path, name: str) -> None:
        os.replace(path, self.path / name)
        sync_dir(self.path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


def _private(name: str) -> NotPermitted:
    return NotPermitted(
        f"cannot read {name}: {os.strerror(errno.EACCES)}",
        "set another store.dir, or ask its owner to let your group read",
    )


MANIFEST = "the manifest"  # or what else says what a file should be


def check_file(
    location: Location, name: str, size: int, sha256: str, hashed: bool = True, whose: str = MANIFEST
) -> str | None:
    """What is wrong with a file, where it lies, that should have this size and hash; None if nothing is."""
    if fault := wrong_size(location, name, location.size(name), size, whose):
        return fault
    digest = location.sha256(name) if hashed else sha256
    return None if digest == sha256 else damaged(location, name, digest, sha256, whose)


def wrong_size(location: Location, name: str, found: int | None, expected: int, whose: str = MANIFEST) -> str | None:
    if found is None:
        return f"{location.name_of(name)} is missing or is not a regular file"
    return None if found == expected else f"{location.name_of(name)} has {found} bytes, {whose} says {expected}"


def damaged(location: Location, name: str, found: str, expected: str, whose: str = MANIFEST) -> str:
    return f"{location.name_of(name)} is damaged: sha256 {found[:16]}…, {whose} says {expected[:16]}…"


def read_attachments(location: Location, attachments: dict[str, str]) -> dict[str, bytes]:
    """The content of these files of a store, each checked against its sha256."""
    found = {name: location.read(name) or b"" for name in attachments}
    for name, raw in found.items():
        if hashlib.sha256(raw).hexdigest() != attachments[name]:
            raise DamagedStore(
                f"{location.name_of(name)} is missing or is not as it was written",
                "`duet cache repair` with the store's config restores it",
            )
    return found


def local_folder(location: Location, folder: str, attachments: dict[str, str]) -> Path:
    """A local folder with the store's attachments of `folder`, each checked; of a remote store, a copy in the local cache."""
    wanted = {name: digest for name, digest in attachments.items() if name.startswith(f"{folder}/")}
    found = read_attachments(location, wanted)
    if isinstance(location, Folder):
        return location.path / folder
    assert isinstance(location, Remote)
    copy = Folder(location.cache_dir / "attachments" / sha256_json(wanted))
    for name, raw in found.items():
        copy.write(name, raw)
    return copy.path / folder
