"""A user's file as text, or two lines that say what it is instead: a Git LFS pointer, a web page, a spreadsheet, UTF-16.

Every reader of users' files begins here, so that the fault that they all share is told the same way everywhere.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from duet.cache.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how one begins
_CALL_IT = "give the file the ending of its kind"
_UNPACK = "unpack it"
_OTHERS = (  # what a file begins with, what it is then, and what to do
    (
        LFS_POINTER,
        "a Git LFS pointer, not the file itself",
        "fetch the file: git lfs pull",
    ),
    (b"PAR1", "a Parquet file", f"{_CALL_IT}, .parquet"),
    (b"ARROW1", "an Arrow file", "save it as Parquet, with pyarrow.parquet.write_table"),
    (
        b"PK\x03\x04",
        "a ZIP archive, as a spreadsheet (.xlsx) is one",
        f"save a spreadsheet as CSV UTF-8; else {_UNPACK}",
    ),
    (b"\xd0\xcf\x11\xe0", "an old Office file, such as a spreadsheet (.xls)", "save it as CSV UTF-8"),
    (b"\x1f\x8b", "compressed with gzip", f"{_UNPACK}: gunzip"),
    (b"BZh", "compressed with bzip2", f"{_UNPACK}: bunzip2"),
    (b"\xfd7zXZ", "compressed with xz", f"{_UNPACK}: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", f"{_UNPACK}: unzstd"),
    (b"%PDF-", "a PDF file", "export its questions as text"),
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"<!doctype", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
    (b"<?xml", "XML, perhaps a server's refusal", "look into it, and download the file again"),
)
_HEAD_BYTES = 512
_FAULTS = re.compile("[\\0\ud800-\udfff]")


def refuse_other_kind(head: bytes, path: Path | str, where: str) -> None:
    """UserError if a file that begins with `head` is, by its first bytes, something else than its name says."""
    begins = head[:_HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for first, what, hint in _OTHERS:
        if begins.startswith(first.lower()):
            raise UserError(f"{where}: {path} is {what}", hint)


def bytes_of(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}", "check the file and its mode") from None


def text_of(path: Path, where: str) -> str:
    """A file's text, which must be UTF-8; a byte-order mark is dropped. UserError with the line of the first other byte."""
    raw = bytes_of(path, where)
    refuse_other_kind(raw, path, where)
    name = shlex.quote(str(path))
    if wide := _wide_encoding(raw[:_HEAD_BYTES]):
        raise UserError(
            f"{where}: {path}, line 1 is not UTF-8 (it looks like {wide})",
            f"save it as UTF-8, for example: iconv -f {wide} -t UTF-8 {name} > utf8{path.suffix}",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}: {path}, line {line} is not UTF-8 (byte {raw[error.start]:#04x})",
            f"save it as UTF-8; if it is of a Western Windows: iconv -f CP1252 -t UTF-8 {name} > utf8{path.suffix}",
        ) from None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-32 or UTF-16 as iconv calls it, by a byte-order mark or by the zeros beside a first ASCII character."""
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    return {(False, True): "UTF-16LE", (True, False): "UTF-16BE"}.get((head[:1] == b"\0", head[1:2] == b"\0"))


def fault_of(text: str) -> str | None:
    """What makes a text one that no model can be asked: half a surrogate pair, or a NUL character. None if nothing does."""
    found = _FAULTS.search(text)
    if found is None:
        return None
    at, character = found.start(), found[0]
    if character == "\0":
        return f"holds a NUL character (character {at})"
    return f"holds half of a surrogate pair (\\u{ord(character):04x}, character {at})"


FAULT_HINT = "a text was cut within a character, or its encoding was misread: write the whole character there"
