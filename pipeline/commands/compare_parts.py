"""The parts of a comparison: a method, the oracle, or base and teacher. Of a chain, a method goes through all requests.

Each later request of a chain is planned as if the first base had to forget it, in `<run>/compare/chain/NAME`. What a method has
trained after one request is what it starts from at the next: other methods with the rows of that plan, in its order; DUET with
teacher logits of its own last model, in a run below that model's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import EXIT_INTERRUPTED, IncompleteStore, Interrupted, UserError
from duet.cache.watch import Watch
from duet.pipeline.commands.compare_plan import as_they_are, compared_student, mode_of
from duet.pipeline.commands.run import run_stage
from duet.pipeline.config.chain import as_if_first, step_on, steps_of
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.directory import StopSignal, claim_run_dir
from duet.pipeline.run.named_models import model_name
from duet.pipeline.run.stores import stores_of_run
from duet.pipeline.run.terminal import say
from duet.stages.settings.compare import OracleSettings
from duet.stages.settings.student import MODEL_DIR

if TYPE_CHECKING:
    from duet.stages.compare.grid import Comparison, Trial
    from duet.stages.compare.results import Row

REFERENCES, ORACLE = "references", "oracle"  # parts that are not a method
REPORTED = "answers/reported"  # after a request that is not the last, in that request's folder


@dataclass(frozen=True)
class Work:
    """What all parts are made of."""

    config: Config
    presets: Mapping[str, Config]  # the config with each preset of compare.harden
    plans: Sequence[Comparison]  # one, or of a chain one for each request
    watch: Watch
    stop: StopSignal


@dataclass(frozen=True)
class Part:
    """The result of one part: its rows, and facts on how their models were made."""

    rows: list[Row]
    earlier: Sequence[Stage] = ()  # of a chain, what it was after each request but the last
    method: tuple[str, dict[str, Any]] | None = None  # name, and its entry in compare.json
    oracle: dict[str, Any] | None = None


@dataclass(frozen=True)
class Stage:
    """One method after one request of a chain: its models, and how they were chosen."""

    row: Row
    facts: Mapping[str, Any]


def requests_of(config: Config, of_preset: Config) -> list[Config]:
    """The config of each request: the run's own, then each later one's as if it were the first. Without a chain, one.

    `of_preset` is the config with the first preset of `compare.harden`. UserError where its students do not make a chain.
    """
    steps = [as_if_first(of_preset, step) for step in steps_of(of_preset)]
    return [config, *(step.model_copy(update={"runs_dir": str(config.run.compare / "chain")}) for step in steps)]


def parts_of_table(config: Config) -> list[str]:
    """The names of the parts in the order of the table."""
    from duet.stages.compare.grid import duet_row

    oracle = [ORACLE] if config.compare.oracle is not None else []
    return [REFERENCES, *map(duet_row, config.compare.harden), *config.compare.methods, *oracle]


def stage_one(config: Config, request: Selection, stop: StopSignal) -> None:
    """Run stage one, in a process of its own, where the run has no teacher logits."""
    try:
        stores_of_run(config)
        return
    except IncompleteStore:
        if stop():
            raise Interrupted("before stage one") from None
    code = run_stage("teacher-logits", request, stop)
    if code == EXIT_INTERRUPTED:
        raise Interrupted("in stage one")
    if code:
        raise UserError(f"stage one of {config.run_dir} ended with exit code {code}", "its own lines above say why")


def own_stage_one(config: Config, stop: StopSignal) -> None:
    """The same of a request's own run, whose directory is made."""
    claim_run_dir(config)
    stage_one(config, Selection(str(config.run.config)), stop)


def made(work: Work, name: str) -> Part:
    """Bring one part to the end: train and choose its models, and ask them the questions that are reported. Waits while
    another process does."""
    from duet.stages.exam.exam import stem_of
    from duet.stages.student.alone import alone_in

    if name == REFERENCES:
        return _made(work, name)
    with alone_in(work.plans[0].folder / stem_of(name), f"compare, {name}", work.watch) as watch:
        return _made(replace(work, watch=watch), name)


