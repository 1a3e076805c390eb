"""Rows of what is stored by columns: Parquet files and Hugging Face data sets.

Only the columns that the settings name are read: others may be pictures, or of types that cannot be read here. In a row they
stand as None, so that a message can tell their names. A conversation's messages are nested, and all of a column have the same
keys: those that are null in one are left out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.stages.questions.conversations import FIELD as CONVERSATION
from duet.stages.questions.text_files import LFS_POINTER, bytes_of, refuse_other_kind
from duet.stages.settings.data import DataSettings

HUB_SCHEME = "hf://"
QUESTION = DataSettings.model_fields["question_field"].default
_MAGIC = b"PAR1"


class WrongField(UserError):
    """A field that the settings name is missing, or holds something else than they say."""


def fields_of(settings: DataSettings) -> list[str]:
    """The fields that the settings name, and where they name no other field for questions, that of conversations."""
    named = (getattr(settings, name) for name in type(settings).model_fields if name.endswith("_field"))
    return [*filter(None, named), *([CONVERSATION] if settings.question_field == QUESTION else [])]


def read_parquet(path: Path, settings: DataSettings, where: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = bytes_of(path, where)
    if not raw.startswith(_MAGIC):
        refuse_other_kind(raw, path, where)
        raise UserError(
            f"{where}: {path} is not a Parquet file: {f'it begins with {raw[:12]!r}' if raw else 'it is empty'}",
            "write it with pyarrow or pandas, or give the file the ending of its kind",
        )
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        names = file.schema_arrow.names
        rows = file.read(columns=_asked(names, settings, path, where)).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: texts that are not UTF-8
        raise UserError(
            f"{where}: {path} is damaged: {' '.join(str(error).split())}", "copy, download or write the file again"
        ) from None
    yield from _rows(names, rows)


def read_hub(settings: DataSettings, where: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(
            f"{where}: {settings.path} needs the package datasets", "pip install 'duet-unlearn[datasets]'"
        ) from None
    target = settings.path.removeprefix(HUB_SCHEME)
    _refuse_pointers(Path(target), where)
    try:
        found = datasets.load_dataset(target, settings.name, split=settings.split)
        names = found.column_names
        rows = list(found.select_columns(_asked(names, settings, settings.path, where)))
    except (ValueError, OSError, DatasetsError) as error:
        raise UserError(
            f"{where}: cannot load {settings.path} (name {settings.name}, split {settings.split}): {error}",
            "check owner, name and split, and that the hub can be reached; or download it and name the .parquet file",
        ) from None
    yield from _rows(names, rows)


def _refuse_pointers(folder: Path, where: str) -> None:
    """Refuse a data set in a directory here whose files were not fetched; `datasets` would call them damaged."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as content:
            head = content.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            refuse_other_kind(head, file, where)


def _asked(names: Sequence[str], settings: DataSettings, path: Path | str, where: str) -> list[str]:
    """The columns to read, by their names."""
    fields = fields_of(settings)
    for name in fields:
        if list(names).count(name) > 1:
            raise UserError(f"{where}: {path} has {list(names).count(name)} columns {name!r}", "rename all but one")
    return [name for name in names if name in fields] or list(names[:1])


def _rows(names: Sequence[str], rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    return ({**dict.fromkeys(names), **{name: _without_nulls(value) for name, value in row.items()}} for row in rows)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
