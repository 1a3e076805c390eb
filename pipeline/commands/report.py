"""`duet report`: write report.html again from a run's results.json, and as a PDF."""

from __future__ import annotations

from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.files import publishing, read_json
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.pages.pdf import print_pdf
from duet.pipeline.pages.report import rendered
from duet.pipeline.run.terminal import say

RUNS_DIR = Path("runs")


def report(run: str | None, pdf: bool) -> None:
    """Render a run's report again and print its path; with `pdf`, print it to report.pdf too."""
    files = scored_run(run)
    page = rendered(read_json(files.results), str(files.results))
    with publishing(files.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {files.report}")
    if pdf:
        print_pdf(files.report, files.pdf)
        say(f"pdf: {files.pdf}")


def scored_run(run: str | None) -> RunDir:
    """A run that has results, by its directory; where none is named, the only one in runs/."""
    if run is not None:
        files = RunDir(Path(run))
        if not files.results.is_file():
            raise UserError(
                f"{run} has no {files.results.name}", "name the directory of a run that `duet evaluate` has scored"
            )
        return files
    found = sorted(path for path in RUNS_DIR.glob("*") if RunDir(path).results.is_file())
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UserError(f"which run? With results there are in {RUNS_DIR}/: {names}", "name the run's directory")
    return RunDir(found[0])
