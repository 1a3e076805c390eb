"""Tables of text (CSV, TSV): a header row, then one query per row. Other delimiters and encodings are refused.

A row is a dictionary of texts, so that what needs lists (choices, wrong answers) cannot be in such a file. Blank lines are not
rows, and neither are the rows of empty cells that spreadsheets write below the last one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from duet.cache.errors import UserError
from duet.stages.questions.columns import WrongField
from duet.stages.questions.text_files import text_of
from duet.stages.settings.data import DataSettings

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # by the end of the file's name
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LISTS = ("choices_field", "perturbed_field")  # settings whose fields hold lists
_TEXTS = ("question_field", "answer_field", "paraphrased_field", "id_field")


def read_table(path: Path, settings: DataSettings, where: str) -> Iterator[dict[str, str]]:
    """The rows after the header; UserError with the line of the first that is not as it should be."""
    for setting in _LISTS:
        if getattr(settings, setting) is not None:
            raise UserError(
                f"{where}.{setting}: {path} is a table of texts, and {getattr(settings, setting)!r} must hold lists",
                "write the data as .jsonl or .parquet, whose fields can be lists",
            )
    text = text_of(path, where)
    if text.lstrip()[:1] in ("{", "["):
        raise UserError(f"{where}: {path} is JSON, expected a table", "give the file the ending .jsonl")
    delimiter = DELIMITERS[path.suffix.lower()]
    header: list[str] = []
    empty = ""  # the first row of empty cells, which must be followed by such rows only
    for at, cells in _lines(text, delimiter, path, where):
        if not header:
            header = _header(cells, at, delimiter, settings, where)
        elif not "".join(cells).strip():
            empty = empty or at
        elif empty:
            raise UserError(f"{where}: {empty}: all cells are empty, and rows follow", "fill the row, or take it out")
        else:
            yield _row(cells, header, at, settings, where)


def _lines(text: str, delimiter: str, path: Path, where: str) -> Iterator[tuple[str, list[str]]]:
    """The place and the cells of each row that is not a blank line."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may be as long as it likes
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 1  # line that the row begins at
    try:
        for cells in reader:
            at, first = f"{path}, line {first}", reader.line_num + 1
            if cells:
                yield at, cells
    except csv.Error as error:
        raise UserError(
            f"{where}: {path}, line {first} begins a row that is not {path.suffix[1:].upper()}: {error}",
            'a cell with delimiters, quotes or line breaks stands in "quotes", and quotes in it are doubled ("")',
        ) from None


def _header(cells: list[str], at: str, delimiter: str, settings: DataSettings, where: str) -> list[str]:
    """The names of the columns, checked. Columns without a name are never read."""
    if cells[0].startswith("sep="):
        raise UserError(f"{where}: {at} is Excel's own line {cells[0]!r}, not the header", "take the line out")
    for setting in ("question_field", "paraphrased_field", "id_field"):
        name = getattr(settings, setting)
        if name is not None and name not in cells:
            _refuse_other_delimiter(cells, name, at, delimiter, where)
            raise WrongField(
                f"{where}: {at}: the header has no column {name!r}; it has {', '.join(map(repr, cells))}",
                f"the first line must name the columns; rename one, or name it with {where}.{setting}",
            )
    for name in cells:
        if name and cells.count(name) > 1:
            raise UserError(f"{where}: {at}: the column {name!r} occurs twice in the header", "rename one of them")
    return cells


def _refuse_other_delimiter(cells: list[str], wanted: str, at: str, delimiter: str, where: str) -> None:
    """Refuse a header that has the wanted column once it is parted by another delimiter."""
    line = delimiter.join(cells)
    for other, name in _NAMES.items():
        columns = [column.strip().strip('"') for column in line.split(other)]
        if other != delimiter and len(columns) > 1 and (wanted in columns or len(cells) == 1):
            raise UserError(
                f"{where}: {at}: the columns of the header {line!r} seem to be separated by {name}",
                f"separate them by {_NAMES[delimiter]}; spreadsheets ask for it when they save"
                + (", or call the file .tsv" if other == "\t" else "")
                + (", or call the file .csv" if other == "," else ""),
            )


def _row(cells: list[str], header: list[str], at: str, settings: DataSettings, where: str) -> dict[str, str]:
    """One row by column, checked: as wide as the header, and text in every column that is read."""
    if len(cells) != len(header):
        raise UserError(f"{where}: {at} has {len(cells)} cells, the header has {len(header)}", _ragged(cells, header))
    if [cell.removeprefix("\ufeff") for cell in cells] == header:
        raise UserError(f"{where}: {at} repeats the header", "files were joined: take the line out")
    row = dict(zip(header, cells, strict=True))
    for setting in _TEXTS:
        name = getattr(settings, setting)
        if name not in row:
            continue
        if not row[name].strip():
            raise UserError(
                f"{where}: {at}: the cell of column {name!r} is empty", "fill it, or take the row or the column out"
            )
        if re.fullmatch(r'\s+".*"\s*', row[name], re.DOTALL):
            raise UserError(
                f"{where}: {at}: a space stands before the quotes of column {name!r}, which makes them a part of the text",
                "take the space out: quotes stand directly after the delimiter",
            )
    return row


def _ragged(cells: list[str], header: list[str]) -> str:
    """What to do about a row that is not as wide as the header."""
    if len(cells) < len(header):
        return "a row has a cell in every column, empty or not; a cell with delimiters or line breaks stands in quotes"
    if not "".join(cells[len(header) :]).strip():
        return "its last cells are empty: take the delimiters at the line's end out"
    return "a cell that contains the delimiter must stand in quotes, directly after the delimiter before it"
