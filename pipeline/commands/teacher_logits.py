"""Stage one as a user calls it: each teacher's store is found or written, here or by several processes; what it would cost.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.order import check_alike
from duet.cache.plan import store_name
from duet.cache.watch import Watch
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.children import THIS_PROGRAM, environments_of_children, run_jobs, visible_gpus
from duet.pipeline.run.directory import LOG_NAME, StopSignal, claim_run_dir
from duet.pipeline.run.named_models import check_before_stage_one
from duet.pipeline.run.stores import entry, point_to, store_line
from duet.pipeline.run.terminal import log_to, progress_bar, say, say_engine
from duet.stages.settings.teacher import TeacherSettings


def teacher_logits(
    request: Selection,
    limit: int | None = None,
    dry_run: bool = False,
    child: bool = False,
    worker: bool = False,
) -> int:
    """Find the store of each of the config's teachers or write it; returns an exit code.

    A trial (`limit`, queries of each subset) has stores of its own, which the run does not use. A `child` of ours leaves it to
    its parent to say which stores the run uses. A `worker` ends when all that is left is in other workers' hands; whoever
    finishes the last shard completes the store.
    """
    from duet.stages.teacher import prepare as teacher

    stop = StopSignal()
    config = request.load()
    if worker:
        check_one_teacher(config)
    check_before_stage_one(config)
    teachers = config.teacher_settings()
    prepared = {name: prepare_teacher(config, settings, limit) for name, settings in teachers.items()}
    teacher.check_alike(prepared)
    _check_students(config, prepared, child)
    if dry_run:
        _say_estimates(config, teachers, prepared)
        return 0
    if child:
        log_to(config.run_dir / LOG_NAME)
    elif limit is None:
        claim_run_dir(config)
    found = {name: _find(config, settings, prepared[name]) for name, settings in teachers.items()}
    missing = {name: prepared[name] for name, result in found.items() if result is None}
    _say_reused(config, found)
    if missing and stop():
        raise Interrupted("before the teacher was asked")
    if missing and not child:
        _check_room(config, teachers, missing)
        _point_to_expected(config, prepared, found, limit)
    number = config.teacher.data_parallel
    if missing and number > 1 and not child:
        code = _in_processes(config, request, limit, number, teachers, missing, stop)
        found |= {name: _find(config, teachers[name], prepared[name]) for name in missing}
        if None in found.values():
            _say_how_far(config, teachers, missing, code)
            return code
    else:
        found |= _write(config, teachers, missing, stop, wait=not worker)
    if any(result.manifest is None for result in found.values()):
        return 0
    check_alike({name: result.manifest for name, result in found.items()})
    if limit is not None:
        say(f"this was a trial of {limit} queries of each subset; the run has no teacher logits from it")
    elif not child:
        point_to(config, {name: entry(result.manifest) for name, result in found.items()})
    return 0


def _check_students(config: Config, prepared: Mapping[str, Any], child: bool) -> None:
    """Refuse, before the teacher is asked, what stage two would refuse; the parent of a `child` has done it."""
    from duet.pipeline.run.before import check_students_before

    rows = next(iter(prepared.values())).rows
    for line in [] if child else check_students_before(config, rows, must_be_here=False):
        say(line)


def check_one_teacher(config: Config) -> None:
    """Refuse a setting that does nothing in one of many workers."""
    if (number := config.teacher.data_parallel) > 1:
        raise UserError(
            f"teacher.data_parallel is {number}, which does nothing in a worker: it is one teacher",
            "leave it out, and start more workers; in jobs, slurm.workers",
        )


def _say_reused(config: Config, found: Mapping[str, Any]) -> None:
    for name, result in found.items():
        if result is not None:
            say(f"{_of(config, name)}reused the store of the same fingerprint: {store_line(result.location)}")


def _point_to_expected(
    config: Config, prepared: Mapping[str, Any], found: Mapping[str, Any], limit: int | None
) -> None:
    """To the stores that were found, and to those that the engine that comes first will write; not in a trial."""
    from duet.stages.engines.choose import engine_order
    from duet.stages.teacher.plan import plan_for

    if limit is None:
        entries = {}
        for name, settings in config.teacher_settings().items():
            engine = engine_order(settings.engine)[0]
            there = found[name]
            entries[name] = entry(there.manifest if there else plan_for(prepared[name], config.store, engine))
        point_to(config, entries)


def prepare_teacher(config: Config, settings: TeacherSettings, limit: int | None = None) -> Any:
    """All that is known of a teacher's store before an engine starts."""
    from duet.stages.teacher import prepare as teacher

    return teacher.prepare(settings, config.prompt, config.data, config.topic, config.device, config.requests, limit)


def _find(config: Config, settings: TeacherSettings, prepared: Any) -> Any:
    from duet.stages.teacher.plan import find_store

    return find_store(prepared, config.store, config.store_root, settings.engine)


def _write(
    config: Config,
    teachers: Mapping[str, TeacherSettings],
    missing: Mapping[str, Any],
    stop: StopSignal,
    wait: bool = True,
) -> dict[str, Any]:
    """The missing stores, those of one model with one start of its engine; what came of each."""
    waiting, written = dict(missing), {}
    while waiting:
        engine = _engine_of(teachers, waiting, next(iter(waiting)))
        together = [name for name in waiting if _engine_of(teachers, waiting, name) == engine]
        results = write_stores(config, engine[0], [waiting.pop(name) for name in together], stop, wait)
        written |= dict(zip(together, results, strict=True))
        for name, result in zip(together, results, strict=True):
            share = f", {100 * result.cached_share:.0f} % of prompt tokens computed once" if result.cached_share else ""
            store = store_line(result.location) if result.manifest else "all that is left is in other workers' hands"
            say(f"{_of(config, name)}wrote {result.rows_written} rows in {result.seconds:.1f} s{share}: {store}")
    return written


