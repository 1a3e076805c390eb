"""Stage one as a user calls it: each teacher's store is found or written, here or by several processes; what it would cost.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Folder
from duet.cache.order import check_alike
from duet.cache.watch import Watch
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.children import THIS_PROGRAM, environments_of_children, run_jobs, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir
from duet.pipeline.run.preflight import check_models, check_students
from duet.pipeline.run.stores import entry, point_to, store_line, teacher_stores
from duet.pipeline.run.terminal import log_to, progress_bar, say, say_engine

if TYPE_CHECKING:
    from duet.stages.engines.interface import EngineSpec
    from duet.stages.teacher.capture import CaptureProgress
    from duet.stages.teacher.plan import StoreResult, TeacherStore


def teacher_logits(
    request: Selection,
    limit: int | None = None,
    dry_run: bool = False,
    child: bool = False,
    worker: bool = False,
) -> int:
    """Find the store of each of the config's teachers or write it; returns an exit code.

    A trial (`limit`, queries of each subset) has stores of its own, which the run does not use. A `child` leaves it to its
    parent to record which stores the run uses. A `worker` ends once every remaining shard is claimed; whoever finishes the
    last shard completes the store.
    """
    from duet.stages.teacher import prepare

    stop = StopSignal()
    config = request.load()
    if worker:
        check_one_teacher(config)
    check_models(config)
    stores = teacher_stores(config, limit)
    prepare.check_alike({store.name: store.prepared for store in stores})
    _check_students(config, stores, child)
    if dry_run:
        _say_estimates(config, stores)
        return 0
    if child:
        log_to(config.run.log)
    elif limit is None:
        claim_run_dir(config)
    found = _reused(config, stores)
    missing = [store for store in stores if store.name not in found]
    if missing and stop():
        raise Interrupted("before the teacher was asked")
    if missing and not child:
        _check_room(missing)
        _point_to_expected(config, stores, found, limit)
    number = config.teacher.data_parallel
    if missing and number > 1 and not child:
        code = _in_processes(request, limit, number, missing, stop)
        found |= {store.name: result for store in missing if (result := store.find())}
        if len(found) < len(stores):
            _say_how_far(missing, code)
            return code
    else:
        found |= _write(config, missing, stop, wait=not worker)
    manifests = {store.name: manifest for store in stores if (manifest := found[store.name].manifest)}
    if len(manifests) < len(stores):
        return 0
    check_alike(manifests)
    if limit is not None:
        say(f"this was a trial of {limit} queries of each subset; the run has no teacher logits from it")
    elif not child:
        point_to(config, {name: entry(manifest) for name, manifest in manifests.items()})
    return 0


def _check_students(config: Config, stores: Sequence[TeacherStore], child: bool) -> None:
    """Refuse, before the teacher is asked, what stage two would refuse; the parent of a `child` has done it."""
    for line in [] if child else check_students(config, stores[0].prepared.rows, must_be_here=False):
        say(line)


def _reused(config: Config, stores: Sequence[TeacherStore]) -> dict[str, StoreResult]:
    """The stores that are complete already, by teacher; each is said."""
    found = {store.name: result for store in stores if (result := store.find())}
    for store in stores:
        if result := found.get(store.name):
            say(f"{_of(config, store)}reused the store of the same fingerprint: {store_line(result.location)}")
    return found


def _point_to_expected(
    config: Config, stores: Sequence[TeacherStore], found: Mapping[str, StoreResult], limit: int | None
) -> None:
    """Point to the stores that were found, and to those that the engine tried first will write; not in a trial."""
    if limit is None:
        there = {name: result.manifest for name, result in found.items()}
        point_to(config, {store.name: entry(there.get(store.name) or store.plan) for store in stores})


def check_one_teacher(config: Config) -> None:
    """Refuse a setting that does nothing in one of many workers."""
    if (number := config.teacher.data_parallel) > 1:
        raise UserError(
            f"teacher.data_parallel is {number}, which does nothing in a worker: it is one teacher",
            "leave it out, and start more workers; in jobs, slurm.workers",
        )


def _write(config: Config, missing: Sequence[TeacherStore], stop: StopSignal, wait: bool) -> dict[str, StoreResult]:
    """Write the missing stores, those of one model with one start of its engine; the results by teacher."""
    waiting, written = list(missing), {}
    while waiting:
        engine = _engine_of(waiting[0])
        together = [store for store in waiting if _engine_of(store) == engine]
        waiting = [store for store in waiting if _engine_of(store) != engine]
        results = write_stores(together, engine[0], stop, wait)
        for store, result in zip(together, results, strict=True):
            written[store.name] = result
            share = f", {100 * result.cached_share:.0f} % of prompt tokens computed once" if result.cached_share else ""
            line = store_line(result.location) if result.manifest else "all that is left is in other workers' hands"
            say(f"{_of(config, store)}wrote {result.rows_written} rows in {result.seconds:.1f} s{share}: {line}")
    return written


def _engine_of(store: TeacherStore) -> tuple[str, EngineSpec]:
    """Teachers for which this is equal can be asked of one engine."""
    return store.settings.usable_engine, replace(store.prepared.spec, context=0)


def write_stores(stores: Sequence[TeacherStore], engine: str, stop: StopSignal, wait: bool = True) -> list[StoreResult]:
    """Run one model over the missing shards of these stores, one store after the other, with a progress bar."""
    from duet.stages.teacher import capture

    started = time.monotonic()

    def show(progress: CaptureProgress) -> None:
        rate = progress.positions / (time.monotonic() - started)
        note = f"{rate:,.0f} positions/s  {100 * progress.cached_share:.0f} % of prompt tokens cached"
        bar.update("teacher logits", progress.rows, progress.total, note)

    with progress_bar("rows") as bar:
        return capture.write_stores(stores, engine, Watch(show, say_engine, stop), wait)


def _in_processes(
    request: Selection, limit: int | None, number: int, missing: Sequence[TeacherStore], stop: StopSignal
) -> int:
    """`number` processes write the missing stores together, each with an engine of its own.

    Returns the first exit code that is not 0, though the stores may be whole: the others take over the unfinished shards of
    one that dies.
    """
    devices = visible_gpus(missing[0].prepared.spec.device)
    each = max(store.settings.tensor_parallel * store.settings.pipeline_parallel for store in missing)
    shards = sum(store.plan.num_shards for store in missing)
    if number > shards:
        raise UserError(
            f"teacher.data_parallel is {number}, but there are {shards} shards to share",
            "lower it, or set a smaller store.shard_rows",
        )
    if devices and number * each > len(devices):
        raise UserError(
            f"teacher.data_parallel {number} x {each} GPUs each is more than the {len(devices)} that are here",
            f"set teacher.data_parallel to at most {len(devices) // each}"
            if each <= len(devices)
            else f"set teacher.tensor_parallel x pipeline_parallel to at most {len(devices)}",
        )
    trial = [] if limit is None else ["--limit", str(limit)]
    command = [*THIS_PROGRAM, "teacher-logits", *request.arguments(students=False), *trial, "--child"]
    total = sum(store.plan.rows for store in missing)
    with progress_bar("rows") as bar:

        def watch(running: list[str]) -> None:
            bar.update("teacher logits", _rows_there(missing), total, f"{len(running)} processes")

        commands = {f"teacher {at + 1} of {number}": command for at in range(number)}
        return run_jobs(commands, environments_of_children(number, devices, os.environ, each), stop, watch)


def _say_how_far(missing: Sequence[TeacherStore], code: int) -> None:
    """Of stores that several processes left unfinished: with an exit code, which says why, or raise Interrupted."""
    text = f"{_rows_there(missing)} of {sum(store.plan.rows for store in missing)} rows are in complete shards"
    if not code:
        raise Interrupted(text)
    say(text)


def _rows_there(stores: Sequence[TeacherStore]) -> int:
    """Rows in complete shards, of each store under the engine that has most."""
    return sum(max(one.rows_there() for one in store.of_each_engine()) for store in stores)


def _check_room(missing: Sequence[TeacherStore]) -> None:
    """Before an engine starts: may the missing stores be written where they are to lie, and is there room?"""
    from duet.stages.cost.store import check_room

    # Object storage does not say how much room there is.
    folders = [(one.prepared, one.plan, one.location) for one in missing if isinstance(one.location, Folder)]
    if folders and (warning := check_room(folders)):
        say(warning)


def _say_estimates(config: Config, stores: Sequence[TeacherStore]) -> None:
    for store in stores:
        _say_estimate(store, _of(config, store))


def _say_estimate(store: TeacherStore, of: str) -> None:
    """The work of stage one for a teacher."""
    from duet.stages.cost.store import FLOP_PER_S, estimate

    plan = store.plan
    cost = estimate(store.prepared, plan)
    state = "complete" if store.is_complete else f"{store.rows_there()} of {plan.rows} rows are there"
    rows = ", ".join(f"{subset} {count}" for subset, count in cost.rows.items())
    say(f"{of}rows: {rows}; engine {plan.provenance['engine']}")
    say(
        f"{of}prompts: {cost.tokens_prefixed:,} tokens with the prefix, {cost.tokens_bare:,} without; "
        f"{cost.tokens_computed:,} to compute where all that they share is computed once"
    )
    what = "responses and documents" if any(row.is_document for row in store.prepared.rows) else "responses"
    say(f"{of}{what}: at most {cost.positions:,} positions, {plan.top_k} ids each")
    say(f"{of}store: at most {cost.store_bytes:,} bytes and file headers, {store.location} ({state})")
    say(
        f"{of}cost: 2 x {cost.parameters / 1e6:,.1f} M parameters x {cost.tokens_computed + cost.positions:,} tokens = "
        f"{cost.flop / 1e12:.3g} TFLOP: {cost.seconds:,.1f} s on a GPU that does {FLOP_PER_S / 1e12:.0f} TFLOP/s (assumed)"
    )


def _of(config: Config, store: TeacherStore) -> str:
    return f"teacher {store.name}: " if config.teachers else ""
