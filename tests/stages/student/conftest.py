"""The store that trainings are tried on, as a fixture of every test here."""

from student_jobs import store as store  # noqa: PLC0414
