"""`duet cache export` and `duet cache import`: stores in the formats of other programs, and back. No torch is needed."""

from __future__ import annotations

from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.exchange import Export, export_store, import_store, read_export
from duet.cache.location import is_url, location_of
from duet.pipeline.run.terminal import say


def export(store: str, target: str, exchange_format: str) -> None:
    """Write an export and say how its logits come back."""
    made = export_store(location_of(store), _folder(target), exchange_format)
    say(f"{target}: {made.format}, {len(made.files)} files; {_how(made)}")


def import_(source: str, root: str, store_format: str, compression: str) -> None:
    """Write the export's store under `root` and say where, and how its logits compare."""
    folder = _folder(source)
    location, manifest = import_store(folder, location_of(root), store_format, compression)
    say(
        f"{location}: {manifest.format}, {manifest.rows} rows, {manifest.positions} positions; {_how(read_export(folder))}"
    )


def _how(export: Export) -> str:
    if export.value_error:
        return f"logits come back within {export.value_error:.2g}, so the store that is imported has a fingerprint of its own"
    return "all numbers come back bit for bit, with the store's fingerprint"


def _folder(path: str) -> Path:
    if is_url(path):
        raise UserError(
            f"{path} is a URL: exports lie in folders", "name a folder, and copy it with the tools of your storage"
        )
    return Path(path)
