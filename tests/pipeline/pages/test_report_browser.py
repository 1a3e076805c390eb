"""The pages in a real browser, headless Chromium: nothing in the console, charts that can be seen, no request, a search that
finds, text that can be read, on a phone and on paper too. Made-up numbers, see `report_results.py`."""

from __future__ import annotations

import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from in_browser import CONTRAST, MISSING, check_page, show
from in_browser import browser as browser  # noqa: PLC0414 - the fixture
from report_results import finished_student, full_results, plain_results

from duet.pipeline.pages import students as students_page
from duet.pipeline.pages.pdf import print_pdf
from duet.pipeline.pages.report import render

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install chromium chromium-driver, and `make setup`"
)
# Resolves to how often the page's policy forbade a request out of these three.
TRY_REQUESTS = """
const [address, done] = arguments;
let forbidden = 0;
document.addEventListener("securitypolicyviolation", () => { forbidden += 1; if (forbidden === 3) done(forbidden); });
fetch(address + "a").catch(() => null);
new Image().src = address + "b";
const script = document.createElement("script");
script.src = address + "c";
document.body.append(script);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    students = [
        finished_student(name, loss=info["loss"], curve=info["curve"])
        for name, info in full_results()["students"].items()
    ]
    texts = {
        "full": render(full_results()),
        "plain": render(plain_results()),
        "students": students_page.render("lab", students),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize(("name", "charts"), [("full", 10), ("plain", 7), ("students", 2)])
def test_charts_are_seen_nothing_is_asked_for_and_nothing_sticks_out(browser, pages, name, charts, width):
    check_page(browser, pages[name], width, charts)


def test_the_policy_forbids_every_request(browser, pages):
    """Even to a server that is there: it hears nothing."""
    heard = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        with urlopen(address + "here") as answer:
            assert answer.status == 204
        show(browser, pages["full"], 1200)
        assert browser.execute_async_script(TRY_REQUESTS, address) == 3
        server.shutdown()
    assert heard == ["/here"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["full", "students"])
def test_all_text_can_be_read(browser, pages, name, scheme):
    """4.5 is what WCAG 2 asks of small text (level AA)."""
    show(browser, pages[name], 1200, scheme)
    ratio, text, seen = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, (ratio, text)
    assert seen > 30
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 60) == (scheme == "dark")


def test_the_search_field_filters_the_samples(browser, pages):
    show(browser, pages["full"], 1200)
    count = "return [...document.querySelectorAll('.sample')].filter(s => s.checkVisibility()).length"
    field = browser.find_element("id", "search")
    assert browser.execute_script(count) == 12
    field.send_keys("THE NEEDLE")
    assert browser.execute_script(count) == 1
    assert browser.find_element("id", "found").text == "1 of 12"
    field.clear()
    field.send_keys("question 1")
    assert browser.execute_script(count) == 3, "1, 10, 11"
    field.clear()
    field.send_keys("nowhere to be found")
    assert browser.execute_script(count) == 0


def test_printed_it_holds_the_verdict_and_what_was_folded(pages, tmp_path):
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext: apt-get install poppler-utils")
    pdf = tmp_path / "report.pdf"
    print_pdf(pages["full"], pdf)
    assert pdf.read_bytes().startswith(b"%PDF")
    done = subprocess.run(["pdftotext", str(pdf), "-"], capture_output=True, text=True, check=True)
    printed = " ".join(done.stdout.split())
    for text in ("suppressed under these tests", "not distinguishable", "All metrics of all models", "Question 11?"):
        assert text in printed
    assert "tofu.truth" in printed.split("All metrics of all models")[1], "folded on the screen"
    assert "Search in" not in printed
