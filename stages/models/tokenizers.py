"""A model's tokenizer: loaded, identified, and the ids that end its answers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, first_line
from duet.cache.files import sha256_json
from duet.stages.models.directory import config_folder, text_config
from duet.stages.models.files import TOKENIZER_NAMES, check_whole, has_tokenizer, read_object
from duet.stages.models.tokenizer_file import as_the_file_says


def pad_id_of(tokenizer: Any, width: int) -> int:
    """What batches are padded with: the tokenizer's own id, or 0 where it has none or the model no row for it."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < width else 0


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer, or that of an adapter's base; a directory without one is a UserError."""
    from transformers import AutoTokenizer

    folder = model_dir if has_tokenizer(model_dir) else config_folder(model_dir)
    for path in (folder / name for name in TOKENIZER_NAMES):
        if path.is_file():
            check_whole(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(
            f"{model_dir} has no tokenizer that can be loaded: {first_line(error)}",
            "put the tokenizer's files beside the weights; a tokenizer.json of a newer release needs `pip install --upgrade "
            "tokenizers transformers`; if it needs code of its own, read it and set trust_remote_code",
        ) from error
    return as_the_file_says(tokenizer, folder)


def eos_ids(model_dir: Path, config: Any, tokenizer: Any) -> list[int]:
    """All ids that end a response: from config.json, generation_config.json and the tokenizer, ascending."""
    found: set[int] = set()
    sources = [text_config(config).eos_token_id, tokenizer.eos_token_id]
    path = config_folder(model_dir) / "generation_config.json"
    if path.is_file():
        sources.append(read_object(path, str(model_dir)).get("eos_token_id"))
    for source in sources:
        found |= set(source) if isinstance(source, list) else {source} - {None}
    return sorted(found)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what the tokenizer does: id map, backend rules and special ids, not its files' layout."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for key in ("padding", "truncation", "version"):
        rules.pop(key, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256_json({"vocabulary": sorted(tokenizer.get_vocab().items()), "rules": rules, "special": special})


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes, as `tokenizer/<name>`: it travels in the store."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f"tokenizer/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text as it stands, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer takes for special tokens, less the one for what it does not know."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(token for token in named | added if token.strip() and token != str(tokenizer.unk_token))
