"""`duet report`: report.html anew from a run's results.json, and as a PDF through a headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cache.errors import UserError
from cache.files import publishing, read_json
from pipeline.commands import REPORT_NAME, RESULTS_NAME
from pipeline.report import rendered
from pipeline.terminal import say

RUNS_DIR = Path("runs")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PRINT_LIMIT_S = 120


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


def print_pdf(page: Path, pdf: Path) -> None:
    """Print a page through a headless Chromium; where there is none, or it fails, a UserError."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            f"printing needs Chromium or Chrome, and none of {', '.join(BROWSERS)} is on PATH",
            f"install one (Debian: apt-get install chromium), or print {page} from any browser",
        )
    with publishing(pdf) as temporary, tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            *(["--no-sandbox"] if _is_root() else []),  # Chromium's sandbox refuses to run as root
            "--no-pdf-header-footer",
            f"--print-to-pdf={temporary.resolve()}",
            page.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PRINT_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{browser} did not print {page} within {PRINT_LIMIT_S} s", f"print {page} from any browser"
            ) from None
        if done.returncode or not temporary.is_file():
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise UserError(
                f"{browser} ended with {done.returncode} and no PDF; it said: {said}", f"print {page} from any browser"
            )


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
