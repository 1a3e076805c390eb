"""A page as a PDF, printed by a headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.files import publishing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PRINT_LIMIT_S = 120


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
