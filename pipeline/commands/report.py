"""`duet report`: write report.html again from a run's results.json, and as a PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publishing, read_json
from duet.pipeline.pages.pdf import print_pdf
from duet.pipeline.pages.report import rendered
from duet.pipeline.run.directory import REPORT_NAME, RESULTS_NAME
from duet.pipeline.run.terminal import say

RUNS_DIR = Path("runs")


def report(run: str | None, pdf: bool) -> None:
    """Render a run's report anew and print its path; with `pdf`, print it to report.pdf too."""
    run_dir = run_dir_of(run)
    page = rendered(read_results(run_dir), str(run_dir / RESULTS_NAME))
    path = run_dir / REPORT_NAME
    with publishing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {path}")
    if pdf:
        print_pdf(path, path.with_suffix(".pdf"))
        say(f"pdf: {path.with_suffix('.pdf')}")


def run_dir_of(run: str | None) -> Path:
    """The directory of a run that has results; where none is named, that of the only one in runs/."""
    if run is not None:
        if not (Path(run) / RESULTS_NAME).is_file():
            raise UserError(
                f"{run} has no {RESULTS_NAME}", "name the directory of a run that `duet evaluate` has scored"
            )
        return Path(run)
    found = sorted(path.parent for path in RUNS_DIR.glob(f"*/{RESULTS_NAME}"))
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UserError(f"which run? With results there are in {RUNS_DIR}/: {names}", "name the run's directory")
    return found[0]


def read_results(run_dir: Path) -> Any:
    return read_json(run_dir / RESULTS_NAME)
