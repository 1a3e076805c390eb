"""Pages in a real browser, headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]

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


def check_page(browser: Any, page: Path, width: int, charts: int) -> None:
    show(browser, page, width)
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    found = browser.execute_script(CHARTS)
    assert len(found) == charts, f"{len(found)} charts"
    for left, right, box_width, box_height, drawn, outside in found:
        assert 0 <= left < right <= width
        assert box_width > 250
        assert box_height > 30
        assert drawn > 0
        assert outside == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
