"""Which stores a run has: those that its config asks for, and pointers in its directory, as several runs may share a store.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duet.cache.errors import IncompleteStore, UserError
from duet.cache.files import publish_json, read_json
from duet.cache.location import Location
from duet.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from duet.cache.plan import PLAN_NAME, Plan, store_name
from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.config.schema import Config
from duet.stages.settings.student import StudentSettings
from duet.stages.settings.teacher import rows_with_prefix
from duet.stages.student.summary import read_summary

if TYPE_CHECKING:
    from duet.stages.teacher.plan import TeacherStore
    from duet.stages.teacher.prepare import Questions


def questions_of(config: Config, limit: int | None = None) -> Questions:
    """What stage one asks; `limit` takes that many queries of each subset, for a trial."""
    from duet.stages.teacher.prepare import Questions

    return Questions(config.prompt, config.data, config.topic, config.requests, limit)


def teacher_stores(config: Config, limit: int | None = None) -> list[TeacherStore]:
    """Each of the config's teachers and its store, before an engine starts."""
    from duet.stages.teacher.plan import TeacherStore
    from duet.stages.teacher.prepare import prepare

    questions = questions_of(config, limit)
    return [
        TeacherStore.expected(
            name, settings, prepare(settings, questions, config.device), config.store, config.store_root
        )
        for name, settings in config.teacher_settings().items()
    ]


def store_summary(location: Location) -> dict[str, Any]:
    manifest = read_manifest(location)
    return {
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "positions": manifest.positions,
        "top_k": manifest.top_k,
        "vocab_size": manifest.vocab_size,
        "engine": manifest.provenance["engine"],
        "dtype": manifest.provenance["dtype"],
        "bytes": manifest.shard_bytes,
        "prefix": manifest.provenance["prefix"],
        "prefix_on": rows_with_prefix(manifest.provenance),
        **{f"{subset} rows": rows for subset, rows in manifest.subsets.items() if subset not in MAIN_SUBSETS},
        **{f"prefix of {name}": r["prefix"] for name, r in manifest.provenance.get("requests", {}).items()},
    }


def point_to(config: Config, entries: Mapping[str, dict[str, str]]) -> None:
    """Record which stores this run uses, by teacher, complete or not."""
    path = config.run.store_pointer
    path.parent.mkdir(exist_ok=True)
    publish_json(path, {"teachers": entries})


def entry(of: Plan | Manifest) -> dict[str, str]:
    return {"fingerprint": of.fingerprint, "name": store_name(of.fingerprint, of.format)}


def store_line(location: Location) -> str:
    """A complete store in one line."""
    manifest = read_manifest(location)
    return (
        f"{location} ({manifest.rows} rows, {manifest.positions} positions, k={manifest.top_k}, "
        f"{manifest.shard_bytes / 1e6:.2f} MB, prefix on {rows_with_prefix(manifest.provenance)} rows)"
    )


def stores_named(config: Config) -> dict[str, Location]:
    """The stores that the run uses or is writing, by teacher; empty before stage one has begun."""
    path = config.run.store_pointer
    stores = read_json(path).get("teachers", {}) if path.is_file() else {}
    if set(stores) != set(config.teacher_settings()):
        return {}
    return {name: config.store_root / stores[name]["name"] for name in config.teacher_settings()}


def stores_of_run(config: Config) -> dict[str, Location]:
    """The run's stores, by teacher; where stage one has not ended, an IncompleteStore that says how far it came."""
    stores = stores_named(config)
    for location in stores.values():
        if location.size(MANIFEST_NAME) is None and location.size(PLAN_NAME) is not None:
            read_manifest(location)
    if not stores or any(location.size(MANIFEST_NAME) is None for location in stores.values()):
        raise IncompleteStore(
            f"{config.run_dir} has no teacher logits yet", "run `duet teacher-logits` with this config first"
        )
    return stores


def check_trained_on(config: Config, students: Sequence[StudentSettings], stored: Mapping[str, Location]) -> None:
    """Refuse a student that is done but was trained on another store than the run's: data or teacher have changed since."""
    now = {name: read_manifest(location).fingerprint for name, location in stored.items()}
    for files in (config.run.student(student.name) for student in students):
        for name, teacher in read_summary(files.path).teachers.items() if files.is_done else ():
            if teacher.fingerprint != now.get(name):
                raise UserError(
                    f"{files.path} was trained on another store of {name} than the run has now: {teacher.fingerprint[:16]} "
                    f"there and {str(now.get(name))[:16]} now",
                    "bring back the data and the teacher as they were, choose another run with --set name=NEW_NAME, or remove "
                    "the student's folder, so that `duet distill` trains it again",
                )
