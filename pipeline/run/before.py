"""What stage two would refuse of a run's students, said before stage one: from configs and tokenizers, in seconds.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.record import SUBSETS
from duet.pipeline.config.schema import Config
from duet.pipeline.run.named_models import is_here, start_model
from duet.stages.settings.student import TRAINING_NAME, StudentSettings, teacher_weights


def check_students_before(config: Config, rows: Sequence[Any] | None = None, must_be_here: bool = True) -> list[str]:
    """Refuse what stage two would refuse of the config's students, as far as it is known before stage one; no weight is read.

    `rows` are a teacher's (`stages/teacher/plan.py: Row`), to be checked too where they are known. Returns lines worth
    saying: what an export will leave out, and without `must_be_here` which student's model is not on this machine and so
    was not checked.
    """
    from duet.stages.models.directory import small_files
    from duet.stages.models.tokenizers import load_tokenizer
    from duet.stages.student.checks import Expected, Start, check_settings

    teachers, said = config.teacher_settings(), []
    trust = config.teacher.trust_remote_code
    tokenizer = load_tokenizer(small_files(next(iter(teachers.values())).model, "teacher.model"), trust)
    subsets = {subset: 1 if rows is None else sum(row.subset == subset for row in rows) for subset in SUBSETS}
    stores = {
        name: Expected(
            one.top_k, one.logsumexp, 1, one.max_positions, subsets, {"engine": one.engine, "prompt": config.prompt}
        )
        for name, one in teachers.items()
    }
    for student in config.students:
        if (config.run_dir / student.name / TRAINING_NAME).is_file():
            continue
        settings = config.train_settings(student)
        used = teacher_weights(settings, list(teachers))
        combine = (settings.combine or "mix") if len(used) > 1 else None
        check_settings(settings, settings.loss, [stores[name] for name in used], combine, None)
        try:
            folder = start_folder(config, student)
        except UserError as error:
            if must_be_here:
                raise
            said.append(f"student {student.name}: not checked before stage one: {error.what}")
            continue
        start = Start.of(folder, student.name, settings, tokenizer, config.prompt, trust)
        for row in rows or ():
            follow = 0 if row.given_ids else config.teacher.max_positions
            start.check_row(row.row_id, row.student_ids, row.given_ids or (), follow)
        if start.left_out:
            said.append(left_out_line(student.name, start.left_out))
    return said


def start_folder(config: Config, student: StudentSettings) -> Path:
    """The directory of the model that a student starts from; of one on the hub, without its weights."""
    from duet.stages.models.directory import resolve_model, small_files

    model, where = start_model(config, student), f"students.{student.name}.model"
    return resolve_model(model, where) if is_here(model) else small_files(model, where)


def left_out_line(name: str, flags: Sequence[str]) -> str:
    return (
        f"student {name}: generation_config.json is written without {', '.join(flags)}: generation does not read "
        "such a flag here, and transformers does not save it"
    )
