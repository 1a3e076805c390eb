"""Perplexity on neutral text: does the model still speak, whatever it says about the topic?"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from duet.cache.errors import UserError
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score, interval
from duet.stages.questions.json_rows import KINDS, read_json_rows
from duet.stages.questions.text_files import FAULT_HINT, fault_of, text_of
from duet.stages.settings.data import DataSettings

METRIC = "neutral.perplexity"
FIELD = "text"  # of a document in a JSON file


def load_documents(path: str, where: str) -> list[str]:
    """The documents of a .txt file, parted by blank lines, or of a JSON file whose rows have a field `text`."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"{where}: no such file: {path}", "name a .txt or .jsonl file of text that has nothing to do with the topic"
        )
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


def windows(ids: list[int], in_front: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """(what is only read, what is predicted) pairs that cover a document in the fewest windows of the context.

    With nothing in front, a window's first token is only read. A document of one token has none to predict then.
    """
    size = context - len(in_front)
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    pairs = [(in_front, part) if in_front else (part[:1], part[1:]) for part in parts]
    return [pair for pair in pairs if pair[1]]


def perplexity(losses: np.ndarray, tokens: np.ndarray, seed: int = 0, resamples: int = 2000) -> Score:
    """exp of the summed losses over the summed tokens of all documents, with the interval of resampled documents.

    `losses` are each document's summed negative log-likelihoods in nats, `tokens` how many they are of, float64 or int [n].
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(losses), size=(resamples, len(losses)))
    ci95 = interval(np.exp(losses[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)))
    return Score(float(np.exp(losses.sum() / tokens.sum())), len(losses), ci95)


METRICS = (
    Metric(
        METRIC,
        perplexity,
        "exp of the mean negative log-likelihood per token of all documents of the neutral text, so that a document weighs by "
        "its tokens. n counts documents. Interval: documents are drawn with replacement, each with all its tokens, and the "
        "token-weighted mean is taken again. A document that is longer than the context is read in windows that do not "
        "overlap. A document's first token counts where something stands in front of it: the beginning-of-sequence token, or "
        "a teacher's prefix, which does not count itself.",
        better="as base's",
        range="1 upwards; 1 is perfect prediction",
    ),
)
