"""The texts of a sample, kept in a file as they are drawn: a sample that is stopped at any moment goes on with them.

Its first line says what the texts depend on; each other line is a try: its number, its text, and whether that came to an end.
"""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publishing, telling_of_full_disks

Text = tuple[str, bool]


class KeptTries(UserDict[int, Text]):
    """Tries by their numbers; one that is set is on its way to the disk, as a line in one write."""

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        """Those that are in the file, but for a line that was cut off; UserError where it was begun `of` other things."""
        super().__init__()
        self._path = path
        header = json.dumps(of, sort_keys=True).encode()
        if not path.exists():
            with publishing(path) as temporary:
                temporary.write_bytes(header + b"\n")
        first, *lines = path.read_bytes().split(b"\n")
        if first != header:
            raise UserError(
                f"{path} has texts of a sample with another model, prompt or other options",
                "give the same as before, name another file, or remove this one",
            )
        for line in lines:
            try:
                number, text, ended = json.loads(line)
            except ValueError:  # cut off
                continue
            self.data[number] = text, ended
        self._append(b"\n" if lines[-1:] != [b""] else b"")

    def __setitem__(self, number: int, text: Text) -> None:
        self._append(json.dumps([number, *text]).encode() + b"\n")
        super().__setitem__(number, text)

    def _append(self, line: bytes) -> None:
        with telling_of_full_disks(self._path), open(self._path, "ab", buffering=0) as file:
            file.write(line)

    def remove(self) -> None:
        """For when all that was wanted of them is written."""
        self._path.unlink(missing_ok=True)
