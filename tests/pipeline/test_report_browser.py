"""The pages in a real browser, headless Chromium: nothing in the console, charts that can be seen, no request, a search that
finds, text that can be read, on a phone and on paper too. Made-up numbers, see `report_results.py`."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from report_results import full_results, plain_results

from pipeline import students_page
from pipeline.printing import print_pdf
from pipeline.report import render

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install chromium chromium-driver, and `make setup`"
)

# The lowest contrast of any text with what is behind it (WCAG 2: relative luminances, lighter over darker), and where.
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b]
  .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
let worst = [99, ""], seen = 0;
for (const element of document.body.querySelectorAll("*:not(script)")) {
  const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
  if (!text || element.closest("title, desc") || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const pair = [rgb(element.closest("svg") ? style.fill : style.color), behind(element)].map(luminance).sort((a, b) => b - a);
  const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
  seen += 1;
  if (ratio < worst[0]) worst = [ratio, text.slice(0, 40)];
}
return [...worst, seen];
"""
CHARTS = """
return [...document.querySelectorAll("figure.chart svg")].map(svg => {
  const box = svg.getBoundingClientRect(), marks = svg.querySelectorAll("rect, circle, polyline");
  const drawn = [...marks].map(mark => mark.getBoundingClientRect()).filter(b => b.width > 0 || b.height > 0);
  const outside = drawn.filter(b =>
    b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1);
  return [box.left, box.right, box.width, box.height, drawn.length, outside.length];
});
"""
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
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    # Chromium's sandbox refuses root, and a container's /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    """Open a page on a screen of this width, everything unfolded."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


def requests(browser: Any) -> list[str]:
    """What the page asked for since it was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    probe = {f"{what}.{subset}": 0.9 for what in ("agreement", "refusal") for subset in ("forget", "retain")}
    more = {
        "start": "m",
        "head": "h",
        "tokens_per_s": 9.0,
        "peak_memory_gb": 0.5,
        "probe": {"held_out": False, **probe},
    }
    students = [{"name": name, **more, **info} for name, info in full_results()["students"].items()]
    texts = {
        "full": render(full_results()),
        "plain": render(plain_results()),
        "students": students_page.render("lab", students),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize(("name", "charts"), [("full", 8), ("plain", 6), ("students", 2)])
def test_charts_are_seen_nothing_is_asked_for_and_nothing_sticks_out(browser, pages, name, charts, width):
    check_page(browser, pages[name], width, charts)


def check_page(browser: Any, page: Path, width: int, charts: int) -> None:
    show(browser, page, width)
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    found = browser.execute_script(CHARTS)
    assert len(found) == charts
    for left, right, box_width, box_height, drawn, outside in found:
        assert 0 <= left < right <= width
        assert box_width > 250
        assert box_height > 30
        assert drawn > 0
        assert outside == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


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
