"""Is a tokenizer what its tokenizer.json says? Some classes of transformers put rules of their own in the place of the file's.

In transformers 5 the class LlamaTokenizer, which many model folders name, ignores the file's normalizer and pre-tokenizer: some
models' spaces are lost. The tokenizers library's own reading of the file is what the model was trained with.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, note

FILE_NAME = "tokenizer.json"
# Texts on which readings come apart: spaces in front, in the middle and behind, tabs, line breaks, digits, scripts, marks.
TEXTS = (
    "Question: Who wrote it?\nAnswer: Leo",
    "  two spaces in front,  two within, one behind ",
    "\n\n\ttab and\n line breaks\n",
    "1984 3.14159 1,000,000 0x7fff",
    "naïve café, straße, Кто там? 東京都 مرحبا हिन्दी 🙂",
    "don't we'll rock'n'roll e-mail (a+b)*c = d",
)


def as_the_file_says(tokenizer: Any, model_dir: Path) -> Any:
    """The tokenizer, or, where it reads texts differently than its tokenizer.json, the file's own reading of them."""
    path = model_dir / FILE_NAME
    if not path.is_file():
        return tokenizer
    stat = path.stat()
    expected = _of_file(path.resolve(), stat.st_size, stat.st_mtime_ns)
    if [_ids(tokenizer, text) for text in TEXTS] == expected:
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast.from_pretrained(model_dir)
    if [_ids(plain, text) for text in TEXTS] != expected:
        raise UserError(
            f"{model_dir}: the tokenizer {type(tokenizer).__name__} reads texts differently than its {FILE_NAME}",
            "update transformers and tokenizers, or take the tokenizer's files from the model's page again",
        )
    _tell(model_dir, type(tokenizer).__name__)
    return plain


@functools.cache
def _tell(model_dir: Path, name: str) -> None:
    """Once for all loads of a process."""
    note(f"tokenizer of {model_dir.name}: {name} does not follow its {FILE_NAME}; the file's rules are taken")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@functools.cache
def _of_file(path: Path, *_of_this_version: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
