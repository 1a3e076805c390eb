"""Tables of text (CSV, TSV): a header row, then one query per row. Other delimiters and encodings are refused.

A row is a dictionary of texts, so that what needs lists (choices, wrong answers) cannot be in such a file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from cache.errors import UserError
from stages.settings import DataSettings

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # by the end of the file's name
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LISTS = ("choices_field", "perturbed_field")  # settings whose fields hold lists
_TEXTS = ("question_field", "answer_field", "paraphrased_field", "id_field")


def text_of(path: Path, where: str) -> str:
    """A file's text, which must be UTF-8; a byte-order mark is dropped. UserError with the line of the first other byte."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        looks, code = (
            ("it looks like UTF-16", "UTF-16")
            if raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            else (f"byte {raw[error.start]:#04x}", "LATIN1")
        )
        raise UserError(
            f"{where}: {path}, line {line} is not UTF-8 ({looks})",
            f"save it as UTF-8, for example: iconv -f {code} -t UTF-8 {path.name} > utf8{path.suffix}",
        ) from None


def read_table(path: Path, settings: DataSettings, where: str) -> Iterator[dict[str, str]]:
    """The rows after the header; UserError with the line of the first that is not as it should be. Blank lines are no rows."""
    for setting in _LISTS:
        if getattr(settings, setting) is not None:
            raise UserError(
                f"{where}.{setting}: {path} is a table of texts, and {getattr(settings, setting)!r} must hold lists",
                "write the data as .jsonl or .parquet, whose fields can be lists",
            )
    delimiter = DELIMITERS[path.suffix.lower()]
    reader = csv.reader(io.StringIO(text_of(path, where), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    first = 1  # line that the row begins at
    try:
        for cells in reader:
            at, first = f"{path}, line {first}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, at, delimiter, settings, where)
            else:
                yield _row(cells, header, at, settings, where)
    except csv.Error as error:
        raise UserError(
            f"{where}: {path}, line {first} begins a row that is no {path.suffix[1:].upper()}: {error}",
            'a cell with commas, quotes or line breaks stands in "quotes", and quotes in it are doubled ("")',
        ) from None


def _header(cells: list[str], at: str, delimiter: str, settings: DataSettings, where: str) -> list[str]:
    """The names of the columns, checked."""
    if len(cells) == 1:
        for other, name in _NAMES.items():
            if other != delimiter and other in cells[0]:
                raise UserError(
                    f"{where}: {at}: the header is one column, {cells[0]!r}: its columns seem to be separated by "
                    f"{name}",
                    f"separate them by {_NAMES[delimiter]}; spreadsheets ask for it when they save"
                    + (", or call the file .tsv" if other == "\t" else ""),
                )
    for name in cells:
        if cells.count(name) > 1:
            raise UserError(f"{where}: {at}: the column {name!r} occurs twice in the header", "rename one of them")
    for setting in ("question_field", "paraphrased_field", "id_field"):
        name = getattr(settings, setting)
        if name is not None and name not in cells:
            raise UserError(
                f"{where}: {at}: the header has no column {name!r}; it has {', '.join(map(repr, cells))}",
                f"the first line must name the columns; rename one, or name it with {where}.{setting}",
            )
    return cells


def _row(cells: list[str], header: list[str], at: str, settings: DataSettings, where: str) -> dict[str, str]:
    """One row by column, checked: as wide as the header, and text in every column that is read."""
    if len(cells) != len(header):
        raise UserError(
            f"{where}: {at} has {len(cells)} cells, the header has {len(header)}",
            "a cell that contains the delimiter must stand in quotes",
        )
    row = dict(zip(header, cells, strict=True))
    for setting in _TEXTS:
        name = getattr(settings, setting)
        if name in row and not row[name].strip():
            raise UserError(
                f"{where}: {at}: the cell of column {name!r} is empty", "fill it, or take the row or the column out"
            )
    return row
