"""Plain documents: from a file to checked texts, as the neutral text and broad documents are read."""

from __future__ import annotations

import re
from pathlib import Path

from duet.cache.errors import UserError
from duet.stages.questions.json_rows import KINDS, read_json_rows
from duet.stages.questions.text_files import FAULT_HINT, fault_of, text_of
from duet.stages.settings.data import DataSettings

FIELD = "text"  # of a document in a JSON file


def load_documents(path: str, where: str) -> list[str]:
    """The documents of a .txt file, parted by blank lines, or of a JSON file whose rows have a field `text`."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{where}: no such file: {path}", "name a .txt or .jsonl file of text")
    if file.suffix not in (".txt", *KINDS):
        raise UserError(f"{where}: unknown kind of file: {path}", f"use .txt, {', '.join(KINDS)}")
    documents = (
        [part.strip("\n") for part in re.split(r"\n\s*\n", text_of(file, where).replace("\r\n", "\n"))]
        if file.suffix == ".txt"
        else _of_rows(file, where)
    )
    documents = [document for document in documents if document.strip()]
    for number, document in enumerate(documents):
        if fault := fault_of(document):
            raise UserError(f"{where}: {path}, document {number} {fault}", FAULT_HINT)
    if not documents:
        raise UserError(f"{where}: {path} has no text", "name a file with at least one document")
    return documents


def _of_rows(path: Path, where: str) -> list[str]:
    documents = []
    for number, row in enumerate(read_json_rows(path, DataSettings(path=str(path), question_field=FIELD), where)):
        text = row.get(FIELD) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {path}, row {number} has no text in a field {FIELD!r}", "fix or remove the row")
        documents.append(text)
    return documents
