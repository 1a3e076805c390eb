"""Whether a run has ended and nothing has changed since: then `duet run` has nothing to do, and finds it without torch.

`done.json` holds a hash of all that the run read, as it was before the first stage, and one of all that it wrote. Files count
by name, size and time, as `make` sees them, and so do Duet's own. Where a model or data set is on the hub, an adapter has its
base elsewhere, or the store is on object storage, nothing is known without asking, and every stage is called as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from duet.cache.files import publish_json, read_json, sha256_json
from duet.cache.location import Folder
from duet.pipeline.config.schema import Config
from duet.pipeline.run.directory import versions
from duet.pipeline.run.named_models import is_here
from duet.pipeline.run.provenance import is_place
from duet.pipeline.run.stores import stores_named
from duet.stages.models.files import ADAPTER_CONFIG_NAME

WRITTEN_TO = ("dir", "cache_dir", "runs_dir")  # places that a run writes to
OF_OTHERS = ("chain", "compare", "audit", "slurm")  # settings that these stages do not read
OWN = ("duet.cache", "duet.pipeline", "duet.stages")


class _Unknown(Exception):
    """Something is not on this machine, so that nobody knows whether it has changed."""


def state_read(config: Config) -> str | None:
    """A hash of settings, data, models, Duet's own files and libraries; None where that cannot be known from here."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in OF_OTHERS}
    try:
        files = {place: _files(Path(place)) for place in sorted(set(_places(settings)))}
    except _Unknown:
        return None
    own = [
        _files(Path(folder)) for name in OWN for folder in getattr(find_spec(name), "submodule_search_locations", ())
    ]
    return sha256_json([settings, files, own, versions()])


def is_finished(config: Config, read: str | None) -> bool:
    """Has the run ended with all that is asked for now, and is everything as it was then? `read` is `state_read`."""
    path = config.run.done
    if read is None or not path.is_file():
        return False
    return read_json(path) == {"format_version": 1, "read": read, "written": _state_written(config)}


def note_finished(config: Config, read: str | None) -> None:
    """All stages have ended; `read` is `state_read` as it was before the first."""
    written = _state_written(config)
    if read is not None and written is not None:
        publish_json(config.run.done, {"format_version": 1, "read": read, "written": written})


def _state_written(config: Config) -> str | None:
    """A hash of what the stages have left for those after them and for readers; None with stores on object storage."""
    run, stores = config.run, list(stores_named(config).values())
    folders = [store.path for store in stores if isinstance(store, Folder)]
    if not folders or len(folders) < len(stores):
        return None
    students = [run.student(student.name) for student in config.students]
    parts = [run.results, run.items, run.report, run.store_pointer, *folders]
    parts += [part for student in students for part in (student.training, student.model)]
    return sha256_json([_files(part) for part in parts])


def _places(settings: Any, key: str = "") -> Iterator[str]:
    """What the settings name and a run reads. _Unknown where that is not on this machine."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _places(value, "model" if key == "models" else name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _places(value, key)
    elif isinstance(settings, str) and is_place(key) and key not in WRITTEN_TO:
        model = key in ("model", "base") or key.endswith("_model")
        if "://" in settings or (model and not is_here(settings)) or (Path(settings) / ADAPTER_CONFIG_NAME).exists():
            raise _Unknown(settings)
        yield settings


def _files(place: Path) -> list[list[Any]]:
    """[name, bytes, time] of a file, or of every file in a folder; empty where there is none."""
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    stats = [(str(path), path.stat()) for path in found if path.suffix != ".pyc"]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