def _engine_of(teachers: Mapping[str, TeacherSettings], prepared: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Teachers for which this is equal can be asked of one engine."""
    return teachers[name].engine, replace(prepared[name].spec, context=0)


def write_stores(
    config: Config, engine: str, prepared: Sequence[Any], stop: StopSignal, wait: bool = True
) -> list[Any]:
    """Run one model over what these stores lack, one after the other, with a progress bar."""
    from duet.stages.teacher import capture

    started = time.monotonic()

    def show(progress: Any) -> None:
        rate = progress.positions / (time.monotonic() - started)
        note = f"{rate:,.0f} positions/s  {100 * progress.cached_share:.0f} % of prompt tokens cached"
        bar.update("teacher logits", progress.rows, progress.total, note)

    with progress_bar("rows") as bar:
        watch = Watch(show, say_engine, stop)
        return capture.write_stores(prepared, engine, config.store, config.store_root, watch, wait)


def _in_processes(
    config: Config,
    request: Selection,
    limit: int | None,
    number: int,
    teachers: Mapping[str, TeacherSettings],
    missing: Mapping[str, Any],
    stop: StopSignal,
) -> int:
    """`number` processes of ours write the missing stores together, each with an engine of its own.

    Returns the first exit code that is not 0, though the stores may be whole: what
    one that dies has not finished, the others take over.
    """
    devices = visible_gpus(next(iter(missing.values())).spec.device)
    each = max(teachers[name].tensor_parallel * teachers[name].pipeline_parallel for name in missing)
    shards = sum(-(-len(prepared.rows) // config.store.shard_rows) for prepared in missing.values())
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
    total = sum(len(prepared.rows) for prepared in missing.values())
    with progress_bar("rows") as bar:

        def watch(running: list[str]) -> None:
            done = sum(_rows_there(config, teachers[name], prepared) for name, prepared in missing.items())
            bar.update("teacher logits", done, total, f"{len(running)} processes")

        commands = {f"teacher {at + 1} of {number}": command for at in range(number)}
        return run_jobs(commands, environments_of_children(number, devices, os.environ, each), stop, watch)


def _say_how_far(
    config: Config, teachers: Mapping[str, TeacherSettings], missing: Mapping[str, Any], code: int
) -> None:
    """Of stores that several processes left unfinished: with an exit code, which says why, or raise Interrupted."""
    there = sum(_rows_there(config, teachers[name], prepared) for name, prepared in missing.items())
    text = f"{there} of {sum(len(prepared.rows) for prepared in missing.values())} rows are in complete shards"
    if not code:
        raise Interrupted(text)
    say(text)


def _rows_there(config: Config, settings: TeacherSettings, prepared: Any) -> int:
    from duet.stages.engines.choose import engine_order
    from duet.stages.teacher.plan import rows_there

    return max(
        rows_there(prepared, config.store, config.store_root, engine) for engine in engine_order(settings.engine)
    )


def _say_estimates(config: Config, teachers: Mapping[str, TeacherSettings], prepared: Mapping[str, Any]) -> None:
    for name, of_teacher in prepared.items():
        _say_estimate(config, teachers[name], of_teacher, _of(config, name))


def _check_room(config: Config, teachers: Mapping[str, TeacherSettings], missing: Mapping[str, Any]) -> None:
    """Before an engine starts: may we write the missing stores where they are to lie, and is there room?"""
    from duet.stages.cost.store import check_room
    from duet.stages.engines.choose import engine_order
    from duet.stages.teacher.plan import plan_for

    root = config.store_root
    if missing and isinstance(root, Folder):  # object storage does not tell
        plans = {
            name: plan_for(prepared, config.store, engine_order(teachers[name].engine)[0])
            for name, prepared in missing.items()
        }
        places = {name: root / store_name(plan.fingerprint, plan.format) for name, plan in plans.items()}
        if told := check_room([(missing[name], plans[name], places[name]) for name in missing]):
            say(told)


def _say_estimate(config: Config, settings: TeacherSettings, prepared: Any, of: str) -> None:
    """What stage one would do for a teacher."""
    from duet.stages.cost.store import FLOP_PER_S, estimate
    from duet.stages.engines.choose import engine_order
    from duet.stages.teacher.plan import plan_for, rows_there

    engine = engine_order(settings.engine)[0]
    plan = plan_for(prepared, config.store, engine)
    cost = estimate(prepared, plan)
    location = config.store_root / store_name(plan.fingerprint, plan.format)
    there = rows_there(prepared, config.store, config.store_root, engine)
    state = "complete" if location.size(MANIFEST_NAME) is not None else f"{there} of {plan.rows} rows are there"
    rows = ", ".join(f"{subset} {count}" for subset, count in cost.rows.items())
    say(f"{of}rows: {rows}; engine {plan.provenance['engine']}")
    say(
        f"{of}prompts: {cost.tokens_prefixed:,} tokens with the prefix, {cost.tokens_bare:,} without; "
        f"{cost.tokens_computed:,} to compute where all that they share is computed once"
    )
    say(f"{of}responses: at most {cost.positions:,} positions, {plan.top_k} ids each")
    say(f"{of}store: at most {cost.store_bytes:,} bytes and file headers, {location} ({state})")
    say(
        f"{of}cost: 2 x {cost.parameters / 1e6:,.1f} M parameters x {cost.tokens_computed + cost.positions:,} tokens = "
        f"{cost.flop / 1e12:.3g} TFLOP: {cost.seconds:,.1f} s on a GPU that does {FLOP_PER_S / 1e12:.0f} TFLOP/s (assumed)"
    )


def _of(config: Config, name: str) -> str:
    return f"teacher {name}: " if config.teachers else ""
