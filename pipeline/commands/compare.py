"""`duet compare`: DUET against other unlearning methods on the same data and budget; compare.json, compare.html and a table.

Works in `<run>/compare/` and writes the two files into the run's directory. Runs stage one where the run has no teacher logits
yet; the students that it trains are its own. Where DUET is trained with another preset of `harden` than the config's, that
preset's teacher logits are those of a run in `<run>/compare/harden/`. Of a chain, every method goes through all requests, and
the table is about the models after the last.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from duet.cache.files import publish_json, publishing, read_json
from duet.cache.watch import Watch
from duet.pipeline.commands.compare_parts import Work, made, own_stage_one, parts_of_table, requests_of, stage_one
from duet.pipeline.commands.compare_plan import compared_student, parts_of, plan_of, with_preset
from duet.pipeline.commands.compare_results import results_of_parts
from duet.pipeline.commands.distill import unasked_line
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.pages.chain import compared_chain_table
from duet.pipeline.pages.comparison import compare_table, render, sentences
from duet.pipeline.run.children import THIS_PROGRAM, run_quietly, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir, set_aside
from duet.pipeline.run.terminal import progress_bar, say, say_engine, show

if TYPE_CHECKING:
    from duet.pipeline.run.terminal import ProgressBar
    from duet.stages.compare.grid import Comparison

NOT_COMPARED = ("depth", "judge", "membership", "neutral_text", "lm_eval")  # of the settings evaluate
CPU_JOBS = 2  # parts at a time without a GPU, where --jobs is not given: each holds up to two models


def compare(request: Selection, num_jobs: int | None = None, part: str | None = None) -> int:
    """Train, choose, ask and report, `num_jobs` parts at a time; returns an exit code.

    A part is one method, the oracle, or base and teacher together. With `part`, in a child process, that one only: the parent
    finds its results on disk.
    """
    from duet.stages.models.directory import resolve_model

    config, stop, started = request.load(), StopSignal(), time.perf_counter()
    if isinstance(config.compare.oracle, str):
        resolve_model(config.compare.oracle, "compare.oracle")  # a wrong name should not be found after hours
    if part is None and (left_out := [name for name in NOT_COMPARED if getattr(config.evaluate, name)]):
        names = ", ".join(f"evaluate.{name}" for name in left_out)
        say(
            f"a comparison does not measure {names}: `duet evaluate` does, of each model that you name in evaluate.models"
        )
    presets, plans = _planned(request, config, stop, with_stage_one=part is None)
    parts = parts_of_table(config)
    if part is None and (code := _in_children(request, parts, num_jobs, plans, stop)):
        return code
    with progress_bar("") as bar:
        work = Work(config, presets, plans, _watch(bar, stop), stop)
        found = [made(work, name) for name in ([part] if part else parts)]
        if part:
            return 0
        results = results_of_parts(work, found)
    _publish(config.run, results)
    say(
        f"this call took {time.perf_counter() - started:.0f} s; of each method the models of the chosen setting are kept"
    )
    say(f"comparison: {config.run.compare_json}")
    say(f"report: {config.run.compare_page}")
    return 0


def _planned(
    request: Selection, config: Config, stop: StopSignal, with_stage_one: bool
) -> tuple[dict[str, Config], list[Comparison]]:
    """The config with each preset of compare.harden, and the plan of each request, one without a chain.

    All that can be refused is, before the missing teacher logits are made `with_stage_one`.
    """
    selections = {preset: with_preset(request, config, preset) for preset in config.compare.harden}
    presets = {preset: one.load() for preset, one in selections.items()}
    modes = {preset: (one, compared_student(one, preset)) for preset, one in presets.items()}
    (first, (of_first, student)), *_ = modes.items()
    if with_stage_one:
        _check_methods(config, of_first.train_settings(student).last_layers)
    requests = requests_of(config, of_first)
    exams = parts_of(requests)
    if with_stage_one:
        for preset, one in selections.items():
            stage_one(presets[preset], one, stop)
        for one in requests[1:]:
            own_stage_one(one, stop)
    claim_run_dir(config)
    later = zip(requests[1:], exams[1:], strict=True)
    plans = [plan_of(config, modes, *exams[0]), *(plan_of(one, {first: (one, student)}, *of) for one, of in later)]
    for row, mode in plans[0].modes.items() if with_stage_one else ():
        if warning := unasked_line(replace(mode.job, name=row), mode.stores):
            say(warning)
    return presets, plans


def _check_methods(config: Config, last_layers: int | None) -> None:
    """Refuse methods that have nothing to train in the model."""
    from duet.stages.compare.methods import check_rmus_layers
    from duet.stages.compare.repselect import check_matrices
    from duet.stages.models.directory import resolve_model

    model_dir, trust_remote_code = (
        resolve_model(config.teacher.model, "teacher.model"),
        config.teacher.trust_remote_code,
    )
    if "repselect" in config.compare.methods:
        check_matrices(model_dir, trust_remote_code)
    if "rmu" in config.compare.methods:
        check_rmus_layers(model_dir, last_layers, trust_remote_code)


def _publish(run: RunDir, results: dict[str, Any]) -> None:
    """Write numbers and page, earlier ones kept aside, and show what came out."""
    earlier = read_json(run.compare_json) if run.compare_json.is_file() else results
    if any(earlier.get(settings) != results[settings] for settings in ("compare", "evaluate", "train")):
        set_aside("comparison", run.compare_json, run.compare_page)
    publish_json(run.compare_json, results)
    with publishing(run.compare_page) as temporary:
        temporary.write_text(render(results), encoding="utf-8")
    show(compare_table(results))
    if "chain" in results:
        show(compared_chain_table(results))
    for sentence in sentences(results):
        say(sentence)


def _in_children(
    request: Selection,
    parts: Sequence[str],
    num_jobs: int | None,
    plans: Sequence[Comparison],
    stop: StopSignal,
) -> int:
    """Every part in a process of its own, several at a time; the first exit code that is not 0. One at a time needs none."""
    from duet.stages.compare.grid import ANSWERS_TO_CHOOSE
    from duet.stages.evaluate.answers import answer_all

    devices = visible_gpus(plans[0].reported.device)
    num_jobs = min(num_jobs or len(devices) or CPU_JOBS, len(parts))
    if num_jobs == 1:
        return 0
    with progress_bar("") as bar:  # all of them need it
        for plan in plans:
            answer_all(plan.references[:1], plan.validation, plan.folder / ANSWERS_TO_CHOOSE, _watch(bar, stop))
    commands = {
        name: [*THIS_PROGRAM, "compare", *request.arguments(students=False), "--part", name] for name in reversed(parts)
    }
    return run_quietly(commands, num_jobs, devices, stop)


def _watch(bar: ProgressBar, stop: StopSignal) -> Watch:
    return Watch(bar.update, functools.cache(say_engine), stop)
