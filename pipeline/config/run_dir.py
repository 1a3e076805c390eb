"""The names of all files in a run's directory. They are part of the config because no student may have such a name."""

from __future__ import annotations

from pathlib import Path

from duet.stages.settings.student import CHECKPOINTS_NAME, METRICS_NAME, MODEL_DIR, TRAINING_NAME
from duet.stages.student.summary import is_trained


class StudentDir:
    """The files of one student, in its own folder of the run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training = path / TRAINING_NAME  # written last: the student is done
        self.metrics = path / METRICS_NAME  # a line for each step
        self.checkpoints = path / CHECKPOINTS_NAME
        self.model = path / MODEL_DIR
        self.pushed = path / "pushed.json"  # where its model was pushed to

    @property
    def is_done(self) -> bool:
        return is_trained(self.path)


class RunDir:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the settings, resolved
        self.environment = path / "environment.json"
        self.done = path / "done.json"  # all stages have ended: what they read and wrote, as hashes
        self.log = path / "log.txt"
        self.results = path / "results.json"
        self.items = path / "items.json"  # the scores of each question
        self.report = path / "report.html"
        self.pdf = path / "report.pdf"
        self.students_page = path / "students.html"
        self.students_json = path / "students.json"
        self.compare_json = path / "compare.json"
        self.compare_page = path / "compare.html"

        self.teacher = path / "teacher"
        self.store_pointer = self.teacher / "store.json"  # which stores the run uses, by teacher
        self.answers = path / "answers"
        self.likelihoods = path / "likelihoods"
        self.lm_eval = path / "lm_eval"
        self.judged = path / "judged"
        self.open_unlearning = path / "open-unlearning"
        self.compare = path / "compare"
        self.compare_answers = self.compare / "answers"
        self.compare_likelihoods = self.compare / "likelihoods"
        self.chain = path / "chain"  # a run for each further request of a chain
        self.chain_json = path / "chain.json"
        self.chain_page = path / "chain.html"

        self.audit = path / "audit"
        self.audit_log = self.audit / "log.txt"
        self.audit_json = self.audit / "audit.json"
        self.audit_page = self.audit / "audit.html"
        self.audit_verdicts = self.audit / "verdicts.json"
        self.audit_answers = self.audit / "answers"

        self.slurm = path / "slurm"  # scripts and the settings that the jobs read
        self.slurm_jobs = self.slurm / "jobs.json"  # all jobs that were ever submitted: [{name, id, submitted}]
        self.slurm_logs = self.slurm / "logs"
        self.slurm_attempts = self.slurm / "attempts"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders beside those of the students."""
        evaluated = (self.answers, self.likelihoods, self.lm_eval, self.judged, self.open_unlearning)
        return (self.teacher, *evaluated, self.audit, self.compare, self.chain, self.slurm)

    def student(self, name: str) -> StudentDir:
        return StudentDir(self.path / name)
