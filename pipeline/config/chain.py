"""A chain of forget requests: the config of each further one's run, which starts where the one before has ended.

The first request is the config's own, in the run's directory. Each later one is a run below it, `<run>/chain/NAME`, like any
other: its teacher is the last request's student, the earlier requests are its `requests`, and all is measured against the
first base.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.config.explain import validated
from duet.pipeline.config.schema import Config, check_bare, check_requests, check_students, check_tofu
from duet.stages.settings.chain import FIRST
from duet.stages.settings.data import ForgetRequest, RequestData
from duet.stages.settings.student import StudentSettings


def check_chain(config: Config, where: str) -> None:
    """Refuse names that occur twice, and several teachers."""
    if not config.chain:
        return
    names = [*MAIN_SUBSETS, FIRST, *(request.name for request in (*config.requests, *config.chain))]
    names += [*config.evaluate.sets, *(name for request in config.chain for name in request.sets)]
    if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UserError(
            f"{where}: chain: the name {repeated!r} occurs twice among requests and sets",
            f"give each its own; {', '.join(MAIN_SUBSETS)} and {FIRST} are taken",
        )
    if config.teachers:
        raise UserError(
            f"{where}: chain: there are {len(config.teachers)} teachers", "a chain has one: use teacher alone"
        )


def steps_of(config: Config) -> list[Config]:
    """The config of each further request's run, in order. UserError where the students do not make a chain."""
    if not config.chain:
        return []
    student, steps = chained_student(config), []
    for number in range(len(config.chain)):
        last = steps[-1].run if steps else config.run
        steps.append(step_on(config, number, str(last.student(student.name).model), config.run.chain))
    return steps


def as_if_first(config: Config, step: Config) -> Config:
    """A step's config with the first base as its teacher: what can be checked and estimated before the steps before it."""
    teacher = step.teacher.model_copy(update={"model": config.base_model})
    evaluate = step.evaluate.model_copy(update={"base": None})
    return step.model_copy(update={"teacher": teacher, "evaluate": evaluate})


def chained_student(config: Config) -> StudentSettings:
    """The one student, from which the next request's starts. UserError where that would lose what was forgotten before."""
    names = [student.name for student in config.students]
    if len(names) > 1:
        raise UserError(
            f"a chain has one student, from which the next request starts, and there are {len(names)}: {', '.join(names)}",
            f"choose one with --only, for example --only {names[0]}",
        )
    [student] = config.students
    for key, value in (("model", student.model), ("push_to_hub", student.push_to_hub)):
        if value is not None:
            raise UserError(
                f"students.{student.name}.{key} is {value}, and in a chain each student starts from the last one"
                + (" and each would be pushed over it" if key == "push_to_hub" else ""),
                f"leave {key} out",
            )
    return student


def set_names(config: Config, number: int) -> dict[str, str]:
    """In the run of this request (0: the first), what each request's forget set up to it is called, by request."""
    names = [FIRST, *(request.name for request in config.chain[:number])]
    return {name: f"{name}.forget" for name in names} | {names[-1]: "forget"}


def step_on(config: Config, number: int, model: str, folder: Path) -> Config:
    """The config of this further request's run (0: the first of them), below a folder, on a model that the ones before left."""
    request = config.chain[number]
    sets = {name: one for of in config.chain[: number + 1] for name, one in of.sets.items()}
    raw = config.model_dump()
    raw |= {"name": request.name, "runs_dir": str(folder), "topic": request.topic, "chain": ()}
    raw["requests"] = _before(config, number)
    raw["data"] |= {"forget": request.forget, "retain": request.retain or config.data.retain}
    raw["teacher"] |= {"model": model, "prefix": request.prefix or config.teacher.prefix}
    raw["evaluate"] |= {"base": config.base_model, "sets": config.evaluate.sets | sets}
    where = f"chain.{number}"
    step = validated(Config, raw, where)
    for check in (check_requests, check_tofu, check_bare, check_students):
        check(step, where)
    return step


def _before(config: Config, number: int) -> list[ForgetRequest]:
    """The requests before this one, each behind its own prefix: what was to be forgotten then, not what was to be kept."""
    found = [(FIRST, config.topic, None, config.data.forget)]
    found += [(one.name, one.topic, one.prefix, one.data.forget) for one in config.requests]
    found += [(one.name, one.topic, one.prefix, one.forget) for one in config.chain[:number]]
    return [
        ForgetRequest(name=name, topic=topic, prefix=prefix or config.teacher.prefix, data=RequestData(forget=forget))
        for name, topic, prefix, forget in found
    ]