def _made(work: Work, name: str) -> Part:
    from duet.stages.compare.results import Row
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.exam.exam import Subject
    from duet.stages.exam.reading import read_given

    plan, run, watch = work.plans[-1], work.config.run, work.watch
    if name == REFERENCES:
        part = Part([Row(subject.name, [subject]) for subject in plan.references])
    elif name == ORACLE:
        model_dir, facts = _oracle(work.config, plan, watch)
        part = Part([Row(ORACLE, [Subject(ORACLE, model_dir, "", "base")])], oracle=facts)
    else:
        *earlier, last = _stages(work, name)
        for one, stage in zip(work.plans, earlier, strict=False):
            answer_all(stage.row.subjects, as_they_are(one.reported), one.folder / REPORTED, watch)
        part = Part([last.row], earlier, method=(name, dict(last.facts)))
    subjects = [subject for row in part.rows for subject in row.subjects]
    answer_all(subjects, plan.reported, run.compare_answers, watch)
    read_given(subjects, plan.reported, run.compare_likelihoods, watch)
    return part


def _stages(work: Work, name: str) -> list[Stage]:
    """A method after the request, or of a chain after each: at the next, each of its models starts from itself."""
    from duet.stages.compare.grid import best_of
    from duet.stages.compare.methods import METHODS
    from duet.stages.compare.results import Row
    from duet.stages.exam.exam import Subject
    from duet.stages.student.summary import seen_by

    first, seeds = work.plans[0], work.config.compare.seeds
    trials: list[Trial] = []
    found: list[Stage] = []
    for number, plan in enumerate(work.plans):
        of_seeds = [_started_from(work, number, name, last) for last in trials] or [plan] * seeds
        trials, grid = best_of(of_seeds, name, work.watch, say)
        own = METHODS[name].trained_on if name in METHODS else seen_by(trials[0].folder / MODEL_DIR)
        seen = tuple(dict.fromkeys((*seen_by(first.model_dir), *own)))
        subjects = [
            Subject(_of_seed(name, one.repeat), one.folder / MODEL_DIR, "", "base", trained_on=seen) for one in trials
        ]
        title, paper = (METHODS[name].title, METHODS[name].paper) if name in METHODS else _mode_title(first, name)
        facts = {"title": title, "paper": paper, "setting": trials[0].setting, "seeds": len(trials), "grid": grid}
        facts |= {"trained_on": list(seen)} if seen else {}
        found.append(Stage(Row(name, subjects), facts))
    return found


def _started_from(work: Work, number: int, name: str, last: Trial) -> Comparison:
    """The plan of a later request for one of the models that a method has trained last."""
    model_dir, plan = last.folder / MODEL_DIR, work.plans[number]
    started = replace(plan, model_dir=model_dir, start_name=last.label)
    if name not in work.plans[0].modes:
        return started
    preset = work.plans[0].modes[name].harden
    step = step_on(work.presets[preset], number - 1, str(model_dir), last.folder / "chain")
    own_stage_one(step, work.stop)
    return replace(started, modes={name: mode_of(step, compared_student(step, preset), preset)})


def _of_seed(name: str, repeat: int) -> str:
    """The name of a row's model: `npo`, then `npo:seed1`."""
    return f"{name}:seed{repeat}" if repeat else name


def _mode_title(plan: Comparison, name: str) -> tuple[str, str]:
    harden = plan.modes[name].harden
    return "DUET" if harden == "none" else f"DUET, harden: {harden}", "2601.21283"


def _oracle(config: Config, plan: Comparison, watch: Watch) -> tuple[Path, dict[str, Any]]:
    """The oracle's model directory and its entry in compare.json."""
    from duet.stages.compare.oracle import train_oracle
    from duet.stages.models.directory import resolve_model

    oracle = config.compare.oracle
    if not isinstance(oracle, OracleSettings):
        return resolve_model(str(oracle), "compare.oracle"), {"model": model_name(str(oracle))}
    model_dir, done = train_oracle(plan, oracle, watch, say)
    return model_dir, {key: done[key] for key in ("steps", "train_s", "rows")}
